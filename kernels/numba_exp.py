"""e^x in float32 and the order of float32s as integers, written so that LLVM turns the loops around them into vector instructions.

Numba's own exp is a call of the C library for each value: SVML, which it could use, is not in its wheels.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LOG2_E = np.float32(1.44269504088896341)
LN2_HIGH, LN2_LOW = (
    np.float32(0.693359375),
    np.float32(-2.12194440e-4),
)  # the first has 9 bits, so n * LN2_HIGH is exact
ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves a float32's integer part in its lowest bits
C0, C1, C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
C3, C4, C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
LOWEST, HIGHEST = np.float32(-87.33654), np.float32(88.72283)  # below: 0 (denormals are dropped); above: infinity
ZERO, ONE = np.float32(0), np.float32(1)
BIAS, MANTISSA_BITS, MAGNITUDE = np.int32(127), np.int32(23), np.int32(0x7FFFFFFF)


def _bitcast(argument: Any, result: Any, llvm: Any) -> Any:
    def typing(context: Any, x: Any) -> Any:
        return result(argument), lambda _context, builder, _signature, args: builder.bitcast(args[0], llvm)

    return intrinsic(typing)


bits_of = _bitcast(types.float32, types.int32, ir.IntType(32))
"""A float32's bits as int32."""
from_bits = _bitcast(types.int32, types.float32, ir.FloatType())
"""The float32 that has these bits."""


@numba.njit(forceinline=True, fastmath={"contract"})
def exp32(x: Any) -> Any:
    """e^x for a float32, within 2 units in the last place; NaN stays NaN (Cephes' expf, Moshier 1989).

    x = n ln 2 + r with |r| <= ln 2 / 2, so e^x = 2^n e^r, and a polynomial of degree 7 is e^r.
    """
    inside = LOWEST if x < LOWEST else x
    inside = HIGHEST if inside > HIGHEST else inside
    shifted = inside * LOG2_E + ROUND
    n = shifted - ROUND
    r = inside - n * LN2_HIGH - n * LN2_LOW
    p = ((((C0 * r + C1) * r + C2) * r + C3) * r + C4) * r + C5
    power = from_bits((bits_of(shifted) + BIAS) << MANTISSA_BITS)
    y = ((p * r) * r + r + ONE) * power
    return ZERO if x < LOWEST else y


@numba.njit(forceinline=True)
def ordered(bits: Any) -> Any:
    """A float32's bits as an int32 of the same order, and back: a maximum of integers vectorizes, one of floats does not.

    A NaN with its sign bit clear is above infinity.
    """
    return np.int32(bits ^ ((bits >> np.int32(31)) & MAGNITUDE))
