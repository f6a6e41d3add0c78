"""Grouped products in Triton: a tile of rows never crosses a group's end, and finds its group itself.

    x, sorted by group   a a a a a | b b | c c c c c c c       BLOCK_M = 4
    tiles                [0     ][1] [2 ] [3     ][4   ]       a: 2 tiles, b: 1, c: 2

    grouped_product    out_n = x_n W_g^T     program = (tile, block of out); dx is the same kernel over W's transpose (strides)
    grouped_gradient   dW_g = sum over g's rows of dy_n^T x_n    program = (group, block of out, block of in)

How many tiles each group has stands in `ends`, on the device: each program adds the counts up to find its group and first row, so
that the host waits for nothing. The grid has N / BLOCK_M + G tiles, the most there can be; those that are left over end at once.
Sums are float32. Bytes: x and out once for every block of the other's columns, each W_g once for every tile of its rows. Saved: x,
W, ends. One program sums a whole dW block, in one order: the same bits in every run. PyTorch's grouped_mm stays the default where
it runs (bfloat16): which of the two is faster no GPU has measured yet.
"""

# pyright: reportGeneralTypeIssues=false
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import as_rows, cdiv, launch, next_power_of_2


@triton.jit
def group_of(tile, ends, G, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """The tile's group, its first row, one past the group's last row, and whether there is such a tile."""
    g = tl.arange(0, BLOCK_G)
    stop = tl.load(ends + g, mask=g < G, other=0)
    start = tl.load(ends + g - 1, mask=(g > 0) & (g < G), other=0)
    upto = tl.cumsum(tl.where(g < G, (stop - start + BLOCK_M - 1) // BLOCK_M, 0), 0)  # tiles of groups 0..g
    group = tl.sum((upto <= tile).to(tl.int32), 0)
    before = tl.max(tl.where(upto <= tile, upto, 0), 0)
    first = tl.sum(tl.where(g == group, start, 0), 0) + (tile - before) * BLOCK_M
    last = tl.sum(tl.where(g == group, stop, 0), 0)
    return group, first, last, tile < tl.max(upto, 0)


@triton.jit
def grouped_product(
    x, weight, ends, out, O, K, G, stride_x, stride_g, stride_o, stride_k, stride_out,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    group, first, last, exists = group_of(tl.program_id(0), ends, G, BLOCK_M, BLOCK_G)
    if exists:
        row = first + tl.arange(0, BLOCK_M)
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        k = tl.arange(0, BLOCK_K)
        x_tile = x + row.to(tl.int64)[:, None] * stride_x + k[None, :]
        w_tile = weight + group.to(tl.int64) * stride_g + o.to(tl.int64)[None, :] * stride_o + k[:, None] * stride_k
        total = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        for begin in range(0, K, BLOCK_K):
            inside = begin + k < K
            a = tl.load(x_tile, mask=(row < last)[:, None] & inside[None, :], other=0.0)
            b = tl.load(w_tile, mask=inside[:, None] & (o < O)[None, :], other=0.0)  # (BLOCK_K, BLOCK_O)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            x_tile += BLOCK_K
            w_tile += BLOCK_K * stride_k
        place = row.to(tl.int64)[:, None] * stride_out + o[None, :]
        tl.store(out + place, total, mask=(row < last)[:, None] & (o < O)[None, :])


@triton.jit
def grouped_gradient(
    grad, x, ends, out, O, K, stride_grad, stride_x,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    stop = tl.load(ends + group)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    for begin in range(start, stop, BLOCK_N):
        row = begin + n
        mine = row < stop
        wide = row.to(tl.int64)
        dy = tl.load(grad + wide[None, :] * stride_grad + o[:, None], mask=(o < O)[:, None] & mine[None, :], other=0.0)
        a = tl.load(x + wide[:, None] * stride_x + k[None, :], mask=mine[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(dy, a, total, input_precision=PRECISION)  # (BLOCK_O, BLOCK_N) x (BLOCK_N, BLOCK_K)
    place = (group.to(tl.int64) * O + o)[:, None] * K + k[None, :]
    tl.store(out + place, total, mask=(o < O)[:, None] & (k < K)[None, :])


def tiles(rows_per_group: int, itemsize: int) -> dict[str, int]:
    """Rows, columns and depth of a product's tile. Groups of few rows get low tiles: the rest of a tile is waste."""
    rows = min(128, max(16, next_power_of_2(rows_per_group)))
    return {"BLOCK_M": rows, "BLOCK_O": 128 if itemsize < 4 else 64, "BLOCK_K": 64 if itemsize < 4 else 32}


def precision(x: Tensor) -> str:
    """How tl.dot multiplies float32; other dtypes have one way."""
    return "tf32x3" if x.dtype is torch.float32 else "tf32"


def run_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x_n W_g^T for weight (G, O, K) of any strides."""
    (N, K), (G, O, _) = x.shape, weight.shape
    out = x.new_empty(N, O)
    tile = tiles(cdiv(N, G), x.element_size())
    if N and O:
        launch(
            grouped_product,
            (cdiv(N, tile["BLOCK_M"]) + G, cdiv(O, tile["BLOCK_O"])),
            *(x, weight, ends, out, O, K, G, x.stride(0), *weight.stride(), out.stride(0)),
            PRECISION=precision(x), **tile, BLOCK_G=next_power_of_2(G),
            num_warps=8 if tile["BLOCK_M"] == 128 else 4, num_stages=3,
        )  # fmt: skip
    return out


def run_gradient(grad: Tensor, x: Tensor, ends: Tensor, G: int) -> Tensor:
    """(G, O, K): the sums of dy_n^T x_n over each group's rows; zeros for an empty one."""
    O, K = grad.shape[1], x.shape[1]
    out = x.new_empty(G, O, K)
    block = 128 if x.element_size() < 4 else 64
    launch(
        grouped_gradient,
        (G, cdiv(O, block), cdiv(K, block)),
        *(grad, x, ends, out, O, K, grad.stride(0), x.stride(0)),
        PRECISION=precision(x), BLOCK_N=32, BLOCK_O=block, BLOCK_K=block, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


@torch.library.custom_op("graft::grouped_linear", mutates_args=())
def grouped_linear_op(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return run_product(as_rows(x), weight, ends)


@torch.library.custom_op("graft::grouped_linear_backward", mutates_args=())
def grouped_linear_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx and dW, empty where not needed."""
    grad = as_rows(grad)
    d_x = run_product(grad, weight.transpose(1, 2), ends) if need_x else x.new_empty(0)
    d_weight = run_gradient(grad, as_rows(x), ends, len(weight)) if need_weight else x.new_empty(0)
    return d_x, d_weight


@grouped_linear_op.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_linear_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    d_x = x.new_empty(x.shape if need_x else 0)
    return d_x, x.new_empty(weight.shape if need_weight else 0)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    needs = ctx.needs_input_grad
    d_x, d_weight = grouped_linear_backward_op(grad, x, weight, ends, needs[0], needs[1])
    return d_x if needs[0] else None, d_weight if needs[1] else None, None


grouped_linear_op.register_autograd(_backward, setup_context=_save)


def grouped_linear_triton(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same function as `grouped_linear_reference`."""
    return grouped_linear_op(x, weight, ends.to(torch.int32))
