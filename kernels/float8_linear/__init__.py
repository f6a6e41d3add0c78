"""A linear layer whose three products, forward and both of backward, read float8 with one scale a tensor.

A float8 product has twice bfloat16's rate on Hopper; its cost is finding the scales: a pass over each tensor for its largest
value and one to convert it. Sums are float32. Arithmetic by torch._scaled_mm, which has a CPU form too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import BACKWARD, FORWARD, quantize

MULTIPLE = 16  # that each side of a product must be of


def float8_problem(device: torch.device | str) -> str | None:
    """Why float8 products don't pay on a device; None where they do."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"float8 products need a GPU from Hopper on, this is {device.type}"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"float8 products need a GPU from Hopper on, this is {torch.cuda.get_device_name(device)}"
    return None


def float8_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None = None,  # (out,)
) -> Tensor:
    """F.linear with float8 products, (..., out) bfloat16; in bfloat16 itself where a side is no multiple of 16.

    Forward rounds x and W to e4m3, backward the gradient to e5m2; gradients come in the dtypes of x and W.
    """
    flat = x.flatten(0, -2)
    if any(size % MULTIPLE for size in (*flat.shape, *weight.shape)):
        y = F.linear(flat.to(torch.bfloat16), weight.to(torch.bfloat16))
    else:
        y = _Float8Linear.apply(flat, weight)
    assert isinstance(y, Tensor)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.unflatten(0, x.shape[:-1])


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # (N, in), (out, in) -> (N, out)
        x8, x_scale = quantize(x, FORWARD)
        w8, w_scale = quantize(weight, FORWARD)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return _product(x8, w8.t(), x_scale, w_scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = quantize(gradients[0], BACKWARD)
        dx = _product(g8, _by_columns(w8), g_scale, w_scale)
        dw = _product(g8.t().contiguous(), _by_columns(x8), g_scale, x_scale)
        return dx.to(ctx.dtypes[0]), dw.to(ctx.dtypes[1])


def _by_columns(matrix: Tensor) -> Tensor:
    """The same matrix with its columns side by side in memory, as the second factor must be."""
    return matrix.t().contiguous().t()


def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16)
