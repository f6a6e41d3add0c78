"""RMSNorm in plain PyTorch: the definition, float32 inside."""

import torch
from torch import Tensor

from ..checks import accumulator


def rms_norm_reference(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    *,
    eps: float,
    residual: Tensor | None = None,  # (..., D)
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""
    h = x if residual is None else x + residual
    h32 = h.to(accumulator(h.dtype))
    rstd = torch.rsqrt(h32.square().mean(-1, keepdim=True) + eps)  # (..., 1)
    normed = (h32 * rstd * weight.to(h32.dtype)).to(h.dtype)
    return normed if residual is None else (normed, h)
