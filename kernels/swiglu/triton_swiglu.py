"""SwiGLU's gate as one Triton kernel each way.

    forward   out = g * sigmoid(g) * u
    backward  d_up = d * silu(g),  d_gate = d * u * sigmoid(g) * (1 + g * (1 - sigmoid(g)))

One program takes BLOCK neighbours of one row. silu(g) is recomputed in the backward pass, everything is float32 in
registers. Bytes: forward reads 2 and writes 1 value an element, backward reads 3 and writes 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import as_rows, cdiv, launch, warps_for

BLOCK = 1024  # 4 warps of two 16-byte half-precision loads a thread; not measured yet (no GPU at hand)


@triton.jit
def swiglu_forward(gate, up, out, F, stride_gate, stride_up, BLOCK: tl.constexpr):
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = cols < F
    g = tl.load(gate + row * stride_gate + cols, mask=keep, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + cols, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * F + cols, g * tl.sigmoid(g) * u, mask=keep)


@triton.jit
def swiglu_backward(grad, gate, up, d_gate, d_up, F, stride_grad, stride_gate, stride_up, BLOCK: tl.constexpr):
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = cols < F
    d = tl.load(grad + row * stride_grad + cols, mask=keep, other=0.0).to(tl.float32)
    g = tl.load(gate + row * stride_gate + cols, mask=keep, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + cols, mask=keep, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(d_up + row * F + cols, d * g * s, mask=keep)
    tl.store(d_gate + row * F + cols, d * u * s * (1 + g * (1 - s)), mask=keep)


def rows_alike(*tensors: Tensor) -> list[Tensor]:
    """The tensors as (N, F); as one row where all are contiguous, so that no block is cut at a row's end."""
    if all(t.is_contiguous() for t in tensors):
        return [t.reshape(1, -1) for t in tensors]
    return [as_rows(t) for t in tensors]


@torch.library.custom_op("graft::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel():
        g, u = rows_alike(gate, up)
        N, F = g.shape
        grid = (N * cdiv(F, BLOCK),)
        launch(
            swiglu_forward, grid, g, u, out, F, g.stride(0), u.stride(0), BLOCK=BLOCK, num_warps=warps_for(2 * BLOCK)
        )
    return out


@torch.library.custom_op("graft::swiglu_backward", mutates_args=())
def swiglu_backward_op(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    d_up = torch.empty_like(d_gate)
    if d_gate.numel():
        d, g, u = rows_alike(grad, gate, up)
        N, F = g.shape
        grid = (N * cdiv(F, BLOCK),)
        strides = (d.stride(0), g.stride(0), u.stride(0))
        launch(swiglu_backward, grid, d, g, u, d_gate, d_up, F, *strides, BLOCK=BLOCK, num_warps=warps_for(2 * BLOCK))
    return d_gate, d_up


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@swiglu_backward_op.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return d_gate, torch.empty_like(d_gate)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward_op(grad, *ctx.saved_tensors)


swiglu_op.register_autograd(_backward, setup_context=_save)


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """The same function as `swiglu_reference`."""
    return swiglu_op(gate, up)
