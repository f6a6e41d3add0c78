"""One dial: what `--depth N` sets. The constants of the recipe stand here and nowhere else.

Every setting that is given by a flag, --set or a TOML file wins over the dial.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .model.config import ModelConfig
from .model.sizes import gated_width, with_sizes

LARGEST_DEPTH = 100


@dataclass(frozen=True)
class Recipe:
    """How sizes and training follow from the depth."""

    width_a_layer: int = 64  # d_model = depth x this: the aspect ratio of small models that train well (nanochat's too)
    d_head: int = 64
    kv_share: int = 2  # query heads that share a key head, where the heads divide by it
    tokens_per_param: float = 20.0  # compute-optimal (Hoffmann et al. 2022, arXiv:2203.15556)
    batch_root: float = 1.3  # tokens a step = this x sqrt(all tokens), to a power of two: the critical batch grows so
    optimizer: str = "muon"  # LOG.md: 3.73 to 3.75 nats where AdamW has 4.21, same steps
    learning_rate: float = 0.01  # at rate_width; LOG.md: 8e-3 and 1.6e-2 differ by 0.02 nats
    rate_width: int = 256  # the rate falls with the square root of d_model above it
    schedule: str = "cosine"
    final_lr_fraction: float = 0.05
    warmup_share: float = 0.02  # of the steps
    weight_decay: float = 0.1
    micro_tokens: int = 8192  # at once on the device
    # Tokens a sequence, by depth up to which it holds.
    lengths: tuple[tuple[int, int], ...] = ((6, 256), (10, 512), (16, 1024), (LARGEST_DEPTH, 2048))


RECIPE = Recipe()


def sizes(depth: int, recipe: Recipe = RECIPE) -> dict[str, Any]:
    """The model's sizes at a depth. Raises ValueError for a depth that is none."""
    if type(depth) is not int or not 1 <= depth <= LARGEST_DEPTH:
        raise ValueError(
            f"depth={depth!r} must be a whole number from 1 to {LARGEST_DEPTH}; 4 to 8 suit a CPU, 12 to 20 a GPU"
        )
    d_model = recipe.width_a_layer * depth
    n_heads = max(1, d_model // recipe.d_head)
    return {
        "n_layers": depth,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_heads // recipe.kv_share if n_heads % recipe.kv_share == 0 else n_heads,
        "d_head": recipe.d_head,
        "d_ff": gated_width(d_model),
        "max_seq_len": next(length for most, length in recipe.lengths if depth <= most),
    }


def training(model: ModelConfig, n_tokens: float | None = None, recipe: Recipe = RECIPE) -> dict[str, Any]:
    """Steps, batch, rate and schedule for a model on so many tokens; None: compute-optimal."""
    tokens = recipe.tokens_per_param * model.n_active_params if n_tokens is None else n_tokens
    batch_tokens = 2 ** round(math.log2(recipe.batch_root * math.sqrt(tokens)))
    batch = max(1, batch_tokens // model.max_seq_len)
    return {
        "batch_size": batch,
        "micro_batch": max(1, min(batch, recipe.micro_tokens // model.max_seq_len)),
        "steps": max(1, round(tokens / (batch * model.max_seq_len))),
        "optimizer": recipe.optimizer,
        "learning_rate": recipe.learning_rate * min(1.0, math.sqrt(recipe.rate_width / model.d_model)),
        "schedule": recipe.schedule,
        "final_lr_fraction": recipe.final_lr_fraction,
        "warmup_steps": recipe.warmup_share,
        "weight_decay": recipe.weight_decay,
    }


def model_at(depth: int, vocab_size: int, recipe: Recipe = RECIPE) -> ModelConfig:
    """The model of a depth, with tied embeddings."""
    return ModelConfig(vocab_size, **sizes(depth, recipe))


def depth_settings(
    depth: int, *, vocab_size: int, given: Mapping[str, Any], n_tokens: float | None = None, recipe: Recipe = RECIPE
) -> dict[str, Any]:
    """All settings of a run at a depth; those that are given win.

    What follows from a given size follows it: other sizes as in with_sizes, batch and steps. Raises ValueError as it does.
    """
    own = {
        key: value for key, value in given.items() if key in ModelConfig.__dataclass_fields__ and key != "vocab_size"
    }
    model = with_sizes(model_at(depth, vocab_size, recipe), **own)
    of_model = {key: getattr(model, key) for key in sizes(depth, recipe)}
    return of_model | training(model, n_tokens, recipe) | dict(given)


def check_resumed_depth(depth: int | None, saved: Mapping[str, Any]) -> None:
    """Raise ValueError when a run is resumed with another depth than it was started with."""
    layers = (saved.get("model") or {}).get("n_layers")
    if depth is not None and depth != layers:
        raise ValueError(
            f"--resume goes on with the run's own model of {layers} layers, got --depth {depth}; leave it out"
        )
