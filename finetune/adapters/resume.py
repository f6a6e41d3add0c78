"""Going on from an adapter: training starts from its weights, with its rank, alpha and targets."""

from typing import Any

import torch
from torch import nn

from .files import Adapter, check_fits
from .lora import ALL_LINEAR, DEFAULT, lora_layers


def continued_lora(adapter: Adapter) -> dict[str, Any]:
    """LoraConfig's fields that decide the adapter's shape: rank, alpha, rank_stabilized, targets.

    Raises ValueError for an adapter whose layers differ in rank or scale.
    """
    scales = sorted({scale for _, _, scale in adapter.layers.values()})
    if len(adapter.ranks) > 1 or len(scales) > 1:
        raise ValueError(
            f"adapter {adapter.where} has layers of ranks {adapter.ranks} and scales {scales}; training goes on from "
            "adapters of one rank and one scale alone; merge it into its base instead, and train a new one"
        )
    named = adapter.config.get("target_modules")
    targets = (ALL_LINEAR,) if named == ALL_LINEAR else tuple(named) if isinstance(named, list) else (*adapter.layers,)
    rank, stabilized = adapter.ranks[0], bool(adapter.config.get("use_rslora"))
    alpha = scales[0] * (rank**0.5 if stabilized else rank)
    return {"rank": rank, "alpha": float(alpha), "rank_stabilized": stabilized, "targets": targets}


@torch.no_grad()
def load_weights_(model: nn.Module, adapter: Adapter, *, base_fingerprint: str, name: str = DEFAULT) -> None:
    """Give the model's new adapter, made by `attach_lora` with `continued_lora`, the weights of this one.

    Raises ValueError when the adapter was made for another base.
    """
    check_fits(adapter, model, fingerprint=base_fingerprint)
    layers = dict(lora_layers(model))
    assert layers.keys() == adapter.layers.keys(), "continued_lora names the adapter's layers"
    for path, (a, b, _) in adapter.layers.items():
        update = layers[path].updates[name]
        update.lora_a.copy_(a)
        update.lora_b.copy_(b)
