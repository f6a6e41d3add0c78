"""Norms as modules: RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.rms_norm import rms_norm
from .config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean is taken in float32."""

    ROLES: ClassVar = {"weight": "gain"}

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    @property
    def gain(self) -> Tensor:
        """What the normalized values are multiplied by, (size,)."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return rms_norm(x, self.gain, eps=self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize x + residual and return it with the sum: (normed, x + residual), one pass over memory."""
        return rms_norm(x, self.gain, eps=self.eps, residual=residual)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm that multiplies by 1 + weight, so that weights of 0 change nothing and decay draws towards that (Gemma's)."""

    ROLES: ClassVar = {"weight": "offset"}

    @property
    def gain(self) -> Tensor:
        """1 + weight in float32, whatever the weight's dtype: half precision would round the sum."""
        return 1.0 + self.weight.float()


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al. 2016, arXiv:1607.06450, eq. 4)."""

    ROLES: ClassVar = {"weight": "gain", "bias": "bias"}

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size), in x's dtype."""
        size = self.weight.shape
        if x.dtype == self.weight.dtype:
            return F.layer_norm(x, size, self.weight, self.bias, self.eps)
        return F.layer_norm(x.float(), size, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """As RMSNorm.add."""
        total = x + residual
        return self(total), total


def norm(config: ModelConfig, size: int) -> Any:
    """The config's kind of norm over `size` values."""
    if config.layer_norm:
        return LayerNorm(size, config.norm_eps)
    return (OffsetRMSNorm if config.offset_norm else RMSNorm)(size, config.norm_eps)
