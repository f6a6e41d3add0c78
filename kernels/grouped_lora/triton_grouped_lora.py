"""LoRA with an adapter per row in two launches, however many adapters there are (Punica, arXiv:2310.18547, section 4).

    shrink   y_n = x_n A_i^T                 program = (tile of rows, part of in)    -> (SPLITS, N, R) float32 partial sums
    expand   out_n = scale_i y_n B_i^T       program = (tile of rows, block of out)  i = rows[n]

A program walks over the distinct adapters of its rows and finds each one's matrices through a table of addresses: nothing is
gathered, padded or sorted, and every rank reads its own bytes only. A tile is one row while there are at most ROWWISE rows
(decoding: each row streams its adapter once, no tensor cores), else BLOCK_M neighbours (a prompt's rows have one adapter).
Two launches, not one: with one, every block of out would have to repeat the whole shrink.

Backward: dx is the same two kernels with A and B in each other's place, read transposed; with y and z_n = dy_n B_i,

    weight_gradient   dA_i = scale_i sum_n z_n^T x_n,   dB_i^T = scale_i sum_n y_n^T dy_n    program = (adapter, block of columns)

Saved: x; y is computed again. Sums are float32. Bytes: x, out and each adapter in use once a row (rowwise) or tile.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import as_rows, cdiv, launch, multiprocessors, next_power_of_2

ROWWISE = 128  # rows; none of these constants is measured yet (no GPU at hand)
TILE = 8192  # entries of A or B that a rowwise program holds at a time: 64 a thread with 4 warps
SPLITS = 8  # parts of in at most, so that few rows still fill the GPU


@triton.jit
def shrink(
    x, table, like, ranks, rows, sums, N, K, n_adapters, stride_x, per_split,
    TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, RANKS_OF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    adapter = tl.load(rows + row, mask=row < N, other=-1)
    r = tl.arange(0, BLOCK_R)
    begin = tl.program_id(1) * per_split
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    current = tl.min(tl.where(adapter >= 0, adapter, n_adapters), 0)
    while current < n_adapters:
        rank = tl.multiple_of(tl.load(ranks + current), RANKS_OF)
        matrix = tl.load(table + current).to(like.dtype)
        if ALIGNED:
            matrix = tl.multiple_of(matrix, 16)
        for start in range(0, per_split, BLOCK_K):  # per_split is a multiple of BLOCK_K
            k = begin + start + tl.arange(0, BLOCK_K)
            mine = (adapter == current)[:, None] & (k < K)[None, :]
            part = tl.load(x + row.to(tl.int64)[:, None] * stride_x + k[None, :], mask=mine, other=0.0)
            inside = (r < rank)[:, None] & (k < K)[None, :]
            at = k[None, :] * rank + r[:, None] if TRANSPOSED else r[:, None] * K + k[None, :]
            a = tl.load(matrix + at, mask=inside, other=0.0)  # (BLOCK_R, BLOCK_K)
            if BLOCK_M == 1:
                total += tl.sum(a.to(tl.float32) * part.to(tl.float32), 1)[None, :]
            else:
                total = tl.dot(part, tl.trans(a.to(part.dtype)), total, input_precision="ieee")
        current = tl.min(tl.where(adapter > current, adapter, n_adapters), 0)
    place = (tl.program_id(1) * N + row).to(tl.int64)[:, None] * BLOCK_R + r[None, :]
    tl.store(sums + place, total, mask=(row < N)[:, None])


@triton.jit
def expand(
    sums, table, like, ranks, scales, rows, out, N, O, n_adapters, n_splits,
    TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, RANKS_OF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    adapter = tl.load(rows + row, mask=row < N, other=-1)
    r = tl.arange(0, BLOCK_R)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    y = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for split in range(0, n_splits):
        place = (split * N + row).to(tl.int64)[:, None] * BLOCK_R + r[None, :]
        y += tl.load(sums + place, mask=(row < N)[:, None], other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    current = tl.min(tl.where(adapter >= 0, adapter, n_adapters), 0)
    while current < n_adapters:
        rank = tl.multiple_of(tl.load(ranks + current), RANKS_OF)
        matrix = tl.load(table + current).to(like.dtype)
        if ALIGNED:
            matrix = tl.multiple_of(matrix, 16)
        scaled = tl.where((adapter == current)[:, None], y * tl.load(scales + current), 0.0)
        inside = (o < O)[:, None] & (r < rank)[None, :]
        at = r[None, :] * O + o[:, None] if TRANSPOSED else o[:, None] * rank + r[None, :]
        b = tl.load(matrix + at, mask=inside, other=0.0)  # (BLOCK_O, BLOCK_R)
        if BLOCK_M == 1:
            total += tl.sum(b.to(tl.float32) * scaled, 1)[None, :]
        else:
            narrow = out.dtype.element_ty
            total = tl.dot(scaled.to(narrow), tl.trans(b.to(narrow)), total, input_precision="ieee")
        current = tl.min(tl.where(adapter > current, adapter, n_adapters), 0)
    place = row.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(out + place, total, mask=(row < N)[:, None] & (o < O)[None, :])


@triton.jit
def weight_gradient(
    sums, x, rows, scales, grads, N, C, stride_x, n_splits, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, N, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        mine = tl.load(rows + row, mask=row < N, other=-1) == i
        if tl.max(mine.to(tl.int32), 0) > 0:
            y = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
            for split in range(0, n_splits):
                place = (split * N + row).to(tl.int64)[:, None] * BLOCK_R + r[None, :]
                y += tl.load(sums + place, mask=mine[:, None], other=0.0)
            part = tl.load(
                x + row.to(tl.int64)[:, None] * stride_x + c[None, :], mask=mine[:, None] & (c < C)[None, :], other=0.0
            )
            total = tl.dot(tl.trans(y.to(part.dtype)), part, total, input_precision="ieee")
    place = (i * BLOCK_R + r).to(tl.int64)[:, None] * C + c[None, :]
    tl.store(grads + place, total * tl.load(scales + i), mask=(c < C)[None, :])


@lru_cache(maxsize=1024)
def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor on the device, copied there once: in a decoding loop they are the same at every token."""
    return torch.tensor(values, dtype=dtype, device=device)


def addresses(matrices: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """The table of the matrices' addresses, and whether all are multiples of 16 bytes."""
    pointers = tuple(m.data_ptr() for m in matrices)
    aligned = all(p % 16 == 0 for p in pointers)
    return on_device(pointers, torch.int64, matrices[0].device), aligned


class Ranks(NamedTuple):
    """The adapters' ranks as the kernels need them."""

    table: Tensor  # (n_adapters,) int32
    padded: int  # the width of the y tile: a power of two that holds every rank, at least the 16 that tl.dot takes
    multiple_of: int  # what divides every rank, at most 16: how far B's short rows can be read at once


def padded_rank(lora_a: Sequence[Tensor]) -> int:
    return max(16, next_power_of_2(max(a.shape[0] for a in lora_a)))


def ranks_of(lora_a: Sequence[Tensor]) -> Ranks:
    ranks = tuple(a.shape[0] for a in lora_a)
    return Ranks(on_device(ranks, torch.int32, lora_a[0].device), padded_rank(lora_a), gcd(16, *ranks))


def tiles(N: int, block_r: int) -> dict[str, int]:
    """Rows of a tile, columns of a step, and warps: the largest without spilled registers on sm_80 and sm_90 (ptxas)."""
    if N <= ROWWISE:
        return {"rows": 1, "cols": TILE // block_r, "num_warps": 4}
    if block_r <= 64:
        return {"rows": 64, "cols": 64, "num_warps": 4}  # 64 rows are the least that wgmma takes
    return {"rows": 64 if block_r == 128 else 32, "cols": 32, "num_warps": 8}


def run_shrink(x: Tensor, matrices: Sequence[Tensor], ranks: Ranks, rows: Tensor, transposed: bool) -> Tensor:
    """(SPLITS, N, block_r) partial sums of x_n A_i^T, for A_i (R_i, K), or (K, R_i) when transposed."""
    N, K = x.shape
    block_r = ranks.padded
    tile = tiles(N, block_r)
    steps = cdiv(K, tile["cols"])
    n_tiles = cdiv(N, tile["rows"])
    splits = max(1, min(SPLITS, steps, cdiv(2 * multiprocessors(x.device), max(1, n_tiles))))
    per_split = cdiv(steps, splits) * tile["cols"]
    splits = cdiv(K, per_split)
    sums = torch.empty(splits, N, block_r, dtype=torch.float32, device=x.device)
    table, aligned = addresses(matrices)
    if N:
        launch(
            shrink, (n_tiles, splits), x, table, matrices[0], ranks.table, rows, sums, N, K, len(matrices), x.stride(0), per_split,
            TRANSPOSED=transposed, ALIGNED=aligned, RANKS_OF=ranks.multiple_of, BLOCK_R=block_r,
            BLOCK_M=tile["rows"], BLOCK_K=tile["cols"], num_warps=tile["num_warps"],
        )  # fmt: skip
    return sums


def run_expand(
    sums: Tensor, matrices: Sequence[Tensor], ranks: Ranks, scales: Tensor, rows: Tensor, out: Tensor, transposed: bool
) -> None:
    """out_n = scale_i y_n B_i^T, for B_i (O, R_i), or (R_i, O) when transposed."""
    n_splits, N, block_r = sums.shape
    O = out.shape[1]
    tile = tiles(N, block_r)
    table, aligned = addresses(matrices)
    if N:
        launch(
            expand, (cdiv(N, tile["rows"]), cdiv(O, tile["cols"])), sums, table, matrices[0], ranks.table, scales, rows, out,
            N, O, len(matrices), n_splits,
            TRANSPOSED=transposed, ALIGNED=aligned, RANKS_OF=ranks.multiple_of, BLOCK_R=block_r,
            BLOCK_M=tile["rows"], BLOCK_O=tile["cols"], num_warps=tile["num_warps"],
        )  # fmt: skip


def run_weight_gradient(sums: Tensor, x: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    """(n_adapters, block_r, C): scale_i sum over i's rows of y_n^T x_n, in float32."""
    n_splits, N, block_r = sums.shape
    C, block_c = x.shape[1], 64
    grads = torch.empty(len(scales), block_r, C, dtype=torch.float32, device=x.device)
    launch(
        weight_gradient, (len(scales), cdiv(C, block_c)), sums, x, rows, scales, grads, N, C, x.stride(0), n_splits,
        BLOCK_N=32, BLOCK_C=block_c, BLOCK_R=block_r, num_warps=4 if block_r <= 64 else 8,
    )  # fmt: skip
    return grads


@torch.library.custom_op("graft::grouped_lora", mutates_args=())
def grouped_lora_op(
    x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], rows: Tensor, scales: Tensor
) -> Tensor:
    ranks = ranks_of(lora_a)
    out = x.new_empty(x.shape[0], lora_b[0].shape[0])
    sums = run_shrink(as_rows(x), lora_a, ranks, rows, transposed=False)
    run_expand(sums, lora_b, ranks, scales, rows, out, transposed=False)
    return out


@torch.library.custom_op("graft::grouped_lora_backward", mutates_args=())
def grouped_lora_backward_op(
    grad: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    rows: Tensor,
    scales: Tensor,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and for every adapter dA_i and dB_i^T padded to one rank (empty where not needed)."""
    ranks = ranks_of(lora_a)
    grad, x = as_rows(grad), as_rows(x)
    back = run_shrink(grad, lora_b, ranks, rows, transposed=True)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    run_expand(back, lora_a, ranks, scales, rows, dx, transposed=True)
    if not need_weights:
        return dx, back.new_empty(0), back.new_empty(0)
    sums = run_shrink(x, lora_a, ranks, rows, transposed=False)
    return dx, run_weight_gradient(back, x, rows, scales), run_weight_gradient(sums, grad, rows, scales)


@grouped_lora_op.register_fake
def _(x: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], rows: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], lora_b[0].shape[0])


@grouped_lora_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    rows: Tensor,
    scales: Tensor,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, block_r = len(lora_a), padded_rank(lora_a)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    d_a, d_b = (t.new_empty((n, block_r, t.shape[1]) if need_weights else 0, dtype=torch.float32) for t in (x, grad))
    return dx, d_a, d_b


def _save(ctx, inputs, output) -> None:
    x, lora_a, lora_b, rows, scales = inputs
    ctx.n = len(lora_a)
    ctx.save_for_backward(x, *lora_a, *lora_b, rows, scales)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | list[Tensor | None] | None, ...]:
    x, *matrices, rows, scales = ctx.saved_tensors
    lora_a, lora_b = matrices[: ctx.n], matrices[ctx.n :]
    need_weights = any(m.requires_grad for m in matrices)
    dx, d_a, d_b = grouped_lora_backward_op(grad, x, lora_a, lora_b, rows, scales, need_weights)
    if not need_weights:
        return dx, [None] * ctx.n, [None] * ctx.n, None, None
    grads_a = [d_a[i, : a.shape[0]].to(a.dtype) for i, a in enumerate(lora_a)]
    grads_b = [d_b[i, : b.shape[1]].T.to(b.dtype) for i, b in enumerate(lora_b)]
    return dx, grads_a, grads_b, None, None


grouped_lora_op.register_autograd(_backward, setup_context=_save)


def grouped_lora_triton(
    x: Tensor,  # (N, in)
    lora_a: Sequence[Tensor],  # n_adapters of (R_i, in)
    lora_b: Sequence[Tensor],  # n_adapters of (out, R_i)
    rows: Tensor,  # (N,)
    scales: Sequence[float] | Tensor,  # (n_adapters,)
) -> Tensor:
    """The same function as `grouped_lora_reference`."""
    if not isinstance(scales, Tensor):
        scales = on_device(tuple(scales), torch.float32, x.device)
    a, b = ([m.contiguous() for m in matrices] for matrices in (lora_a, lora_b))
    return grouped_lora_op(x, a, b, rows.to(torch.int32), scales.to(x.device, torch.float32))
