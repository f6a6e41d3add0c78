"""The product with a 4-bit weight, whose gradient is the input's alone (QLoRA, arXiv:2305.14314, eq. 5 and 6)."""

from contextlib import AbstractContextManager, nullcontext
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import Backend, choose_backend, predicted_device, sampled
from . import reference
from .ops import dequantize_4bit
from .weight import NESTED_BLOCK_SIZE, PackedWeight, check_block_size

# Weights that the CPU dequantizes at a time: 16 MiB of float32. Above 32 MiB each allocation is made of fresh pages, whose first
# touch costs more than the dequantization (4096 x 4096: 34 ms instead of 5, in huge pages 9), and peak memory grows for nothing.
TILE = 2**22
FUSED_ROWS = 256  # rows of x up to which a GPU should gain by decoding the weight in registers; not measured yet (no GPU at hand)


class Linear4bit(torch.autograd.Function):
    """y = x W^T + bias. Neither W nor x is kept for the backward pass: it dequantizes W again and gives dy W."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,  # (..., in), any float: the product's dtype
        bias: Tensor | None,  # (out,) in x's dtype
        block_size: int,
        shape: tuple[int, int],
        fused: bool,  # by Triton's products, else by dequantizing and PyTorch's
        *tensors: Tensor,  # of the PackedWeight
    ) -> Tensor:  # (..., out)
        ctx.block_size, ctx.shape, ctx.fused = block_size, shape, fused
        ctx.save_for_backward(*tensors)
        if fused:
            return torch.ops.graft.linear_4bit.default(x, bias, tensors, block_size, shape)
        weight, parts = PackedWeight.of(tensors, block_size, shape), []
        with without_autocast(x):
            end = 0
            for rows in sampled(row_tiles(shape, block_size, x.device)):
                if rows.start > end:  # a prediction: of the tiles between, only what they leave behind counts
                    parts.append(x.new_empty(*x.shape[:-1], rows.start - end))
                end = rows.stop
                tile = dequantize_4bit(rows_of(weight, rows), x.dtype)
                parts.append(F.linear(x, tile, None if bias is None else bias[rows]))
                del tile  # before the next one is made
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0] and ctx.fused:
            grad_x = torch.ops.graft.linear_4bit_gradient.default(grad, tensors, ctx.block_size, ctx.shape)
        elif ctx.needs_input_grad[0]:
            weight = PackedWeight.of(tensors, ctx.block_size, ctx.shape)
            with without_autocast(grad):
                for rows in sampled(row_tiles(ctx.shape, ctx.block_size, grad.device)):
                    tile = dequantize_4bit(rows_of(weight, rows), grad.dtype)
                    part = grad[..., rows] @ tile
                    # several parts are summed in float32 at least
                    grad_x = (
                        part if grad_x is None else part + grad_x.to(torch.promote_types(grad.dtype, torch.float32))
                    )
                    del tile
                grad_x = None if grad_x is None else grad_x.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return (grad_x, grad_bias, *[None] * (3 + len(tensors)))


def linear_4bit(
    x: Tensor,  # (..., in), any float: the product's dtype
    weight: PackedWeight,  # of shape (out, in)
    bias: Tensor | None = None,  # (out,) in x's dtype
    *,
    backend: Backend = "auto",
) -> Tensor:  # (..., out)
    """x times the transposed 4-bit weight; differentiable in x and bias.

    `torch`: dequantize (Numba on the CPU, Triton on a GPU), then PyTorch's product; `triton`: the weight is decoded inside the
    product. `auto` on a GPU takes the second up to FUSED_ROWS rows. Raises ValueError where an explicit backend can't run.
    """
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(
            f"x has {x.shape[-1]} features on its last axis; the weight {(out_features, in_features)} takes {in_features}"
        )
    check_block_size(weight.block_size, even=True)
    if backend == "auto" and x.numel() > FUSED_ROWS * in_features:
        backend = "torch"
    unsupported = (
        f"two values share a byte, so in_features must be even, got {in_features}" if in_features % 2 else None
    )
    chosen = choose_backend("nf4", backend, (x,), unsupported=unsupported)
    if chosen == "reference":
        return F.linear(x, reference.dequantize_4bit(weight, x.dtype), bias)
    shape, fused = (out_features, in_features), chosen == "triton"
    return Linear4bit.apply(x, bias, weight.block_size, shape, fused, *weight.tensors)  # pyright: ignore


def row_tiles(shape: tuple[int, int], block_size: int, device: torch.device) -> list[slice]:
    """The weight's rows (out) in tiles of at most TILE weights on the CPU, whole elsewhere.

    A tile starts where a scale of the second level starts, so that it is a weight of its own.
    """
    out_features, in_features = shape
    unit = block_size * NESTED_BLOCK_SIZE
    aligned = unit // gcd(unit, in_features)  # rows from one possible start to the next
    step = max(1, TILE // in_features // aligned) * aligned
    if (predicted_device() or device.type) != "cpu" or step >= out_features:
        return [slice(0, out_features)]
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]


def rows_of(weight: PackedWeight, rows: slice) -> PackedWeight:
    """Some rows of a weight (out, in), given by one of row_tiles, as a weight of its own; nothing is copied."""
    out_features, in_features = weight.shape
    if rows.stop - rows.start == out_features:
        return weight
    first, last = rows.start * in_features, rows.stop * in_features
    blocks = slice(first // weight.block_size, -(-last // weight.block_size))
    scales = weight.scales
    if isinstance(scales, Tensor):
        scales = scales[blocks]
    else:
        unit = weight.block_size * NESTED_BLOCK_SIZE
        nested = scales.absmax_scale[first // unit : -(-last // unit)]
        scales = scales._replace(absmax_q=scales.absmax_q[blocks], absmax_scale=nested)
    packed = weight.packed[first // 2 : (last + 1) // 2]
    return weight._replace(packed=packed, scales=scales, shape=(rows.stop - rows.start, in_features))


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast would cast x; meta tensors know no autocast."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """The product runs in x's dtype: the caller has cast x to what it wants, which autocast must not undo."""
    return torch.autocast(x.device.type, enabled=False) if autocast_is_on(x) else nullcontext()
