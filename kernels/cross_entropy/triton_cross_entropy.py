"""Linear layer + cross entropy on a GPU: matrix products by cuBLAS, one Triton kernel between them, chunk by chunk.

    for each chunk of C tokens (Liger Kernel, arXiv:2410.10989, section 3.2):
        logits = hidden_C weight^T                                          (C, V), the only block of logits there is
        losses, logits <- d loss / d logits                                 this file's kernel, in place
        d_hidden_C = logits weight,    d_weight += logits^T hidden_C

    kernel: one program a token, twice over its V logits in tiles of BLOCK_V
        pass 1  online max and sum: m' = max(m, tile), s = s e^(m - m') + sum e^(tile - m')   (arXiv:1805.02867)
        pass 2  scale * (e^(logit - lse) (1 + 2 z_loss lse) - onehot), written over the logits; mostly from the L2 cache

Sums are float32; the logits have hidden's dtype, as a linear layer's have. weight's gradient is summed in weight's dtype
(float32 master weights: float32), rounded once a chunk, so there are never more than MAX_CHUNKS chunks. Bytes beside the
products: 2 reads and 1 write of the logits. Ignored tokens get zeros but are not left out: counting them would wait for the
GPU; leave them out before the call where most are ignored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch, next_power_of_2, warps_for

BLOCK_V = 8192  # 16 elements a thread with 16 warps; not measured yet (no GPU at hand)
CHUNK_BYTES = 256 << 20  # 1,024 tokens of V 128k in bfloat16: 1/16 of the logits of 16k tokens; not measured yet
MAX_CHUNKS = 16


@triton.jit
def cross_entropy_rows(
    logits, targets, row_scale, losses, V, stride, stride_scale, ignore_index, z_loss,
    NEED_GRAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * stride
    cols = tl.arange(0, BLOCK_V)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if NEED_GRAD:
            for start in range(0, V, BLOCK_V):
                zeros = tl.zeros((BLOCK_V,), tl.float32)
                tl.store(logits + start + cols, zeros, mask=start + cols < V)
        return
    inside = (target >= 0) & (target < V)
    label = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
    top = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK_V):
        tile = tl.load(logits + start + cols, mask=start + cols < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(tile, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(tile - higher), 0)
        top = higher
    lse = top + tl.log(total)
    tl.store(losses + row, lse - label + z_loss * lse * lse)
    if NEED_GRAD:
        scale = tl.load(row_scale + row * stride_scale).to(tl.float32)
        factor = scale * (1 + 2 * z_loss * lse)
        for start in range(0, V, BLOCK_V):
            keep = start + cols < V
            tile = tl.load(logits + start + cols, mask=keep, other=0.0).to(tl.float32)
            grad = tl.exp(tile - lse) * factor - tl.where(start + cols == target, scale, 0.0)
            tl.store(logits + start + cols, grad, mask=keep)


def chunk_rows(N: int, V: int, itemsize: int) -> int:
    """Tokens a chunk: CHUNK_BYTES of logits, more where that would make more than MAX_CHUNKS chunks, in whole 128s."""
    rows = max(CHUNK_BYTES // (V * itemsize), cdiv(N, MAX_CHUNKS))
    return max(128, rows // 128 * 128)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where total may be float32 beside half-precision factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # the interpreter's CPU has no product of mixed precision
        total += a.to(total.dtype) @ b.to(total.dtype)


@torch.library.custom_op("graft::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D) in hidden's dtype
    targets: Tensor,  # (N,) int64
    row_scale: Tensor,  # (N,) or (1,)
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's loss and the gradients of hidden and weight; empty ones where they aren't wanted."""
    N, V = hidden.shape[0], weight.shape[0]
    losses = torch.empty(N, dtype=torch.float32, device=hidden.device)
    d_hidden = torch.empty_like(hidden if need_hidden else hidden[:0])
    d_weight = torch.zeros_like(weight if need_weight else weight[:0], dtype=weight_dtype)
    step = chunk_rows(N, V, hidden.element_size())
    block = min(BLOCK_V, next_power_of_2(V))
    buffer = hidden.new_empty(min(step, N), V)
    for start in range(0, N, step):
        part = slice(start, min(start + step, N))
        h = hidden[part]
        logits = torch.mm(h, weight.T, out=buffer[: len(h)])
        per_row = row_scale.numel() > 1
        launch(
            cross_entropy_rows, (len(h),), logits, targets[part], row_scale[part] if per_row else row_scale, losses[part],
            V, logits.stride(0), int(per_row), ignore_index, z_loss,
            NEED_GRAD=need_hidden or need_weight, BLOCK_V=block, num_warps=max(4, warps_for(block)),
        )  # fmt: skip
        if need_hidden:
            torch.mm(logits, weight, out=d_hidden[part])
        if need_weight:
            add_product_(d_weight, logits.T, h)
    return losses, d_hidden, d_weight


@linear_cross_entropy_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_scale: Tensor,
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    d_hidden = torch.empty_like(hidden if need_hidden else hidden[:0])
    return losses, d_hidden, torch.empty_like(weight if need_weight else weight[:0], dtype=weight_dtype)


def chunked_pass_triton(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D) in hidden's dtype
    targets: Tensor,  # (N,) int64
    row_scale: Tensor,  # (N,) or (1,): d result / d loss of each token
    *,
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same function as `chunked_pass`."""
    losses, d_hidden, d_weight = linear_cross_entropy_op(
        hidden.contiguous(),
        weight.contiguous(),
        targets.contiguous(),
        row_scale.contiguous(),
        ignore_index,
        z_loss,
        need_hidden,
        need_weight,
        weight_dtype,
    )
    return losses, d_hidden if need_hidden else None, d_weight if need_weight else None
