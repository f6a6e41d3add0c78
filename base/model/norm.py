"""RMSNorm as a module (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean is taken in float32."""

    ROLES: ClassVar = {"weight": "gain"}

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return rms_norm(x, self.weight, eps=self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize x + residual and return it with the sum: (normed, x + residual), one pass over memory."""
        return rms_norm(x, self.weight, eps=self.eps, residual=residual)
