"""Rotary position embedding on the CPU as one compiled loop: each value of q and k is read once and written once.

Works on the (B, T, heads, Dh) memory that a projection leaves, and keeps that layout.
"""

from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..cpu_loops import has_memory, in_parts, rows_of
from ..numba_jit import compiled
from ..numba_memory import pointer


@compiled(nogil=True, fastmath=("contract",))
def _turn(x_at, out_at, cos_at, sin_at, first, last, period, heads, half, sign):
    """Tokens first..last of (tokens, heads, 2 half); token t has the angles of row t % period. sign -1 turns back."""
    turn = np.float32(sign)
    for token in range(first, last):
        angle = 4 * (token % period) * half
        cos, sin = carray(pointer(cos_at + angle), half, np.float32), carray(pointer(sin_at + angle), half, np.float32)
        for head in range(heads):  # each half is an array that starts at 0: no check for a negative index
            start, right = 4 * (token * heads + head) * 2 * half, 4 * half
            a, b = (
                carray(pointer(x_at + start), half, np.float32),
                carray(pointer(x_at + start + right), half, np.float32),
            )
            out_a = carray(pointer(out_at + start), half, np.float32)
            out_b = carray(pointer(out_at + start + right), half, np.float32)
            for i in range(half):  # two loops: LLVM vectorizes one that writes one place
                out_a[i] = a[i] * cos[i] - turn * b[i] * sin[i]
            for i in range(half):
                out_b[i] = b[i] * cos[i] + turn * a[i] * sin[i]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x (B, H, T, Dh) turned by contiguous angles (sign 1) or back (sign -1), as a new tensor laid out as (B, T, H, Dh)."""
    tokens = rows_of(x.transpose(1, 2))  # (B, T, H, Dh)
    B, T, H, Dh = tokens.shape
    out = torch.empty_like(tokens)
    if has_memory(out):
        addresses = tokens.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr()
        period = cos.shape[0] * T

        def part(first: int, last: int) -> None:
            _turn(*addresses, first, last, period, H, Dh // 2, sign)

        in_parts(part, B * T, H * Dh)
    return out.transpose(1, 2)


class RopeLoops(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rows_of(cos), rows_of(sin)
        ctx.save_for_backward(cos, sin)
        return rotate(q, cos, sin, 1), rotate(k, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return rotate(dq, cos, sin, -1), rotate(dk, cos, sin, -1), None, None


def rope_numba(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """The same function as `rope_reference`, for float32."""
    if inplace:
        cos, sin = rows_of(cos), rows_of(sin)
        return q.copy_(rotate(q, cos, sin, 1)), k.copy_(rotate(k, cos, sin, 1))
    return RopeLoops.apply(q, k, cos, sin)
