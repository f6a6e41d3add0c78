"""Rotary position embedding as one Triton kernel for q and k.

    out_i = x_i c_i - sign x_{i+h} s_i,   out_{i+h} = x_{i+h} c_i + sign x_i s_i      h = Dh / 2, i < h

    q of one token (H, Dh):  | a: first halves | b: second halves |   BLOCK_H heads at a time, then k's heads

One program turns all heads of one token, so its angles are loaded once; the gradient is the same kernel with sign -1 and
nothing is saved but the angles. float32 in registers. Bytes: reads and writes q and k once, in place or not: a program reads
both halves before it writes either. Any strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, next_power_of_2

TILE = 1024  # pairs of one step, 4 warps: 8 pairs a thread; not measured yet (no GPU at hand)


@triton.jit
def turn(
    x, out, b, t, c, s, heads,
    stride_b, stride_h, stride_t, stride_d, out_b, out_h, out_t, out_d,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    for first in range(0, heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)[:, None]
        keep = (head < heads) & (pair < HALF)
        source = x + b * stride_b + t * stride_t + head * stride_h + pair * stride_d
        target = out + b * out_b + t * out_t + head * out_h + pair * out_d
        left = tl.load(source, mask=keep, other=0.0).to(tl.float32)
        right = tl.load(source + HALF * stride_d, mask=keep, other=0.0).to(tl.float32)
        tl.store(target, left * c - right * s, mask=keep)
        tl.store(target + HALF * out_d, right * c + left * s, mask=keep)


@triton.jit
def rope_kernel(
    q, k, cos, sin, q_out, k_out, T, H, K,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d,
    qo_b, qo_h, qo_t, qo_d, ko_b, ko_h, ko_t, ko_d,
    cos_b, cos_t, cos_d, sin_b, sin_t, sin_d,
    SIGN: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // T).to(tl.int64)
    t = (tl.program_id(0) % T).to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    c = tl.load(cos + b * cos_b + t * cos_t + pair * cos_d, mask=pair < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + b * sin_b + t * sin_t + pair * sin_d, mask=pair < HALF, other=0.0).to(tl.float32) * SIGN
    turn(q, q_out, b, t, c, s, H, q_b, q_h, q_t, q_d, qo_b, qo_h, qo_t, qo_d, HALF, BLOCK_H, BLOCK_HALF)
    turn(k, k_out, b, t, c, s, K, k_b, k_h, k_t, k_d, ko_b, ko_h, ko_t, ko_d, HALF, BLOCK_H, BLOCK_HALF)


def turn_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor, sign: int) -> None:
    """Turns q into q_out and k into k_out, which may be q and k themselves."""
    B, H, T, Dh = q.shape
    if B * T == 0:
        return
    block_half = next_power_of_2(Dh // 2)
    block_h = max(1, TILE // block_half)
    angles = (x.expand(B, -1, -1).stride() for x in (cos, sin))  # a table of one row for all is read with stride 0
    strides = (*q.stride(), *k.stride(), *q_out.stride(), *k_out.stride(), *(n for s in angles for n in s))
    launch(
        rope_kernel, (B * T,), q, k, cos, sin, q_out, k_out, T, H, k.shape[1], *strides,
        SIGN=sign, HALF=Dh // 2, BLOCK_H=block_h, BLOCK_HALF=block_half, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("graft::rope", mutates_args=())
def rope_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    turn_both(q, k, cos, sin, q_out, k_out, sign)
    return q_out, k_out


@torch.library.custom_op("graft::rope_", mutates_args=("q", "k"))
def rope_inplace_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    turn_both(q, k, cos, sin, q, k, 1)


@rope_op.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _save(ctx, inputs, output) -> None:
    *_, cos, sin, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *rope_op(dq, dk, *ctx.saved_tensors, -ctx.sign), None, None, None


rope_op.register_autograd(_backward, setup_context=_save)


def rope_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """The same function as `rope_reference`."""
    if inplace:
        rope_inplace_op(q, k, cos, sin)
        return q, k
    return rope_op(q, k, cos, sin, 1)
