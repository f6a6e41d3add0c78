"""DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5): W' = m (W + scale B A) / ||W + scale B A||, norms over each output's row.

The magnitude m (out,) trains beside A and B and starts as the rows' norms of W. The norm in the denominator is a constant to
the gradient (section 4.3). It is computed without the sum W + scale B A in memory:

    ||w_i + s (B A)_i||^2 = ||w_i||^2 + 2 s b_i . (A w_i) + s^2 b_i (A A^T) b_i

where A W^T is the base's own product with R more rows, so that a 4-bit base is never held in full.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .low_rank import apply_update, weight_of, without_bias

SMALLEST = 1e-30  # of a row's norm: a row of zeros gives zeros
LARGEST = 1e4  # of m / norm: a row whose update cancels it would grow without bound


class DoRA(nn.Module):
    """One adapter's update of one linear: direction by A and B, magnitude by m."""

    ROLES: ClassVar = {"lora_a": "adapter", "lora_b": "adapter", "magnitude": "gain"}
    stacks: ClassVar[bool] = False
    base_squares: Tensor  # (out,) float32: ||w_i||^2

    def __init__(
        self,
        base: nn.Module,  # the linear that is adapted; read, not kept
        lora_a: Tensor,  # (R, in)
        lora_b: Tensor,  # (out, R)
        scale: float,
        magnitude: Tensor | None = None,  # (out,); None: the rows' norms, so that B = 0 is the base
        *,
        dropout: float = 0.0,
        trained: bool,
    ) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(lora_a, requires_grad=trained)
        self.lora_b = nn.Parameter(lora_b, requires_grad=trained)
        self.scale, self.dropout = scale, dropout
        squares = weight_of(base).square().sum(1)
        self.register_buffer("base_squares", squares.to(lora_a.device), persistent=False)
        start = self.base_squares.sqrt() if magnitude is None else magnitude
        self.magnitude = nn.Parameter(start.to(lora_a.device), requires_grad=trained)
        self._factor: Tensor | None = None  # of a frozen adapter, computed on its first call

    @torch.no_grad()
    def norms(self, base: nn.Module, dtype: torch.dtype) -> Tensor:
        """||w_i + s (B A)_i||, (out,) float32; `dtype` is one that the base takes."""
        a, b = self.lora_a.float(), self.lora_b.float()
        along = without_bias(base, self.lora_a.to(dtype)).T.float()  # (out, R)
        squares = self.base_squares.float() + 2 * self.scale * (along * b).sum(1)
        squares = squares + self.scale**2 * ((b @ (a @ a.T)) * b).sum(1)
        return squares.clamp(min=0).sqrt().clamp(min=SMALLEST)

    def factor(self, base: nn.Module, dtype: torch.dtype) -> Tensor:
        """m / norm, (out,) in float32 or m's dtype."""
        if not self.magnitude.requires_grad and self._factor is not None:
            return self._factor
        norms = torch.maximum(self.norms(base, dtype), self.magnitude.detach().abs().float() / LARGEST)
        factor = self.magnitude / norms
        if not self.magnitude.requires_grad:
            self._factor = factor.detach()
        return factor

    def apply_to(self, base: nn.Module, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). With dropout the base's part stays whole, as in PEFT: only what is added sees it."""
        factor = self.factor(base, x.dtype)
        if self.dropout and self.training:
            dropped = F.dropout(x, self.dropout)
            out = base(x)
            low = F.linear(F.linear(dropped.to(out.dtype), self.lora_a.to(out.dtype)), self.lora_b.to(out.dtype))
            factor = factor.to(out.dtype)
            return out + (factor - 1) * without_bias(base, dropped) + factor * self.scale * low
        out = apply_update(base, x, None, self.lora_a, self.lora_b, self.scale)
        bias = getattr(base, "bias", None)
        if bias is None:
            return out * factor.to(out.dtype)
        bias = bias.to(out.dtype)
        return (out - bias) * factor.to(out.dtype) + bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DoRA":
        """As nn.Module's; the kept factor is out of date."""
        super()._apply(fn, recurse)
        self._factor = None
        return self


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """W' (out, in) float32 from W (out, in)."""
    directed = weight.float() + scale * (b.float() @ a.float())
    norms = torch.linalg.vector_norm(directed, dim=1).clamp(min=SMALLEST)
    return directed * (magnitude.float() / norms)[:, None]
