"""4-bit weights to 16 or 32 bits: w = codebook[code] * absmax, one launch for both levels.

    program = ROWS blocks of block_size values    tile (ROWS, block_size / 2) bytes -> (ROWS, block_size) values

A byte's two values lie beside each other, so they are interleaved in registers and stored in order. The codebook is 16 floats
in one cache line: a lookup is a load that always hits. absmax of a block is decoded once a row of the tile:
nested_codebook[absmax_q] * absmax_scale + absmax_mean, without fused multiply-add, as bitsandbytes rounds it.

Bytes a weight: 0.5 + 1/64 (8-bit absmax) read, the output's width written. Nothing is accumulated.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch
from .weight import NESTED_BLOCK_SIZE, DoubleQuantized, PackedWeight

VALUES = (
    4096  # of a program: 32 a thread with 4 warps, two 16-byte stores of bfloat16; not measured yet (no GPU at hand)
)


@triton.jit
def block_scale(
    block, inside, absmax, absmax_scale, absmax_mean, nested_codebook, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr
):  # fmt: skip
    """absmax of each block in float32; `absmax` points to float32, or with NESTED to uint8."""
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(absmax_scale + block // NESTED_BLOCK, mask=inside, other=0.0)
        result = tl.load(nested_codebook + code) * scale + tl.load(absmax_mean)
    else:
        result = tl.load(absmax + block, mask=inside, other=0.0)
    return result


@triton.jit
def dequantize(
    packed, absmax, absmax_scale, absmax_mean, nested_codebook, codebook, out, n, n_blocks,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scale = block_scale(
        block, block < n_blocks, absmax, absmax_scale, absmax_mean, nested_codebook, NESTED, NESTED_BLOCK
    )
    byte = block.to(tl.int64)[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    pair = tl.load(packed + byte, mask=byte < (n + 1) // 2, other=0).to(tl.int32)
    high = tl.load(codebook + (pair >> 4)) * scale[:, None]
    low = tl.load(codebook + (pair & 15)) * scale[:, None]
    value = block.to(tl.int64)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(out + value, tl.interleave(high, low).to(out.dtype.element_ty), mask=value < n)


@triton.jit
def decode_absmax(
    absmax_q, absmax_scale, absmax_mean, nested_codebook, out, n_blocks, NESTED_BLOCK: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = block < n_blocks
    scale = block_scale(block, inside, absmax_q, absmax_scale, absmax_mean, nested_codebook, True, NESTED_BLOCK)
    tl.store(out + block, scale, mask=inside)


def pointers(scales: Tensor | DoubleQuantized) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The second level's four tensors, or absmax four times where there is none and the kernel reads the first alone."""
    return (scales, scales, scales, scales) if isinstance(scales, Tensor) else scales


def dequantize_4bit_triton(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The same function as reference.dequantize_4bit."""
    out = torch.empty(tuple(weight.shape), dtype=dtype, device=weight.packed.device)
    n, block_size = out.numel(), weight.block_size
    n_blocks, rows = cdiv(n, block_size), max(1, VALUES // block_size)
    launch(
        dequantize, (cdiv(n_blocks, rows),), weight.packed, *pointers(weight.scales), weight.codebook, out, n, n_blocks,
        NESTED=not isinstance(weight.scales, Tensor), NESTED_BLOCK=NESTED_BLOCK_SIZE, BLOCK_SIZE=block_size, ROWS=rows,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def dequantize_absmax_triton(
    absmax_q: Tensor, absmax_scale: Tensor, absmax_mean: Tensor, nested_codebook: Tensor
) -> Tensor:
    """The same function as reference.dequantize_absmax."""
    out = torch.empty(absmax_q.shape, dtype=torch.float32, device=absmax_q.device)
    n_blocks = absmax_q.numel()
    launch(
        decode_absmax, (cdiv(n_blocks, 1024),), absmax_q, absmax_scale, absmax_mean, nested_codebook, out, n_blocks,
        NESTED_BLOCK=NESTED_BLOCK_SIZE, SIZE=1024, enable_fp_fusion=False,
    )  # fmt: skip
    return out
