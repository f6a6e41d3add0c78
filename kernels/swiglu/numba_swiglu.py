"""The SwiGLU gate on the CPU as one compiled loop each way: forward reads 2 values and writes 1, backward reads 3, writes 2.

PyTorch's operators take 2 passes forward and 4 backward, and a third tensor of (tokens, F) meanwhile.
"""

from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..cpu_loops import has_memory, in_parts, rows_of
from ..numba_exp import exp32
from ..numba_jit import compiled
from ..numba_memory import pointer

ONE = np.float32(1)
BLOCK = 4096  # elements: the unit in which work is handed to threads


@compiled(nogil=True, error_model="numpy")
def _forward(gate_at, up_at, out_at, n):
    gate, up = carray(pointer(gate_at), n, np.float32), carray(pointer(up_at), n, np.float32)
    out = carray(pointer(out_at), n, np.float32)
    for i in range(n):
        out[i] = gate[i] / (ONE + exp32(-gate[i])) * up[i]


@compiled(nogil=True, error_model="numpy")
def _backward(grad_at, gate_at, up_at, d_gate_at, d_up_at, n):
    grad, gate = carray(pointer(grad_at), n, np.float32), carray(pointer(gate_at), n, np.float32)
    up, d_gate = carray(pointer(up_at), n, np.float32), carray(pointer(d_gate_at), n, np.float32)
    d_up = carray(pointer(d_up_at), n, np.float32)
    for i in range(n):
        g, d = gate[i], grad[i]
        s = ONE / (ONE + exp32(-g))
        d_up[i] = d * (g * s)
        d_gate[i] = d * up[i] * s * (ONE + g * (ONE - s))


def run(loop: Any, *tensors: Tensor) -> None:
    """The loop over all elements of contiguous tensors."""
    n = tensors[0].numel()
    addresses = [tensor.data_ptr() for tensor in tensors]

    def part(first: int, last: int) -> None:
        loop(*(at + 4 * BLOCK * first for at in addresses), min(last * BLOCK, n) - first * BLOCK)

    in_parts(part, -(-n // BLOCK), BLOCK)


class SwiGLULoops(torch.autograd.Function):
    """silu(gate) * up; silu(gate) is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = rows_of(gate), rows_of(up)
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        if has_memory(out):
            run(_forward, gate, up, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        grad = rows_of(grad)
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(gate)
        if has_memory(d_gate):
            run(_backward, grad, gate, up, d_gate, d_up)
        return d_gate, d_up


def swiglu_numba(gate: Tensor, up: Tensor) -> Tensor:
    """The same function as `swiglu_reference`, for float32."""
    return SwiGLULoops.apply(gate, up)
