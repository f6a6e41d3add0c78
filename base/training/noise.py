"""Gradient noise scale: the batch above which more rows a step save few steps (McCandlish et al. 2018, arXiv:1812.06162).

The gradient of b labels is the true one G plus noise of covariance Sigma / b, so E|g_b|^2 = |G|^2 + tr(Sigma) / b. Two batch
sizes give both (appendix A.1): here a step's first micro-batch, whose gradient is there before the others are added, and the
whole step. Their ratio tr(Sigma) / |G|^2 is the noise scale, in labels; each is noisy and is averaged on its own.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..parallel.ranks import Ranks
from ..parallel.sharding import Sharding

NOISE_KEYS = ("gradient_square", "gradient_noise")  # of a line of metrics.jsonl: |G|^2 and tr(Sigma)


def square_norm(parameters: Iterable[Tensor]) -> float:
    """The squared 2-norm of all gradients together."""
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None], 2, dtype=torch.float32)
    return float(torch.stack(norms).square().sum())


def signal_and_noise(small_square: float, big_square: float, small: float, big: float) -> tuple[float, float]:
    """Unbiased estimates of |G|^2 and tr(Sigma) from the squared norms of mean gradients over `small` and `big` labels.

    arXiv:1812.06162, equations A.2 and A.3; each can be negative by chance. Needs small < big.
    """
    signal = (big * big_square - small * small_square) / (big - small)
    noise = (small_square - big_square) / (1 / small - 1 / big)
    return signal, noise


def noise_figures(
    part_square: float,  # of the gradient that this rank's first micro-batch gave to the mean over `total` labels
    part: int,  # its labels
    norm: float,  # of the whole gradient
    total: int,
    together: Ranks | Sharding,
) -> dict[str, float]:
    """A step's figures under NOISE_KEYS, averaged over ranks; none when a micro-batch has no label or all of them."""
    if not 0 < part < total:
        part_square, part = 0.0, 0
    small_square = part_square * (total / part) ** 2 if part else 0.0
    signal, noise = signal_and_noise(small_square, norm**2, part, total) if part else (0.0, 0.0)
    n, signal, noise = together.sum(1 if part else 0, signal, noise)
    return dict(zip(NOISE_KEYS, (signal / n, noise / n), strict=True)) if n else {}


def critical_batch(pairs: Sequence[tuple[float, float]], *, share: float = 0.5) -> float | None:
    """The noise scale in labels, from the mean signal and the mean noise of the last `share` of a run's measurements.

    None when there are none, or when they are so few that the mean signal isn't positive.
    """
    kept = pairs[int(len(pairs) * (1 - share)) :]
    signal, noise = (sum(pair[i] for pair in kept) for i in (0, 1))
    return noise / signal if kept and signal > 0 and noise > 0 else None
