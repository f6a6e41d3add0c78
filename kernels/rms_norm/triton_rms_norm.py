"""RMSNorm, alone or with the residual add, as one Triton kernel each way.

    h = x + residual,  rstd = 1 / sqrt(mean(h^2) + eps),  y = cast(h rstd) w
    with g = dy w:     dh = rstd g - h rstd^3 mean(g h) + (gradient that reaches h directly),   dw = sum over rows of dy h rstd

    forward:   one program takes BLOCK_N whole rows      (BLOCK_N, BLOCK_D), BLOCK_D >= D
    backward:  PROGRAMS per multiprocessor walk over the row tiles with that stride; each keeps its sum for dw in registers
               and writes it once to a (programs, D) table that torch adds up: no atomics, the same result on every run

Saved: h and rstd (N,) float32; sums in float32. Bytes: forward reads x (and the residual) and writes y (and h); backward
reads dy, h (and dh), writes dx, plus the table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import as_rows, cdiv, launch, multiprocessors, next_power_of_2, warps_for

TILE = 2048  # elements a program at least, so that short rows (q_norm's 64 or 128) share one; not measured yet (no GPU)
PROGRAMS = (
    4  # per multiprocessor in the backward pass, to have about 64 KB of loads in flight on each; not measured yet
)


@triton.jit
def rms_norm_forward(
    x, residual, weight, y, h_out, rstd_out, N, D, stride_x, stride_residual, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    keep = (row < N)[:, None] & (col < D)[None, :]
    h = tl.load(x + row[:, None] * stride_x + col[None, :], mask=keep, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual + row[:, None] * stride_residual + col[None, :], mask=keep, other=0.0).to(tl.float32)
        h = h.to(h_out.dtype.element_ty)  # the norm sees what the stream keeps
        tl.store(h_out + row[:, None] * D + col[None, :], h, mask=keep)
        h = h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, 1) / D + eps)
    tl.store(rstd_out + row, rstd, mask=row < N)
    w = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
    normed = (h * rstd[:, None]).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row[:, None] * D + col[None, :], normed * w[None, :], mask=keep)


@triton.jit
def rms_norm_backward(
    dy, dh, h, weight, rstd, dx, dw_table, N, D, stride_dy, stride_dh, stride_h,
    HAS_DH: tl.constexpr, NEED_DW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_D)
    w = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        row = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        keep = (row < N)[:, None] & (col < D)[None, :]
        grad = tl.load(dy + row[:, None] * stride_dy + col[None, :], mask=keep, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < N, other=0.0)[:, None]
        normed = tl.load(h + row[:, None] * stride_h + col[None, :], mask=keep, other=0.0).to(tl.float32) * r
        g = grad * w[None, :]
        out = r * (g - normed * (tl.sum(g * normed, 1) / D)[:, None])
        if HAS_DH:
            out += tl.load(dh + row[:, None] * stride_dh + col[None, :], mask=keep, other=0.0).to(tl.float32)
        tl.store(dx + row[:, None] * D + col[None, :], out, mask=keep)
        if NEED_DW:
            dw += grad * normed
    if NEED_DW:
        tl.store(dw_table + tl.program_id(0).to(tl.int64) * D + col, tl.sum(dw, 0), mask=col < D)


def tile(D: int) -> dict[str, int]:
    """Rows and columns of a program's tile, and its warps."""
    block_d = next_power_of_2(D)
    block_n = max(1, TILE // block_d)
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps_for(block_n * block_d)}


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor, h: Tensor | None) -> Tensor:
    """Fills y and h; returns rstd (N,)."""
    rows = as_rows(x)
    added = None if residual is None else as_rows(residual)
    N, D = rows.shape
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    if N:
        shape = tile(D)
        stride = 0 if added is None else added.stride(0)
        launch(
            rms_norm_forward,
            (cdiv(N, shape["BLOCK_N"]),),
            rows,
            added,
            weight,
            y,
            h,
            rstd,
            N,
            D,
            rows.stride(0),
            stride,
            eps,
            HAS_RESIDUAL=added is not None,
            **shape,
        )
    return rstd


@torch.library.custom_op("graft::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, forward(x, None, weight.contiguous(), eps, y, None)


@torch.library.custom_op("graft::add_rms_norm", mutates_args=())
def add_rms_norm_op(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    h = torch.empty_like(y)
    return y, h, forward(x, residual, weight.contiguous(), eps, y, h)


@torch.library.custom_op("graft::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of h and weight; the latter is empty unless wanted."""
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    grad, rows = as_rows(dy), as_rows(h)
    direct = None if dh is None else as_rows(dh)
    N, D = rows.shape
    shape = tile(D)
    programs = min(PROGRAMS * multiprocessors(h.device), cdiv(N, shape["BLOCK_N"]))
    table = torch.empty(programs if need_weight else 0, D, dtype=torch.float32, device=h.device)
    if N:
        strides = (grad.stride(0), 0 if direct is None else direct.stride(0), rows.stride(0))
        launch(
            rms_norm_backward, (programs,), grad, direct, rows, weight.contiguous(), rstd, dx, table, N, D, *strides,
            HAS_DH=direct is not None, NEED_DW=need_weight, **shape,
        )  # fmt: skip
    return dx, table.sum(0).to(weight.dtype) if need_weight else weight.new_empty(0)


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@add_rms_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@rms_norm_backward_op.register_fake
def _(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight) if need_weight else weight.new_empty(0)


def _save(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, dy: Tensor, d_rstd: Tensor) -> tuple[Tensor | None, ...]:
    need_weight = ctx.needs_input_grad[1]
    dx, dw = rms_norm_backward_op(dy, None, *ctx.saved_tensors, need_weight)
    return dx, dw if need_weight else None, None


def _save_add(ctx, inputs, output) -> None:
    x, residual, weight, _ = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight, output[2])


def _backward_add(ctx, dy: Tensor, dh: Tensor, d_rstd: Tensor) -> tuple[Tensor | None, ...]:
    need_weight = ctx.needs_input_grad[2]
    dx, dw = rms_norm_backward_op(dy, dh, *ctx.saved_tensors, need_weight)
    return dx.to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]), dw if need_weight else None, None


rms_norm_op.register_autograd(_backward, setup_context=_save)
add_rms_norm_op.register_autograd(_backward_add, setup_context=_save_add)


def rms_norm_triton(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    *,
    eps: float,
    residual: Tensor | None = None,  # (..., D)
) -> Tensor | tuple[Tensor, Tensor]:
    """The same function as `rms_norm_reference`."""
    if residual is None:
        return rms_norm_op(x, weight, eps)[0]
    return add_rms_norm_op(x, residual, weight, eps)[:2]
