"""The blockwise formats on the CPU, compiled by Numba: one pass over memory, no temporaries of the weight's size (but
for float16 weights, and for float16 results where simd.py has no instructions for the processor or the block).

Equal to reference.py to the bit. The loops read and write by address: what they take has been checked, by ops.py or here. Imported
when the first CPU tensor is quantized (Numba's import takes 0.3 s), compiled on first use, cached beside this file.
`python bench/quant.py` measures it beside bitsandbytes.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from .. import huge_pages
from ..dispatch import name_of
from ..numba_jit import compiled
from ..numba_memory import pointer
from . import reference
from .numba_dequantize import dequantize_any, dequantize_avx2
from .simd import STEP, uses_avx2
from .weight import NESTED_BLOCK_SIZE, PackedWeight, check_packed

SMALLEST_SCALE = np.float32(reference.SMALLEST_SCALE)
NOT_FINITE = np.uint32(0x7F800000)  # float32 bits from here on are infinity and NaN
MAGNITUDE = np.uint32(0x7FFFFFFF)
ONE, HALF = np.float32(1), np.float32(0.5)
PART = 2**19  # weights a thread: 30 us of dequantization, about what handing it over costs
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIKE = {dtype: np.empty(0, bits) for dtype, bits in zip(DTYPES, (np.float32, np.uint16, np.int16), strict=True)}


def quantize_4bit(weight: Tensor, codebook: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """reference.quantize_4bit."""
    flat = weight.detach().reshape(-1).contiguous().resolve_neg()  # both by address below
    flat = flat.float() if flat.dtype == torch.float16 else flat
    n, n_blocks = flat.numel(), -(-flat.numel() // block_size)
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(n_blocks, dtype=torch.float32, device="cpu")
    middle, order = midpoints(flat_memory(codebook).tobytes())

    def part(first: int, last: int) -> bool:
        start = first * block_size
        return _quantize_blocks(
            flat.data_ptr() + start * flat.element_size(),
            packed.data_ptr() + start // 2,
            absmax.data_ptr() + 4 * first,
            min(last * block_size, n) - start,
            block_size,
            middle,
            order,
            DTYPES.index(flat.dtype),
        )

    if not all(in_parts(part, n_blocks, block_size)):
        raise ValueError(reference.not_finite(weight))
    return packed, absmax


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """reference.dequantize_4bit, for one of DTYPES."""
    tensors = check_packed(weight)
    out = huge_pages.empty(weight.shape, dtype)
    _dequantize(out, weight, tensors)
    return out


def dequantize_4bit_(out: Tensor, weight: PackedWeight) -> None:
    """reference.dequantize_4bit into `out`, contiguous and of one of DTYPES."""
    tensors, n = check_packed(weight), prod(weight.shape)
    if not (out.is_cpu and out.is_contiguous() and out.dtype in LIKE and out.numel() == n):
        raise ValueError(
            f"out: expected {n} values in contiguous CPU memory, got {out.numel()} {name_of(out.dtype)} on {out.device} "
            f"with strides {out.stride()}"
        )
    _dequantize(out, weight, tensors)


def _dequantize(out: Tensor, weight: PackedWeight, tensors: list[Tensor]) -> None:
    """dequantize_4bit_ after its checks."""
    n, block_size = out.numel(), weight.block_size
    if not n:
        return
    n_blocks = n // block_size  # whole ones
    tensors = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
    addresses = [tensor.data_ptr() for tensor in tensors]  # valid for as long as `tensors` lives
    if 0 in addresses or not out.data_ptr():
        raise ValueError("a fake tensor has no memory to read; use dequantize_4bit, which knows its shape")
    addresses += [0] * (6 - len(addresses))  # no second level
    if uses_avx2() and block_size % (2 * STEP) == 0:
        _run(dequantize_avx2, addresses, n_blocks, block_size, out)
    elif out.dtype != torch.float16:
        _run(dequantize_any, addresses, n_blocks, block_size, out)
    else:
        exact = torch.empty(n_blocks * block_size, device="cpu")
        _run(dequantize_any, addresses, n_blocks, block_size, exact)
        out.view(-1)[: len(exact)] = exact
    first = n_blocks * block_size
    if first < n:  # the last block is shorter
        absmax = weight.scales if isinstance(weight.scales, Tensor) else dequantize_absmax(*weight.scales)
        rest = weight._replace(packed=weight.packed.reshape(-1)[first // 2 :], scales=absmax[-1:], shape=(n - first,))
        out.view(-1)[first:] = reference.dequantize_4bit(rest, out.dtype)


def _run(loop: Any, addresses: list[int], n_blocks: int, block_size: int, out: Tensor) -> None:
    """A dequantizing loop over all whole blocks, in threads where they pay."""
    start, like, size = out.data_ptr(), LIKE[out.dtype], out.element_size()
    if n_blocks * block_size < 2 * PART:
        loop(*addresses, n_blocks, block_size, start, like)
        return
    packed, codebook, absmax, scale, mean, nested_codebook = addresses

    def part(first: int, last: int) -> None:  # `first` is a multiple of 256: there a scale of the second level begins
        values = first * block_size
        level1, level2 = (absmax + first, scale + first // 64) if scale else (absmax + 4 * first, 0)
        rest = mean, nested_codebook, last - first, block_size, start + values * size, like
        loop(packed + values // 2, codebook, level1, level2, *rest)

    in_parts(part, n_blocks, block_size)


def in_parts(part: Callable[[int, int], Any], n_blocks: int, block_size: int) -> list[Any]:
    """part(first block, last block) over all blocks, on as many threads as torch uses, which have PART weights at least."""
    n_parts = min(torch.get_num_threads(), n_blocks * block_size // PART)
    if n_parts <= 1:
        return [part(0, n_blocks)]
    step = -(-n_blocks // n_parts // 256) * 256
    bounds = [(first, min(first + step, n_blocks)) for first in range(0, n_blocks, step)]
    return list(threads(torch.get_num_threads(), os.getpid()).map(lambda bound: part(*bound), bounds))


@cache
def threads(n: int, process: int) -> ThreadPoolExecutor:
    """The process's own pool: a forked child can't use its parent's."""
    del process
    return ThreadPoolExecutor(n)


def quantize_absmax(shifted: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """reference.quantize_8bit_by_table at bitsandbytes' block of 256."""
    flat = flat_memory(shifted.float())
    codes = torch.empty(shifted.shape, dtype=torch.uint8, device="cpu")
    scale = torch.empty(-(-len(flat) // NESTED_BLOCK_SIZE), dtype=torch.float32, device="cpu")
    lookup = table(flat_memory(codebook).tobytes())
    _quantize_by_table(flat, lookup, NESTED_BLOCK_SIZE, codes.view(-1).numpy(), scale.numpy())
    return codes, scale


def dequantize_absmax(absmax_q: Tensor, absmax_scale: Tensor, absmax_mean: Tensor, nested_codebook: Tensor) -> Tensor:
    """reference.dequantize_absmax."""
    out = torch.empty(absmax_q.shape, dtype=torch.float32, device="cpu")
    tensors = (absmax_q, absmax_scale, absmax_mean, nested_codebook)
    _dequantize_absmax(*(flat_memory(tensor) for tensor in tensors), out.view(-1).numpy())
    return out


def quantize_8bit(values: Tensor, bounds: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """reference.quantize_8bit."""
    flat, limits = flat_memory(values.float()), flat_memory(bounds)
    codes = torch.empty(values.shape, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-len(flat) // block_size), dtype=torch.float32, device="cpu")
    start = first_guess(limits.tobytes())
    _quantize_8bit(flat, limits, start, block_size, codes.view(-1).numpy(), absmax.numpy())
    return codes, absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, *, block_size: int) -> Tensor:
    """reference.dequantize_8bit."""
    out = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    arrays = (flat_memory(tensor) for tensor in (codes, absmax, codebook))
    _dequantize_8bit(*arrays, block_size, out.view(-1).numpy())
    return out


def flat_memory(tensor: Tensor) -> np.ndarray:
    """The values as one contiguous array; copied only if they aren't contiguous already."""
    return tensor.detach().reshape(-1).contiguous().resolve_neg().numpy()


@cache
def midpoints(codebook: bytes) -> tuple[np.ndarray, np.ndarray]:
    """reference.midpoints_and_order of a codebook's bytes."""
    middle, order = reference.midpoints_and_order(torch.frombuffer(bytearray(codebook), dtype=torch.float32))
    return middle.numpy(), order.numpy().astype(np.uint8)


@cache
def table(codebook: bytes) -> np.ndarray:
    """reference.lookup_table of a codebook's bytes."""
    return reference.lookup_table(torch.frombuffer(bytearray(codebook), dtype=torch.float32)).numpy()


@cache
def first_guess(bounds: bytes) -> np.ndarray:
    """(65536,) uint8: a code not above the right one for any float32 whose upper 16 bits are the index.

    From it the right code is a step or two away, since a codebook has about as many steps a power of two as 7 bits of
    mantissa have; a binary search would take eight unpredictable branches.
    """
    upper = np.arange(65536, dtype=np.uint32) << 16
    lowest = np.where(upper >> 31, upper | 0xFFFF, upper).astype(np.uint32).view(np.float32)
    ascending = np.frombuffer(bounds, np.float32)
    return np.searchsorted(ascending, np.nan_to_num(lowest), side="left").astype(np.uint8)


@compiled(nogil=True)
def _largest(magnitudes, n):
    """The largest magnitude of n float32 given as bits: as integers they keep their order, and without NaN's rules."""
    largest = np.uint32(0)
    for i in range(n):
        largest = max(largest, magnitudes[i] & MAGNITUDE)
    return largest


@compiled(nogil=True)
def _quantize_blocks(weight, packed, absmax, n, block_size, midpoints, order, kind):
    """n float32 (kind 0) or bfloat16 values (1), the first in a new block; False if one is not finite. Tensors by address.

    A code is the number of midpoints below a value: 15 comparisons vectorize, a search does not.
    """
    wide, short = carray(pointer(weight), n, np.uint32), carray(pointer(weight), n, np.uint16)
    out = carray(pointer(packed), (n + 1) // 2, np.uint8)
    n_blocks = (n + block_size - 1) // block_size
    scales, scale_bits = carray(pointer(absmax), n_blocks, np.float32), carray(pointer(absmax), n_blocks, np.uint32)
    bits = np.empty(block_size, np.uint32)
    values = bits.view(np.float32)
    codes = np.empty(block_size, np.int32)
    ascending = order[0] == 0
    for k in range(1, 16):
        ascending = ascending and order[k] == k
    finite = True
    # Count from 0: Numba then knows that the index is not negative, drops its wrap-around check, and LLVM can vectorize.
    for b in range(n_blocks):
        start, n_values = b * block_size, min(block_size, n - b * block_size)
        if kind == 0:
            for i in range(n_values):
                bits[i] = wide[start + i]
        else:
            for i in range(n_values):
                bits[i] = np.uint32(short[start + i]) << 16
        largest = _largest(bits, n_values)
        finite &= largest < NOT_FINITE
        scale_bits[b] = largest
        inverse = ONE / max(scales[b], SMALLEST_SCALE)
        if n_values < block_size:  # bitsandbytes divides the values of a shorter block
            scales[b] = max(scales[b], SMALLEST_SCALE)
            inverse = ONE
            for i in range(n_values):
                values[i] /= scales[b]
            if n_values % 2:
                values[n_values] = 0
        n_pairs = (n_values + 1) // 2
        for i in range(2 * n_pairs):
            value = values[i] * inverse
            code = np.int32(0)
            for k in range(15):
                code += np.int32(value > midpoints[k])
            codes[i] = code
        at = start // 2
        if ascending:  # as NF4 is
            for i in range(n_pairs):
                out[at + i] = codes[2 * i] << 4 | codes[2 * i + 1]
        else:
            for i in range(n_pairs):
                out[at + i] = order[codes[2 * i]] << 4 | order[codes[2 * i + 1]]
    return finite


@compiled(nogil=True)
def _dequantize_absmax(codes, scale, mean, codebook, out):
    """A product and a sum, each rounded, as the reference does them."""
    shift = mean[0]
    for b in range(scale.size):
        factor = scale[b]
        for i in range(b * 256, min(b * 256 + 256, codes.size)):
            out[i] = codebook[codes[i]] * factor + shift


@compiled(nogil=True)
def _quantize_by_table(values, lookup, block_size, codes, scale):
    """float64 stands in for the fused multiply-add: the product is exact there, so the sum is rounded once."""
    for first in range(0, values.size, block_size):
        block = values[first : first + block_size]
        magnitude = scale[first // block_size : first // block_size + 1].view(np.uint32)
        magnitude[0] = _largest(block.view(np.uint32), block.size)
        absmax = scale[first // block_size]
        for i in range(block.size):
            if absmax == 0:
                codes[first + i] = 0
                continue
            scaled = min(max(block[i] * (ONE / absmax), -ONE), ONE)
            step = np.float32(np.float64((scaled + ONE) * HALF) * 65535.0 + 0.5)
            codes[first + i] = lookup[np.int32(step) if step == step else 0]


@compiled(nogil=True)
def _quantize_8bit(values, bounds, first_guess, block_size, codes, absmax):
    """The number of bounds below each scaled value."""
    one_value = np.empty(1, np.float32)
    its_bits = one_value.view(np.uint32)
    for first in range(0, values.size, block_size):
        block = values[first : first + block_size]
        magnitude = absmax[first // block_size : first // block_size + 1].view(np.uint32)
        magnitude[0] = _largest(block.view(np.uint32), block.size)
        largest = absmax[first // block_size]
        inverse = ONE / largest if largest > 0 else np.float32(0)
        for i in range(block.size):
            scaled = min(max(block[i] * inverse, -ONE), ONE)
            one_value[0] = scaled
            code = np.int64(first_guess[its_bits[0] >> 16])
            while code < 255 and scaled > bounds[code]:
                code += 1
            codes[first + i] = code


@compiled(nogil=True)
def _dequantize_8bit(codes, absmax, codebook, block_size, out):
    """codebook[code] * absmax[block]."""
    for b in range(absmax.size):
        scale = absmax[b]
        for i in range(b * block_size, min((b + 1) * block_size, codes.size)):
            out[i] = codebook[codes[i]] * scale
