"""The loops that dequantize on the CPU: with simd.py's instructions, and for processors without them.

They take tensors by address: making numpy arrays of eight of them takes as long as a weight of 512 x 384. What they write
is told by `like`, an empty array: float32, or uint16 and int16 for the bits of bfloat16 and float16. They are two loops and
not one with a choice, since all that a loop holds is compiled, and LLVM aborts on instructions that the processor lacks.
"""

import numpy as np
from numba import carray

from ..numba_jit import compiled
from ..numba_memory import pointer
from .simd import NAN_BITS, STEP, decode_blocks

BATCH = 256  # blocks whose scales are decoded at a time


@compiled(nogil=True)
def dequantize_avx2(packed, codebook, absmax, scale, mean, nested_codebook, n_blocks, block_size, out, like):
    """Whole blocks, of a multiple of 64 values."""
    scales = _scales(absmax, scale, mean, nested_codebook, n_blocks)
    codes, values, target = _arrays(packed, codebook, n_blocks * block_size, out, like)
    batch, half = np.empty(BATCH, np.float32), block_size // 2
    for first in range(0, n_blocks, BATCH):
        n = _take_scales(batch, first, n_blocks, scales)
        decode_blocks(codes, first * half, n, half // STEP, values, batch, target)


@compiled(nogil=True)
def dequantize_any(packed, codebook, absmax, scale, mean, nested_codebook, n_blocks, block_size, out, like):
    """Whole blocks of any even size, to float32 or bfloat16: 16 products a block, then lookups."""
    scales = _scales(absmax, scale, mean, nested_codebook, n_blocks)
    codes, values, target = _arrays(packed, codebook, n_blocks * block_size, out, like)
    half = block_size // 2
    products, scaled = np.empty(16, np.float32), np.empty(16, like.dtype)
    bits = products.view(np.uint32)
    for b in range(n_blocks):
        largest = _scale(b, *scales)
        for k in range(16):
            products[k] = values[k] * largest
            if like.itemsize == 4:
                scaled[k] = products[k]
            elif products[k] != products[k]:
                scaled[k] = NAN_BITS
            else:  # to nearest even
                scaled[k] = (bits[k] + np.uint32(0x7FFF) + (bits[k] >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        for i in range(b * half, (b + 1) * half):
            target[2 * i] = scaled[codes[i] >> 4]
            target[2 * i + 1] = scaled[codes[i] & 15]


@compiled(nogil=True)
def _arrays(packed, codebook, n, out, like):
    """The codes, the codebook and the n results behind their addresses."""
    return (
        carray(pointer(packed), n // 2, np.uint8),
        carray(pointer(codebook), 16, np.float32),
        carray(pointer(out), n, like.dtype),
    )


@compiled(nogil=True)
def _scale(b, absmax, absmax_q, scale, mean, nested_codebook, nested):
    """The absmax of block b; the second level as numba_cpu._dequantize_absmax does it."""
    if nested:
        return nested_codebook[absmax_q[b]] * scale[b >> 8] + mean[0]
    return absmax[b]


@compiled(nogil=True)
def _take_scales(batch, first, n_blocks, scales):
    """The scales of up to BATCH blocks, and how many they are."""
    n = min(BATCH, n_blocks - first)
    for b in range(n):
        batch[b] = _scale(first + b, *scales)
    return n


@compiled(nogil=True)
def _scales(absmax, scale, mean, nested_codebook, n_blocks):
    """The arguments of _scale behind the block, from addresses; no second level is a nested codebook at 0."""
    return (
        carray(pointer(absmax), n_blocks, np.float32),
        carray(pointer(absmax), n_blocks, np.uint8),
        carray(pointer(scale), (n_blocks + 255) >> 8, np.float32),
        carray(pointer(mean), 1, np.float32),
        carray(pointer(nested_codebook), 256, np.float32),
        nested_codebook != 0,
    )
