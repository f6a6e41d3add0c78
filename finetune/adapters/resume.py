"""Going on from an adapter: training starts from its weights, with its rank, alpha and targets."""

import re
from typing import Any

import torch

from ...base.model.transformer import Transformer
from .adapter import EMBEDDING
from .config import ALL_LINEAR, DEFAULT
from .files import Adapter, check_fits
from .lora import adapted_layers
from .peft_config import saved_names
from .prefix import split_embeddings


def continued_lora(adapter: Adapter) -> dict[str, Any]:
    """LoraConfig's fields that decide the adapter's shape, as its adapter_config.json states them.

    Raises ValueError for an adapter whose layers have ranks or scales that no field can say.
    """
    config = adapter.config
    if adapter.prefix is not None:
        return {"adapter_kind": "prefix", "prefix_tokens": adapter.prefix.shape[0]}
    if adapter.bottlenecks:
        return {"adapter_kind": "bottleneck", "bottleneck_size": config["bottleneck_size"]}
    named = config.get("target_modules")
    targets = (ALL_LINEAR,) if named == ALL_LINEAR else tuple(named) if isinstance(named, list) else (*adapter.layers,)
    if any(config.get(key) for key in ("exclude_modules", "layers_to_transform")):
        targets = (*adapter.layers,)
    fields: dict[str, Any] = {
        "rank": config.get("r", 8),
        "alpha": float(config.get("lora_alpha", 8)),
        "rank_stabilized": bool(config.get("use_rslora")),
        "targets": targets,
    }
    for key in ("rank_pattern", "alpha_pattern"):  # of those that name a layer; others would be refused as slips
        if patterns := {name: value for name, value in (config.get(key) or {}).items() if _is_used(name, adapter)}:
            fields[key] = patterns
    if adapter.magnitudes:
        fields["use_dora"] = True
    if names := saved_names(config):
        fields["modules_to_save"] = tuple(names)
    if config.get("ensure_weight_tying"):
        fields["ensure_weight_tying"] = True
    if adapter.token_rows:
        if {*adapter.token_rows} != {EMBEDDING}:
            raise ValueError(
                f"adapter {adapter.where} has rows of the head alone; training can't go on from it, merge it instead"
            )
        fields["trainable_token_indices"] = tuple(adapter.token_rows[EMBEDDING][0])
    return fields


def _is_used(pattern: str, adapter: Adapter) -> bool:
    return any(re.match(rf"(.*\.)?({pattern})$", path) or pattern == path for path in adapter.layers)


@torch.no_grad()
def load_weights_(model: Transformer, adapter: Adapter, *, base_fingerprint: str, name: str = DEFAULT) -> None:
    """Give the model's new adapter, made by `attach_adapter` with `continued_lora`, the weights of this one.

    Raises ValueError when the adapter was made for another base.
    """
    check_fits(adapter, model, fingerprint=base_fingerprint)
    updates: dict[str, Any] = {
        path: layer.updates[name] for path, layer in adapted_layers(model) if name in layer.updates
    }
    for path, (a, b, _) in adapter.layers.items():
        updates[path].lora_a.copy_(a)
        updates[path].lora_b.copy_(b)
    for path, magnitude in adapter.magnitudes.items():
        updates[path].magnitude.copy_(magnitude)
    for parts in (adapter.modules, adapter.bottlenecks):
        for path, tensors in parts.items():
            for key, tensor in tensors.items():
                updates[path].get_parameter(key).copy_(tensor)
    for path, (_, rows) in adapter.token_rows.items():
        updates[path].rows.copy_(rows)
    if adapter.prefix is not None:
        layers = split_embeddings(adapter.prefix, model.config)
        for update, (keys, values) in zip(updates.values(), layers, strict=True):
            update.keys.copy_(keys)
            update.values.copy_(values)
