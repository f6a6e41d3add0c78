"""The product with a 4-bit weight, whose gradient is the input's alone (QLoRA, arXiv:2305.14314, eq. 5 and 6)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import dequantize_4bit


class Linear4bit(torch.autograd.Function):
    """y = x W^T + bias. Neither W nor x is kept for the backward pass: it dequantizes W again and gives dy W."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,  # (..., in), any float: the product's dtype
        bias: Tensor | None,  # (out,) in x's dtype
        packed: Tensor,
        absmax: Tensor,
        codebook: Tensor,
        block_size: int,
        out_features: int,
        *nested: Tensor,
    ) -> Tensor:  # (..., out)
        ctx.block_size, ctx.shape = block_size, [out_features, x.shape[-1]]
        ctx.save_for_backward(packed, absmax, codebook, *nested)
        with without_autocast(x):
            weight = dequantize_4bit(packed, absmax, nested, codebook, block_size, ctx.shape, x.dtype)
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed, absmax, codebook, *nested = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            with without_autocast(grad):
                weight = dequantize_4bit(packed, absmax, nested, codebook, ctx.block_size, ctx.shape, grad.dtype)
                grad_x = grad @ weight
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return (grad_x, grad_bias, *[None] * (5 + len(nested)))


def linear_4bit(
    x: Tensor,  # (..., in), any float: the product's dtype
    packed: Tensor,  # (ceil(out * in / 2), 1) uint8
    absmax: Tensor,  # (n_blocks,) float32, or uint8 with the second level
    nested: tuple[Tensor, ...],  # absmax_scale, absmax_mean and the (256,) codebook; empty without the second level
    codebook: Tensor,  # (16,) float32
    bias: Tensor | None = None,  # (out,) in x's dtype
    *,
    block_size: int,
    out_features: int,
) -> Tensor:  # (..., out)
    """x times the transposed 4-bit weight; differentiable in x and bias."""
    return Linear4bit.apply(x, bias, packed, absmax, codebook, block_size, out_features, *nested)  # pyright: ignore


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast would cast x; meta tensors know no autocast."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """The product runs in x's dtype: the caller has cast x to what it wants, which autocast must not undo."""
    return torch.autocast(x.device.type, enabled=False) if autocast_is_on(x) else nullcontext()
