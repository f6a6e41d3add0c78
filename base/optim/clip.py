"""Gradient clipping by the global norm (Pascanu et al. 2013, arXiv:1211.5063, algorithm 1)."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def clip_gradients_(parameters: Iterable[Tensor], max_norm: float, *, norm: Tensor | None = None) -> Tensor:
    """Scale all gradients in place so that their joint 2-norm is at most max_norm (0: never); returns the norm before.

    norm: the joint norm, where these are only a part of the gradients that it is taken over.

    The norm is a float32 scalar tensor, so no device is waited for.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if norm is None:
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        joint = torch.linalg.vector_norm(torch.stack(norms))
    else:
        joint = norm
    if max_norm > 0:
        factor = (max_norm / (joint + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
    return joint
