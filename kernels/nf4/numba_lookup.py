"""Sixteen table lookups in one instruction, which LLVM's vectorizer does not find by itself (AVX-512).

A 4-bit codebook of float32 is exactly one 512-bit register, so looking codes up is a permutation of it: vpermps. One of 16-bit
floats is a 256-bit register: vpermw. A block has one scale, so its 16 possible results are computed and rounded once, and
every value is a lookup. Measured beside a fill of the same memory by `python bench/quant.py`.
"""

from functools import cache
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

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
    """Whether this processor has AVX-512 with 16-bit lanes and 256-bit registers."""
    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name) for name in ("avx512f", "avx512bw", "avx512vl"))


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
    """16 packed bytes -> 32 values: the table at each high nibble and at each low one, interleaved.

    The permutations read a code's low 4 bits, so that the low nibble needs no mask.
    """
    wide = ir.VectorType(I32 if table.type.element == F32 else I16, STEP)
    low = builder.zext(pairs, wide)
    high = builder.lshr(low, ir.Constant(wide, [4] * STEP))
    name = "llvm.x86.avx512.permvar.sf.512" if table.type.element == F32 else "llvm.x86.avx512.permvar.hi.256"
    function = ir.FunctionType(table.type, [table.type, wide])
    permute = cgutils.get_or_insert_function(builder.module, function, name)
    halves = [builder.call(permute, [table, codes]) for codes in (high, low)]
    order = [lane + half * STEP for lane in range(STEP) for half in (0, 1)]
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, 2 * STEP), order))


def to_16_bits(builder: Any, values: Any, element: Any) -> Any:
    """16 float32 as the bits of float16 (element int16) or bfloat16 (uint16), to nearest even; no NaN comes here."""
    if element == types.int16:
        return builder.bitcast(builder.fptrunc(values, ir.VectorType(F16, 16)), ir.VectorType(I16, 16))
    lanes = ir.VectorType(I32, 16)
    bits = builder.bitcast(values, lanes)
    odd = builder.and_(builder.lshr(bits, ir.Constant(lanes, [16] * 16)), ir.Constant(lanes, [1] * 16))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(lanes, [0x7FFF] * 16)))  # just under half, or half if odd
    return builder.trunc(builder.lshr(rounded, ir.Constant(lanes, [16] * 16)), ir.VectorType(I16, 16))
