"""Linear layer + cross entropy in plain PyTorch: the definition, float32 inside, all logits at once."""

import torch
from torch import Tensor

from ..checks import accumulator


def linear_cross_entropy_reference(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Per token lse - logits[target] + z_loss * lse^2, with lse = logsumexp(logits) (z-loss: arXiv:2204.02311, section 5)."""
    dtype = accumulator(hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).T  # (N, V)
    lse = torch.logsumexp(logits, -1)  # (N,)
    keep = targets != ignore_index
    label = logits.gather(-1, targets.where(keep, 0).long().unsqueeze(-1)).squeeze(-1)
    losses = (lse - label + z_loss * lse.square()).where(keep, 0)
    if reduction == "none":
        return losses
    return losses.sum() / keep.sum().clamp(min=1) if reduction == "mean" else losses.sum()
