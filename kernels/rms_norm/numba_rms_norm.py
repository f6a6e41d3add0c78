"""RMSNorm with the residual add on the CPU, one compiled loop over the rows each way.

    h = x + residual,  rstd = 1 / sqrt(mean(h^2) + eps),  y = h rstd w
    with g = dy w:     dh = rstd g - h rstd^3 mean(g h) + (gradient that reaches h directly),   dw = sum over rows of dy h rstd

A row stays in the first-level cache while it is summed and then scaled, so each tensor is read or written once. BLOCK rows
add their part of dw into a row of a table of their own, which torch adds up: the same result on any number of threads,
and the rounding error of a sum of N rows grows as of BLOCK + N / BLOCK. Each inner loop writes one array, since LLVM
vectorizes a loop only if it can prove with a few comparisons that what it writes overlaps nothing that it reads.
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

ZERO, ONE = np.float32(0), np.float32(1)
BLOCK = 64  # rows that share a row of the table for dw: 1/64 of a tensor's memory


@compiled(nogil=True, error_model="numpy", fastmath=("reassoc", "contract"))
def _forward(x_at, residual_at, weight_at, y_at, h_at, rstd_at, n, D, eps):
    """residual_at is 0 where there is none; then h_at is x_at.

    Each row is an array of its own: an index that starts at 0 needs no check for being negative, which stops vectorizing.
    """
    weight, rstd = carray(pointer(weight_at), D, np.float32), carray(pointer(rstd_at), n, np.float32)
    for row in range(n):
        start = 4 * row * D
        x, residual = carray(pointer(x_at + start), D, np.float32), carray(pointer(residual_at + start), D, np.float32)
        h, y = carray(pointer(h_at + start), D, np.float32), carray(pointer(y_at + start), D, np.float32)
        if residual_at != 0:
            for i in range(D):
                h[i] = x[i] + residual[i]
        squares = ZERO
        for i in range(D):
            squares += h[i] * h[i]
        scale = np.float32(ONE / np.sqrt(squares / np.float32(D) + np.float32(eps)))
        rstd[row] = scale
        for i in range(D):
            y[i] = h[i] * scale * weight[i]


@compiled(nogil=True, error_model="numpy", fastmath=("reassoc", "contract"))
def _backward(dy_at, direct_at, h_at, weight_at, rstd_at, dx_at, table_at, n, D, block):
    """direct_at is 0 where no gradient reaches h beside the norm's, table_at where the weight needs none."""
    weight, rstd = carray(pointer(weight_at), D, np.float32), carray(pointer(rstd_at), n, np.float32)
    for row in range(n):
        start, scale = 4 * row * D, rstd[row]
        dy, h = carray(pointer(dy_at + start), D, np.float32), carray(pointer(h_at + start), D, np.float32)
        direct, dx = carray(pointer(direct_at + start), D, np.float32), carray(pointer(dx_at + start), D, np.float32)
        total = ZERO
        for i in range(D):
            total += dy[i] * weight[i] * h[i]
        factor = np.float32(total * scale * scale * scale / np.float32(D))
        if direct_at != 0:
            for i in range(D):
                dx[i] = dy[i] * weight[i] * scale - h[i] * factor + direct[i]
        else:
            for i in range(D):
                dx[i] = dy[i] * weight[i] * scale - h[i] * factor
        if table_at != 0:
            dw = carray(pointer(table_at + 4 * (row // block) * D), D, np.float32)
            if row % block == 0:
                for i in range(D):
                    dw[i] = dy[i] * h[i] * scale
            else:
                for i in range(D):
                    dw[i] += dy[i] * h[i] * scale


def _at(tensor: Tensor | None, first: int, width: int) -> int:
    """The address of row `first`; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr() + 4 * first * width


class RMSNormLoops(torch.autograd.Function):
    """(normed, h): h is x + residual, or x itself, which autograd then takes as an output of its own: use only normed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Any:
        x, weight = rows_of(x), rows_of(weight)
        residual = None if residual is None else rows_of(residual)
        D = x.shape[-1]
        N = x.numel() // D if D else 0
        normed = torch.empty_like(x)
        h = x if residual is None else torch.empty_like(x)
        rstd = torch.empty(N, dtype=torch.float32, device=x.device)

        def part(first: int, last: int) -> None:
            rows = [_at(t, first, D) for t in (x, residual)], [_at(t, first, D) for t in (normed, h)]
            _forward(*rows[0], weight.data_ptr(), *rows[1], _at(rstd, first, 1), last - first, D, eps)

        if has_memory(x):
            in_parts(part, N, D)
        ctx.save_for_backward(h, weight, rstd)
        ctx.set_materialize_grads(False)
        return normed if residual is None else (normed, h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, direct: Tensor | None = None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if dy is None:  # only h was used
            return direct, direct, None, None
        h, weight, rstd = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, _ = ctx.needs_input_grad
        dy, direct = rows_of(dy), None if direct is None else rows_of(direct)
        D, N = h.shape[-1], rstd.numel()
        dx = torch.empty_like(h)
        n_blocks = -(-N // BLOCK)
        table = torch.empty(n_blocks, D, dtype=torch.float32, device=h.device) if needs_weight else None

        def part(first: int, last: int) -> None:
            row, n = first * BLOCK, min(last * BLOCK, N) - first * BLOCK
            read = _at(dy, row, D), _at(direct, row, D), _at(h, row, D), weight.data_ptr(), _at(rstd, row, 1)
            _backward(*read, _at(dx, row, D), _at(table, first, D), n, D, BLOCK)

        if has_memory(dx):
            in_parts(part, n_blocks, BLOCK * D)
        dw = None if table is None else table.sum(0)
        return dx if needs_x else None, dx if needs_residual else None, dw, None


def rms_norm_numba(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    *,
    eps: float,
    residual: Tensor | None = None,  # (..., D)
) -> Tensor | tuple[Tensor, Tensor]:
    """The same function as `rms_norm_reference`, for float32."""
    return RMSNormLoops.apply(x, residual, weight, eps)
