"""A block of 4-bit codes to weights in the few instructions that compilers don't find: AVX-512 or AVX2, written as LLVM IR.

A 4-bit codebook is small enough to lie in registers, so that looking codes up is a permutation. With AVX-512 the 16 float32
of a scaled codebook are one register (vpermps; for 16-bit floats every other lane of vpermw's). AVX2 permutes 16 bytes
(vpshufb): the codebook is cut into its values' first bytes, second bytes and so on, and what the lookups find is woven
together. Measured beside a fill of the same memory by `python bench/quant.py`.
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
FEATURES = {"avx512": ("avx512f", "avx512bw"), "avx2": ("avx2", "fma", "f16c")}
Decode = Callable[[Any], list[Any]]  # one pass: packed bytes -> registers of results, in order
NAN_BITS = 0x7FC0  # bfloat16's
STEP = {"avx512": 16, "avx2": 32}  # packed bytes that a pass takes: blocks are multiples of twice as many weights


@cache
def instruction_set() -> str | None:
    """The best of FEATURES that Numba compiles for here."""
    return next(filter(has, FEATURES), None)


def has(instructions: str) -> bool:
    """Whether Numba compiles for processors with a set of FEATURES."""
    return {f"+{name}" for name in FEATURES[instructions]} <= features()


def features() -> set[str]:
    """What LLVM may use, `+avx2` and the like: all that this processor has, unless Numba's settings (NUMBA_CPU_NAME) say less."""
    settings: Any = config
    return set((get_host_cpu_features() if settings.CPU_FEATURES is None else settings.CPU_FEATURES).split(","))


def _decode_blocks(step: int, look_up: Callable[..., Any]) -> Any:
    """decode_blocks(packed, first, n_blocks, n_steps, codebook, scales, out) of Numba; `look_up` handles `step` bytes a pass.

    out[2i], out[2i + 1] = codebook[high, low nibble of packed[i]] * scales[block], for n_blocks of step * n_steps bytes, the
    first at packed[first]. `out` is float32, or holds 16-bit floats as integers: uint16 for bfloat16, int16 for float16 (to
    nearest even). Nothing is checked against the arrays' ends.
    """

    def decode_blocks(
        typing_context: Any, packed: Any, first: Any, n_blocks: Any, n_steps: Any, codebook: Any, scales: Any, out: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            packed, codebook, scales, out = (
                array_start(context, builder, signature, arguments, k) for k in (0, 4, 5, 6)
            )
            first, n_blocks, n_steps = arguments[1:4]
            values = builder.load(vector_at(builder, codebook, F32, 16), align=4)
            at_scale = look_up(builder, values, signature.args[6].dtype)
            with cgutils.for_range(builder, n_blocks) as blocks:
                decode = at_scale(builder.load(builder.gep(scales, [blocks.index])))
                passes = builder.mul(blocks.index, n_steps)
                with cgutils.for_range(builder, n_steps) as steps:
                    byte = builder.mul(builder.add(passes, steps.index), ir.Constant(I64, step))
                    byte = builder.add(first, byte)
                    pairs = builder.load(vector_at(builder, builder.gep(packed, [byte]), I8, step), align=1)
                    place = builder.gep(out, [builder.mul(byte, ir.Constant(I64, 2))])
                    for result in decode(pairs):
                        place = builder.bitcast(place, result.type.as_pointer())
                        builder.store(result, place, align=2)
                        place = builder.gep(place, [ir.Constant(I64, 1)])
            return context.get_dummy_value()

        return types.void(packed, first, n_blocks, n_steps, codebook, scales, out), generate

    return intrinsic(decode_blocks)


def avx512(builder: Any, values: Any, element: Any) -> Callable[[Any], Decode]:
    """16 packed bytes -> 32 values: the scaled codebook at each byte's high nibble and at its low one, in turns.

    A permutation reads an index's low bits only, 4 for 16 lanes and 5 for 32, so that no index needs a mask. 16-bit values
    are the odd lanes of 32, at 2 * code + 1. The bytes are put in order before they are widened: there a vector is short.
    """
    short = element != types.float32

    def decode(table: Any, pairs: Any) -> list[Any]:
        high = builder.lshr(pairs, ir.Constant(pairs.type, [3 if short else 4] * 16))
        low = builder.shl(pairs, ir.Constant(pairs.type, [1] * 16)) if short else pairs
        codes = shuffle(builder, high, low, [lane + half * 16 for lane in range(16) for half in (0, 1)])
        if short:
            odd = builder.or_(codes, ir.Constant(codes.type, [1] * 32))
            lanes = ir.VectorType(I16, 32)
            return [permute(builder, "avx512.permvar.hi.512", builder.bitcast(table, lanes), builder.zext(odd, lanes))]
        halves = [shuffle(builder, codes, codes, range(first, first + 16)) for first in (0, 16)]
        lanes = ir.VectorType(I32, 16)
        return [permute(builder, "avx512.permvar.sf.512", table, builder.zext(half, lanes)) for half in halves]

    return lambda scale: partial(decode, scaled_codebook(builder, values, scale, element))


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
            found = look_up_bytes(builder, planes, codes)
            lower_halves, upper_halves = (interleave(builder, *found[k : k + 2], of=I16) for k in (0, 2))
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


decode_blocks_avx512 = _decode_blocks(STEP["avx512"], avx512)
decode_blocks_avx2 = _decode_blocks(STEP["avx2"], avx2)


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
