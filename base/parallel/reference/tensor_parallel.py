"""Linears whose matrix is spread over ranks (Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053, section 3).

    column   Y_r = X W_r^T: each rank has some of the outputs. X's gradient is summed over ranks.
    row      Y = sum_r X_r W_r^T: each rank has some of the inputs. The outputs are summed over ranks.

A column linear followed by a row linear (gate and up, then down; q, k, v, then o) needs one sum forward and one backward.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class CopyToRanks(torch.autograd.Function):
    """x forward; backward the sum of all ranks' gradients: f of the paper's figure 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class SumOverRanks(torch.autograd.Function):
    """The sum over ranks forward; backward the gradient as it is: g of the paper's figure 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return grad


class ColumnLinear(nn.Module):
    """This rank's part of the outputs of a linear: (..., in) -> (..., out / n)."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(own_part(whole.weight, 0, "out_features"))
        self.bias = None if whole.bias is None else nn.Parameter(own_part(whole.bias, 0, "out_features"))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(CopyToRanks.apply(x), self.weight, self.bias)


class RowLinear(nn.Module):
    """A linear of which this rank reads its part of the inputs: (..., in / n) -> (..., out), whole on every rank."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(own_part(whole.weight, 1, "in_features"))
        self.bias = (
            None if whole.bias is None else nn.Parameter(whole.bias.detach().clone())
        )  # added once, after the sum

    def forward(self, x: Tensor) -> Tensor:
        out = SumOverRanks.apply(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias


def own_part(tensor: Tensor, dim: int, name: str) -> Tensor:
    """This rank's slice of a tensor. Raises ValueError when the ranks don't divide it."""
    n, size = dist.get_world_size(), tensor.shape[dim]
    if size % n:
        fits = [k for k in range(1, min(size, 64) + 1) if size % k == 0]
        raise ValueError(f"{name}={size} is not divisible by {n} ranks; use {', '.join(map(str, fits))} ranks")
    return tensor.detach().chunk(n, dim)[dist.get_rank()].clone()
