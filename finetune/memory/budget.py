"""`memory_budget`: recompute as few layers as keep a step's predicted peak within it."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...base.model.config import ModelConfig
from ...base.run import TrainConfig
from .predict import predict_run
from .units import parse_bytes, say_bytes


def within_budget(config: ModelConfig, train: TrainConfig, device: str, **step: Any) -> TrainConfig:
    """The config with the fewest recomputed layers that fit; `step`: what predict_run wants to know beside. Prints what it chose.

    As it is where no budget is set. Raises ValueError for a budget that isn't met even with all layers recomputed.
    """
    if not train.memory_budget:
        return train
    budget = parse_bytes(train.memory_budget)
    options = {"method": "full", "seq_len": config.max_seq_len, "optimizer": train.optimizer, **step}

    def peak(n: int) -> int:
        return predict_run(config, train=recomputing(train, n), device=device, **options)

    n, n_bytes = fewest(peak, config.n_layers, budget)
    if n_bytes > budget:
        raise ValueError(
            f"memory_budget={train.memory_budget}: with all {config.n_layers} layers recomputed the predicted peak is "
            f"{say_bytes(n_bytes)}; lower micro_batch or the sequence length, or raise the budget"
        )
    print(f"memory_budget={train.memory_budget}: {n} of {config.n_layers} layers are recomputed", file=sys.stderr)
    return recomputing(train, n)


def recomputing(train: TrainConfig, n: int) -> TrainConfig:
    """The config with the first n layers recomputed."""
    return replace(train, checkpointing=n > 0, recompute_layers=n if n else None)


def fewest(peak: Callable[[int], int], most: int, budget: int) -> tuple[int, int]:
    """(n, peak(n)) of the smallest n in [0, most] with peak(n) <= budget, of `most` where there is none. peak falls with n."""
    low, high, at_high = 0, most, peak(most)  # the answer lies in [low, high]
    while low < high and at_high <= budget:
        middle = (low + high) // 2
        n_bytes = peak(middle)
        if n_bytes <= budget:
            high, at_high = middle, n_bytes
        else:
            low = middle + 1
    return high, at_high
