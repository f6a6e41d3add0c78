"""Bytes of weights, gradients and optimizer state on one rank, by ZeRO stage."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StateBytes:
    """Bytes a parameter."""

    weight: int
    gradient: int
    optimizer: int


GRAFT = StateBytes(weight=4, gradient=4, optimizer=8)  # float32 throughout, AdamW's two moments
MIXED = StateBytes(weight=2, gradient=2, optimizer=12)  # float16 or bfloat16, a float32 copy with its moments


def zero_bytes(n_params: float, n_ranks: int, stage: int, state: StateBytes = GRAFT) -> float:
    """What one of n ranks holds of a model's state (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1 and table 1).

    Stage 1 divides the optimizer's state by the ranks, 2 the gradients too, 3 the weights too. Known value: 7.5e9 parameters
    in MIXED on 64 ranks take 120, 31.4, 16.6 and 1.88 GB at stages 0 to 3. Raises ValueError for another stage.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero={stage} must be 0, 1, 2 or 3")
    weight, gradient, optimizer = (
        n_bytes / (n_ranks if stage >= least else 1)
        for n_bytes, least in ((state.weight, 3), (state.gradient, 2), (state.optimizer, 1))
    )
    return n_params * (weight + gradient + optimizer)
