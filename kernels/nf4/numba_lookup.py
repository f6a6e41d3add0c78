"""Sixteen or thirty-two table lookups in one instruction, which LLVM's vectorizer does not find by itself (AVX-512).

A 4-bit codebook of float32 is exactly one 512-bit register, so looking codes up is a permutation of it: vpermps. Two copies
of a codebook of 16-bit floats fill one as well: vpermw. A block has one scale, so its 16 possible results are computed
and rounded once, and every value is a lookup. Measured beside a fill of the same memory by `python bench/quant.py`.
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
    """Whether this processor has AVX-512 with instructions for 16-bit lanes."""
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx512f") and features.get("avx512bw"))


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
        table = scaled if element == types.float32 else twice(builder, to_16_bits(builder, scaled, element))
        with cgutils.for_range(builder, n_steps) as loop:
            byte = builder.add(first, builder.mul(loop.index, ir.Constant(I64, STEP)))
            source = builder.gep(packed, [byte])
            target = builder.gep(out, [builder.mul(byte, ir.Constant(I64, 2))])
            for k in range(2 if element == types.float32 else 1):
                lane = table.type.element if element != types.float32 else I32
                n_bytes = table.type.count // 2
                at = builder.gep(source, [ir.Constant(I64, k * n_bytes)])
                codes = spread_nibbles(builder, builder.load(vector_at(builder, at, I8, n_bytes), align=1), lane)
                to = builder.gep(target, [ir.Constant(I64, k * 2 * n_bytes)])
                result = permute(builder, table, codes)
                builder.store(result, builder.bitcast(to, result.type.as_pointer()), align=2)
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


def spread_nibbles(builder: Any, packed: Any, lane: Any) -> Any:
    """n bytes -> 2n lanes: each byte's high nibble, then its low one, still under the high one's bits."""
    wide = ir.VectorType(ir.IntType(2 * lane.width), packed.type.count)
    bytes_ = builder.zext(packed, wide)
    high = builder.lshr(bytes_, ir.Constant(wide, [4] * wide.count))
    low = builder.shl(bytes_, ir.Constant(wide, [lane.width] * wide.count))
    return builder.bitcast(builder.or_(high, low), ir.VectorType(lane, 2 * wide.count))


def permute(builder: Any, table: Any, codes: Any) -> Any:
    """table[code]. vpermps reads the low 4 bits of a code, vpermw 5, of which the fifth picks one of two equal halves."""
    name = "llvm.x86.avx512.permvar.sf.512" if table.type.element == F32 else "llvm.x86.avx512.permvar.hi.512"
    function = ir.FunctionType(table.type, [table.type, codes.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [table, codes])


def to_16_bits(builder: Any, values: Any, element: Any) -> Any:
    """16 float32 as the bits of float16 (element int16) or bfloat16 (uint16), to nearest even; no NaN comes here."""
    if element == types.int16:
        return builder.bitcast(builder.fptrunc(values, ir.VectorType(F16, 16)), ir.VectorType(I16, 16))
    lanes = ir.VectorType(I32, 16)
    bits = builder.bitcast(values, lanes)
    odd = builder.and_(builder.lshr(bits, ir.Constant(lanes, [16] * 16)), ir.Constant(lanes, [1] * 16))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(lanes, [0x7FFF] * 16)))  # just under half, or half if odd
    return builder.trunc(builder.lshr(rounded, ir.Constant(lanes, [16] * 16)), ir.VectorType(I16, 16))


def twice(builder: Any, values: Any) -> Any:
    """The same 16 lanes two times."""
    return builder.shuffle_vector(values, values, ir.Constant(ir.VectorType(I32, 32), list(range(32))))
