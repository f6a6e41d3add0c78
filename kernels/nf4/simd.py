"""A block of 4-bit codes to weights in AVX2 instructions that compilers don't find, written as LLVM IR.

A 4-bit codebook is small enough to lie in registers, so that looking codes up is a permutation of 16 bytes (vpshufb): the
codebook is cut into its values' first bytes, second bytes and so on, and what the lookups find is interleaved.

Why it is here, processor time of one thread (AMD EPYC, Zen 3) into one buffer, against numba_dequantize.dequantize_any:
1024 x 1024 float32 0.21 ms against 1.09, bfloat16 0.19 against 1.43; 4096 x 4096 6.2 against 16.4 and 3.5 against 21.5.
`python bench/quant.py` measures it beside bitsandbytes and beside a fill of the same memory.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

I8, I16, I32, I64, F16, F32 = (
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.HalfType(),
    ir.FloatType(),
)
FEATURES = ("avx2", "fma", "f16c")
Decode = Callable[[Any], list[Any]]  # one pass: packed bytes -> registers of results, in order
NAN_BITS = 0x7FC0  # bfloat16's
STEP = 32  # packed bytes that a pass takes: blocks are multiples of twice as many weights


@cache
def uses_avx2() -> bool:
    """Whether Numba compiles for processors that have FEATURES."""
    return {f"+{name}" for name in FEATURES} <= features()


def features() -> set[str]:
    """What LLVM may use, `+avx2` and the like: all that this processor has, unless Numba's settings (NUMBA_CPU_NAME) say less."""
    settings: Any = config
    return set((get_host_cpu_features() if settings.CPU_FEATURES is None else settings.CPU_FEATURES).split(","))


def _decode_blocks(
    typing_context: Any, packed: Any, first: Any, n_blocks: Any, n_steps: Any, codebook: Any, scales: Any, out: Any
) -> Any:
    """out[2i], out[2i + 1] = codebook[high, low nibble of packed[i]] * scales[block], of Numba's arrays.

    For n_blocks of STEP * n_steps bytes, the first at packed[first]. `out` is float32, or holds 16-bit floats as integers:
    uint16 for bfloat16, int16 for float16 (to nearest even). Nothing is checked against the arrays' ends.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, codebook, scales, out = (array_start(context, builder, signature, arguments, k) for k in (0, 4, 5, 6))
        first, n_blocks, n_steps = arguments[1:4]
        values = builder.load(vector_at(builder, codebook, F32, 16), align=4)
        at_scale = avx2(builder, values, signature.args[6].dtype)
        with cgutils.for_range(builder, n_blocks) as blocks:
            decode = at_scale(builder.load(builder.gep(scales, [blocks.index])))
            passes = builder.mul(blocks.index, n_steps)
            with cgutils.for_range(builder, n_steps) as steps:
                byte = builder.mul(builder.add(passes, steps.index), ir.Constant(I64, STEP))
                byte = builder.add(first, byte)
                pairs = builder.load(vector_at(builder, builder.gep(packed, [byte]), I8, STEP), align=1)
                target = builder.gep(out, [builder.mul(byte, ir.Constant(I64, 2))])
                for result in decode(pairs):
                    target = builder.bitcast(target, result.type.as_pointer())
                    builder.store(result, target, align=2)
                    target = builder.gep(target, [ir.Constant(I64, 1)])
        return context.get_dummy_value()

    return types.void(packed, first, n_blocks, n_steps, codebook, scales, out), generate


decode_blocks: Any = intrinsic(_decode_blocks)  # Any: Numba calls it without the typing context


def avx2(builder: Any, values: Any, element: Any) -> Callable[[Any], Decode]:
    """32 packed bytes -> 64 values, by lookups in tables of bytes.

    Interleaving instructions work within each half of a register, so the packed bytes are first put where the values come
    out in order. 16-bit floats are looked up scaled and rounded; float32 is scaled after the lookup, so that its codebook is
    cut into bytes once and not for each block.
    """
    if element != types.float32:

        def decode_short(planes: list[Any], pairs: Any) -> list[Any]:
            return [
                short
                for codes in codes_in_order(builder, pairs, I32)
                for short in interleave(builder, *look_up_bytes(builder, planes, codes), of=I16)
            ]

        return lambda scale: partial(
            decode_short, byte_planes(builder, scaled_codebook(builder, values, scale, element))[2:]
        )
    planes = byte_planes(builder, values)

    def decode(factor: Any, pairs: Any) -> list[Any]:
        results = []
        for codes in codes_in_order(builder, pairs, I16):
            looked_up = look_up_bytes(builder, planes, codes)
            lower_halves, upper_halves = (interleave(builder, *looked_up[k : k + 2], of=I16) for k in (0, 2))
            for lower, upper in zip(lower_halves, upper_halves, strict=True):
                results += [builder.fmul(value, factor) for value in interleave(builder, lower, upper, F32)]
        return results

    return lambda scale: partial(decode, splat(builder, scale, 8))


def codes_in_order(builder: Any, pairs: Any, unit: Any) -> tuple[Any, Any]:
    """32 packed bytes -> 64 codes in bytes, such that interleaving by halves puts their values in order.

    `unit` is as long as the packed bytes whose values fill half a register.
    """
    n = 32 * 8 // unit.width
    units = builder.bitcast(pairs, ir.VectorType(unit, n))
    pairs = builder.bitcast(shuffle(builder, units, units, [*range(0, n, 2), *range(1, n, 2)]), pairs.type)
    nibble = ir.Constant(pairs.type, [15] * 32)
    high = builder.and_(builder.lshr(pairs, ir.Constant(pairs.type, [4] * 32)), nibble)
    return interleave(builder, high, builder.and_(pairs, nibble), I8)


def byte_planes(builder: Any, table: Any) -> list[Any]:
    """The first bytes of 16 values of 32 bits, their second bytes, ..., each once in both halves of a register."""
    all_bytes = builder.bitcast(table, ir.VectorType(I8, 64))
    return [shuffle(builder, all_bytes, all_bytes, [4 * code + k for code in range(16)] * 2) for k in range(4)]


def look_up_bytes(builder: Any, planes: list[Any], codes: Any) -> list[Any]:
    """Each plane at 32 codes."""
    return [permute(builder, "avx2.pshuf.b", plane, codes) for plane in planes]


def array_start(context: Any, builder: Any, signature: Any, arguments: Any, k: int) -> Any:
    """The address of the first element of the k-th argument, a Numba array."""
    return context.make_array(signature.args[k])(context, builder, arguments[k]).data


def vector_at(builder: Any, address: Any, lane: Any, n: int) -> Any:
    """The address as that of n lanes."""
    return builder.bitcast(address, ir.VectorType(lane, n).as_pointer())


def shuffle(builder: Any, left: Any, right: Any, lanes: Iterable[int]) -> Any:
    """The lanes of both, counted through, in this order."""
    order = list(lanes)
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, len(order)), order))


def splat(builder: Any, value: Any, n: int) -> Any:
    """n lanes of one value."""
    undefined = ir.Constant(ir.VectorType(value.type, n), ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, value, ir.Constant(I32, 0)), undefined, [0] * n)


def interleave(builder: Any, left: Any, right: Any, of: Any) -> tuple[Any, Any]:
    """Lanes of both in turns, within each half: the halves' lower lanes and their upper ones, as 32 bytes of `of`."""
    n = left.type.count
    quarter = n // 4
    starts = (0, 2 * quarter)
    turns = [
        [lane + side for start in starts for lane in range(start + upper, start + upper + quarter) for side in (0, n)]
        for upper in (0, quarter)
    ]
    result = ir.VectorType(of, {I8: 32, I16: 16, F32: 8}[of])
    lower, upper = (builder.bitcast(shuffle(builder, left, right, lanes), result) for lanes in turns)
    return lower, upper


def permute(builder: Any, instruction: str, table: Any, indices: Any) -> Any:
    """table[indices], of as many lanes as the table has (by halves of a register: vpshufb)."""
    function = ir.FunctionType(table.type, [table.type, indices.type])
    name = f"llvm.x86.{instruction}"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [table, indices])


def scaled_codebook(builder: Any, values: Any, scale: Any, element: Any) -> Any:
    """16 products of float32; for 16-bit floats as 32 bits, of which the upper half is the product rounded to nearest even."""
    products = builder.fmul(values, splat(builder, scale, 16))
    if element == types.float32:
        return products
    lanes = ir.VectorType(I32, 16)
    half = ir.Constant(lanes, [16] * 16)
    if element == types.int16:
        short = builder.bitcast(builder.fptrunc(products, ir.VectorType(F16, 16)), ir.VectorType(I16, 16))
        return builder.shl(builder.zext(short, lanes), half)
    bits = builder.bitcast(products, lanes)
    odd = builder.and_(builder.lshr(bits, half), ir.Constant(lanes, [1] * 16))
    # just under a half is added, or a half if the upper half is odd
    rounded = builder.add(bits, builder.add(odd, ir.Constant(lanes, [0x7FFF] * 16)))
    is_nan = builder.fcmp_unordered("uno", products, products)  # whose bits could be carried over to a zero's
    return builder.select(is_nan, ir.Constant(lanes, [NAN_BITS << 16] * 16), rounded)
