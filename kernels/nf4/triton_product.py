"""Products with a 4-bit weight that is decoded on its way into registers: QLoRA's forward, input gradient, and decoding.

    forward    y_m  = sum_i x_mi W_oi     program = (tile of rows of x, tile of out), walks over in
    backward   dx_m = sum_o dy_mo W_oi    program = (tile of rows of dy, tile of in), walks over out
    gemv       y_o  = sum_i W_oi x_i      program = (a few out, one row of x), walks over in; no tensor cores

The weight's tile (out, in) is unpacked in the same way for both directions: bytes (out, in / 2), looked up in the 16-float
codebook (one cache line), times absmax in float32, interleaved, rounded once to x's dtype as the dequantized weight would be;
the forward product then reads it transposed. The gemv multiplies in float32 and does not round the weight at all.
Sums are float32. Bytes a weight: 0.5 + 1/16 (absmax, decoded beforehand to float32 for the two products; the gemv reads its 8-bit
form, 1/64) for each tile of rows, so that at many rows dequantize + matmul is the better plan: see linear.FUSED_ROWS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import as_rows, cdiv, launch, next_power_of_2
from .triton_dequantize import block_scale, dequantize_absmax_triton, pointers
from .weight import NESTED_BLOCK_SIZE, DoubleQuantized, PackedWeight

GEMV_ROWS = 4  # rows of x up to which each one walks over the weight by itself; nothing here is measured yet (no GPU)
GEMV_OUT, GEMV_BYTES = 4, 512  # tile of a gemv program: 16 bytes a thread with 4 warps
TILE_M, TILE_N, TILE_K = 64, 64, 64  # rows, result's columns, summed


@triton.jit
def weight_tile(packed, absmax, codebook, row, byte, O, half, dtype, BLOCK_SIZE: tl.constexpr):
    """W[row, 2 byte : 2 byte + 2] as (rows, 2 bytes) values of `dtype`; zero outside."""
    inside = (row < O)[:, None] & (byte < half)[None, :]
    place = row.to(tl.int64)[:, None] * half + byte[None, :]
    pair = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax + place // (BLOCK_SIZE // 2), mask=inside, other=0.0)
    high = tl.load(codebook + (pair >> 4)) * scale
    low = tl.load(codebook + (pair & 15)) * scale
    return tl.interleave(high, low).to(dtype)


@triton.jit
def forward_product(
    x, packed, absmax, codebook, bias, y, M, O, K, stride_x, HAS_BIAS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (m < M)[:, None] & (k < K)[None, :]
        part = tl.load(x + m.to(tl.int64)[:, None] * stride_x + k[None, :], mask=inside, other=0.0)
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)
        w = weight_tile(packed, absmax, codebook, o, byte, O, K // 2, part.dtype, BLOCK_SIZE)  # (BLOCK_N, BLOCK_K)
        total = tl.dot(part, tl.trans(w), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(y + place, total, mask=(m < M)[:, None] & (o < O)[None, :])


@triton.jit
def backward_product(
    dy, packed, absmax, codebook, dx, M, O, K, stride_dy, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, O, BLOCK_K):
        o = start + tl.arange(0, BLOCK_K)
        inside = (m < M)[:, None] & (o < O)[None, :]
        part = tl.load(dy + m.to(tl.int64)[:, None] * stride_dy + o[None, :], mask=inside, other=0.0)
        w = weight_tile(packed, absmax, codebook, o, byte, O, K // 2, part.dtype, BLOCK_SIZE)  # (BLOCK_K, BLOCK_N)
        total = tl.dot(part, w, total, input_precision="ieee")
    place = m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dx + place, total, mask=(m < M)[:, None] & (k < K)[None, :])


@triton.jit
def gemv(
    x, packed, absmax, absmax_scale, absmax_mean, nested_codebook, codebook, bias, y, O, K, stride_x,
    HAS_BIAS: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    x += tl.program_id(1).to(tl.int64) * stride_x
    half = K // 2
    total = tl.zeros((BLOCK_O, BLOCK_B), tl.float32)
    for start in range(0, half, BLOCK_B):
        byte = start + tl.arange(0, BLOCK_B)
        inside = (o < O)[:, None] & (byte < half)[None, :]
        place = o.to(tl.int64)[:, None] * half + byte[None, :]
        pair = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
        block = place // (BLOCK_SIZE // 2)
        scale = block_scale(block, inside, absmax, absmax_scale, absmax_mean, nested_codebook, NESTED, NESTED_BLOCK)
        even = tl.load(x + 2 * byte, mask=byte < half, other=0.0).to(tl.float32)[None, :]
        odd = tl.load(x + 2 * byte + 1, mask=byte < half, other=0.0).to(tl.float32)[None, :]
        total += (tl.load(codebook + (pair >> 4)) * even + tl.load(codebook + (pair & 15)) * odd) * scale
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)
    tl.store(y + tl.program_id(1).to(tl.int64) * O + o, result, mask=o < O)


def tile(M: int) -> dict[str, int]:
    """The two products' tile; fewer rows while x has fewer, at least the 16 that tl.dot takes."""
    return {"BLOCK_M": min(TILE_M, max(16, next_power_of_2(M))), "BLOCK_N": TILE_N, "BLOCK_K": TILE_K}


def float_absmax(scales: Tensor | DoubleQuantized) -> Tensor:
    """The first level in float32."""
    return scales if isinstance(scales, Tensor) else dequantize_absmax_triton(*scales)


def forward_triton(
    x: Tensor,  # (..., in)
    bias: Tensor | None,  # (out,)
    weight: PackedWeight,  # (out, in)
) -> Tensor:  # (..., out)
    """x W^T + bias: one gemv for each of a few rows, else the tiled product."""
    rows, out_features = as_rows(x), weight.shape[0]
    M, K = rows.shape
    y = torch.empty(M, out_features, dtype=x.dtype, device=x.device)
    added, stride = y if bias is None else bias, rows.stride(0)
    common = {"HAS_BIAS": bias is not None, "BLOCK_SIZE": weight.block_size}
    if 0 < M <= GEMV_ROWS:
        block_b = min(GEMV_BYTES, next_power_of_2(max(16, K // 2)))
        launch(
            gemv, (cdiv(out_features, GEMV_OUT), M), rows, weight.packed, *pointers(weight.scales), weight.codebook, added, y,
            out_features, K, stride, NESTED=not isinstance(weight.scales, Tensor), NESTED_BLOCK=NESTED_BLOCK_SIZE,
            BLOCK_O=GEMV_OUT, BLOCK_B=block_b, **common,
        )  # fmt: skip
    elif M:
        shape = tile(M)
        grid = (cdiv(M, shape["BLOCK_M"]), cdiv(out_features, TILE_N))
        launch(
            forward_product, grid, rows, weight.packed, float_absmax(weight.scales), weight.codebook, added, y, M,
            out_features, K, stride, **common, **shape,
        )  # fmt: skip
    return y.view(*x.shape[:-1], out_features)


def backward_triton(grad: Tensor, weight: PackedWeight) -> Tensor:  # (..., out), (out, in) -> (..., in)
    """dy W."""
    rows, in_features = as_rows(grad), weight.shape[1]
    M, O = rows.shape
    dx = torch.empty(M, in_features, dtype=grad.dtype, device=grad.device)
    if M:
        shape = tile(M)
        grid = (cdiv(M, shape["BLOCK_M"]), cdiv(in_features, TILE_N))
        launch(
            backward_product, grid, rows, weight.packed, float_absmax(weight.scales), weight.codebook, dx, M, O,
            in_features, rows.stride(0), BLOCK_SIZE=weight.block_size, **shape,
        )  # fmt: skip
    return dx.view(*grad.shape[:-1], in_features)
