"""4-bit codes to weights on the CPU: sixteen table lookups in one instruction where the processor has AVX-512.

A 4-bit codebook of float32 is exactly one 512-bit register, so looking codes up is a permutation of it (vpermps), which
LLVM's vectorizer does not find by itself; with 16-bit floats it is every other lane of vpermw's. A block has one scale, so
its 16 possible results are computed and rounded once. Measured beside a fill of the same memory by `python bench/quant.py`.
"""

from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..numba_jit import compiled

I8, I16, I32, I64, F16, F32 = (
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.HalfType(),
    ir.FloatType(),
)
STEP = 16  # packed bytes a pass: 32 values


@cache
def is_supported() -> bool:
    """Whether this processor has AVX-512 with 16-bit lanes."""
    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name) for name in ("avx512f", "avx512bw"))


def _pointer(typing_context: Any, address: Any) -> Any:
    """The address of a tensor, an integer, as numba.carray takes it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


pointer: Any = intrinsic(_pointer)


@intrinsic
def decode_block_(
    typing_context: Any, packed: Any, first: Any, n_steps: Any, codebook: Any, scale: Any, out: Any
) -> Any:
    """out[2i], out[2i + 1] = codebook[high, low nibble of packed[i]] * scale, for 16 * n_steps bytes from `first` on.

    `out` is float32, or holds 16-bit floats as integers: uint16 for bfloat16, int16 for float16 (to nearest even).
    Nothing is checked against the arrays' ends.
    """
    signature = types.void(packed, first, n_steps, codebook, scale, out)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, codebook, out = (array_start(context, builder, signature, arguments, k) for k in (0, 3, 5))
        first, n_steps, scale = arguments[1], arguments[2], arguments[4]
        values = builder.load(vector_at(builder, codebook, F32, 16), align=4)
        scaled = builder.fmul(values, splat(builder, scale, 16))
        element = signature.args[5].dtype
        table = scaled if element == types.float32 else to_16_bits(builder, scaled, element)
        with cgutils.for_range(builder, n_steps) as loop:
            byte = builder.add(first, builder.mul(loop.index, ir.Constant(I64, STEP)))
            pairs = builder.load(vector_at(builder, builder.gep(packed, [byte]), I8, STEP), align=1)
            result = lookup_pairs(builder, table, pairs)
            target = builder.gep(out, [builder.mul(byte, ir.Constant(I64, 2))])
            builder.store(result, builder.bitcast(target, result.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return signature, generate


def array_start(context: Any, builder: Any, signature: Any, arguments: Any, k: int) -> Any:
    """The address of the first element of the k-th argument, a Numba array."""
    return context.make_array(signature.args[k])(context, builder, arguments[k]).data


def vector_at(builder: Any, address: Any, lane: Any, n: int) -> Any:
    """The address as that of n lanes."""
    return builder.bitcast(address, ir.VectorType(lane, n).as_pointer())


def splat(builder: Any, value: Any, n: int) -> Any:
    """n lanes of one value."""
    undefined = ir.Constant(ir.VectorType(value.type, n), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, n), [0] * n))


def lookup_pairs(builder: Any, table: Any, pairs: Any) -> Any:
    """16 packed bytes -> 32 values: the table at each byte's high nibble and at its low one, in turns.

    The table has 16 lanes of 32 bits. A permutation reads an index's low bits only, 4 for 16 lanes and 5 for 32, so that no
    index needs a mask. 16-bit values are the odd lanes of 32, at 2 * code + 1. The bytes are put in order before they are
    widened: there a vector is short.
    """
    short = table.type.element == I32
    high = builder.lshr(pairs, ir.Constant(pairs.type, [3 if short else 4] * STEP))
    low = builder.shl(pairs, ir.Constant(pairs.type, [1] * STEP)) if short else pairs
    turns = [lane + half * STEP for lane in range(STEP) for half in (0, 1)]
    codes = builder.shuffle_vector(high, low, ir.Constant(ir.VectorType(I32, 2 * STEP), turns))
    if short:
        odd = builder.or_(codes, ir.Constant(codes.type, [1] * 2 * STEP))
        lanes = ir.VectorType(I16, 2 * STEP)
        return permute(builder, "hi", builder.bitcast(table, lanes), builder.zext(odd, lanes))
    halves = []
    for first in (0, STEP):
        part = ir.Constant(ir.VectorType(I32, STEP), list(range(first, first + STEP)))
        index = builder.zext(builder.shuffle_vector(codes, codes, part), ir.VectorType(I32, STEP))
        halves.append(permute(builder, "sf", table, index))
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, 2 * STEP), list(range(2 * STEP))))


def permute(builder: Any, kind: str, table: Any, indices: Any) -> Any:
    """table[indices], of as many lanes as the table has."""
    function = ir.FunctionType(table.type, [table.type, indices.type])
    name = f"llvm.x86.avx512.permvar.{kind}.512"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [table, indices])


def to_16_bits(builder: Any, values: Any, element: Any) -> Any:
    """16 float32 as float16 (element int16) or bfloat16 (uint16), to nearest even, in the upper half of 32 bits."""
    lanes = ir.VectorType(I32, 16)
    half = ir.Constant(lanes, [16] * 16)
    if element == types.int16:
        short = builder.bitcast(builder.fptrunc(values, ir.VectorType(F16, 16)), ir.VectorType(I16, 16))
        return builder.shl(builder.zext(short, lanes), half)
    bits = builder.bitcast(values, lanes)  # never those of a NaN
    odd = builder.and_(builder.lshr(bits, half), ir.Constant(lanes, [1] * 16))
    return builder.add(bits, builder.add(odd, ir.Constant(lanes, [0x7FFF] * 16)))  # just under a half, or a half if odd


@compiled(nogil=True)
def _scale(b, absmax, absmax_q, scale, mean, nested_codebook, nested):
    """The absmax of block b; the second level as _dequantize_absmax does it."""
    if nested:
        return nested_codebook[absmax_q[b]] * scale[b >> 8] + mean[0]
    return absmax[b]


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


# These two take tensors by address: making numpy arrays of eight of them takes as long as a weight of 512 x 384.
@compiled(nogil=True)
def dequantize_any(packed, absmax, codebook, scale, mean, nested_codebook, n_blocks, block_size, out, kind):
    """Whole blocks to float32 on any processor: 16 products a block, then lookups."""
    scales = _scales(absmax, scale, mean, nested_codebook, n_blocks)
    half = block_size // 2
    codes, target = (
        carray(pointer(packed), n_blocks * half, np.uint8),
        carray(pointer(out), n_blocks * block_size, np.float32),
    )
    values = carray(pointer(codebook), 16, np.float32)
    scaled = np.empty(16, np.float32)
    for b in range(n_blocks):
        largest = _scale(b, *scales)
        for k in range(16):
            scaled[k] = values[k] * largest
        for i in range(b * half, (b + 1) * half):
            target[2 * i] = scaled[codes[i] >> 4]
            target[2 * i + 1] = scaled[codes[i] & 15]


@compiled(nogil=True)
def _decode_blocks(codes, scales, values, n_blocks, half, target):
    """Whole blocks, 32 values at a time (blocks are multiples of 32)."""
    for b in range(n_blocks):
        decode_block_(codes, b * half, half // STEP, values, _scale(b, *scales), target)  # pyright: ignore[reportCallIssue]


@compiled(nogil=True)
def dequantize_avx512(packed, absmax, codebook, scale, mean, nested_codebook, n_blocks, block_size, out, kind):
    """The same to any of numba_cpu.DTYPES, `kind` being its place there."""
    scales = _scales(absmax, scale, mean, nested_codebook, n_blocks)
    half, n = block_size // 2, n_blocks * block_size
    codes, values = carray(pointer(packed), n_blocks * half, np.uint8), carray(pointer(codebook), 16, np.float32)
    if kind == 0:
        _decode_blocks(codes, scales, values, n_blocks, half, carray(pointer(out), n, np.float32))
    elif kind == 1:
        _decode_blocks(codes, scales, values, n_blocks, half, carray(pointer(out), n, np.uint16))
    else:
        _decode_blocks(codes, scales, values, n_blocks, half, carray(pointer(out), n, np.int16))
