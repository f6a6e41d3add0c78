"""Memory by address, for compiled loops: for the innermost loops, where Numba's arrays cost too much.

Numba counts the references to an array around each call of a function that takes it, inlined or not, and checks every
index for being negative. An address is an integer; the caller keeps its array alive, and nothing is checked.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I64 = ir.IntType(64)


def _intrinsic(result: Any, generate: Callable[..., Any], n_arguments: int = 1) -> Any:
    """An intrinsic that takes integers of 64 bits, the first of them an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return generate(context, builder, *arguments)

    def one(typing_context: Any, address: Any) -> Any:
        return result(types.int64), code

    def two(typing_context: Any, address: Any, value: Any) -> Any:
        return result(types.int64, types.uint64), code

    return intrinsic(one if n_arguments == 1 else two)


def _load(builder: Any, address: Any, n_bits: int) -> Any:
    """The n_bits at an address, which need not be a multiple of their size."""
    return builder.load(builder.inttoptr(address, ir.IntType(n_bits).as_pointer()), align=1)


def _store(context: Any, builder: Any, address: Any, value: Any) -> Any:
    builder.store(value, builder.inttoptr(address, _I64.as_pointer()), align=1)
    return context.get_dummy_value()


pointer = _intrinsic(types.voidptr, lambda context, builder, address: builder.inttoptr(address, cgutils.voidptr_t))
"""An address as numba.carray takes it."""
byte_at = _intrinsic(types.int64, lambda context, builder, address: builder.zext(_load(builder, address, 8), _I64))
"""The byte at an address, int64."""
four_at = _intrinsic(types.int64, lambda context, builder, address: builder.sext(_load(builder, address, 32), _I64))
"""The int32 at an address, as int64."""
eight_at = _intrinsic(types.uint64, lambda context, builder, address: _load(builder, address, 64))
"""Eight bytes from an address on, as one little-endian uint64."""
put_eight = _intrinsic(types.void, _store, n_arguments=2)
"""put_eight(address, value) writes eight bytes."""


@numba.njit(inline="always")
def address(array: Any) -> Any:
    """Where an array's first element lies, int64."""
    return np.int64(array.ctypes.data)
