"""Linear layer + cross entropy in chunks of tokens, from PyTorch operators, for the CPU.

Only one (chunk, V) block of logits exists at a time. While it is there it becomes its own gradient in place,

    d loss / d logits = softmax(logits) * (1 + 2 z_loss lse) - onehot(target),

and is multiplied into the gradients of hidden and weight at once, so the backward pass only scales them: 3 matrix products,
as autograd does, and no logits kept. Ignored tokens are left out of every product. bench.py prints memory and time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import accumulator, readable

CHUNK_BYTES = (
    16 << 20
)  # of float32 logits; 2048 x 256 x 8192, one core: 378 ms at 2 MB, 306 at 16, 318 at 32; plain 434
MIN_ROWS = 128  # each chunk reads and writes weight's gradient, so a large V must not leave tiny chunks


def chunk_rows(V: int) -> int:
    """Tokens a chunk."""
    return max(MIN_ROWS, CHUNK_BYTES // (4 * V))


def chunked_pass(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D) in hidden's dtype
    targets: Tensor,  # (N,) int64
    row_scale: Tensor,  # (N,) or (1,): d result / d loss of each token
    *,
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Each token's loss (N,), 0 where ignored, and the gradients wanted: hidden's, and weight's in the accumulator's dtype."""
    N, V = hidden.shape[0], weight.shape[0]
    wide = accumulator(hidden.dtype)
    losses = hidden.new_zeros(N, dtype=wide)
    d_hidden = torch.zeros_like(hidden) if need_hidden else None
    d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
    keep = targets != ignore_index
    # Without values to look at (FakeTensor, torch.compile) every row is computed; the ignored ones weigh 0.
    kept = keep.nonzero().squeeze(1) if readable(targets) else torch.arange(N, device=targets.device)
    block = chunk_rows(V)
    logits = hidden.new_empty(min(block, kept.shape[0]), V)  # one buffer: a fresh one each time costs its page faults
    for rows in kept.split(block):
        h, weigh = hidden[rows], keep[rows].to(wide)  # (C, D), (C,)
        label = targets[rows].where(keep[rows], 0).unsqueeze(1)  # (C, 1)
        p = torch.mm(h, weight.T, out=logits[: len(rows)]).to(wide)  # (C, V), logits now; soon probabilities
        label_logit = p.gather(1, label)
        top = p.amax(1, keepdim=True)
        total = p.sub_(top).exp_().sum(1, keepdim=True)
        lse = top + total.log()  # (C, 1)
        losses[rows] = (lse - label_logit + z_loss * lse.square()).squeeze(1) * weigh
        if d_hidden is None and d_weight is None:
            continue
        scale = (row_scale[rows] if row_scale.numel() > 1 else row_scale) * weigh  # (C,)
        scale = scale.unsqueeze(1)
        p.mul_(scale * (1 + 2 * z_loss * lse) / total)
        p.scatter_add_(1, label, -scale)
        p = p.to(h.dtype)
        if d_hidden is not None:
            d_hidden[rows] = p @ weight
        if d_weight is not None and d_weight.dtype == h.dtype:
            d_weight.addmm_(p.T, h)
        elif d_weight is not None:
            d_weight += p.T @ h
    return losses, d_hidden, d_weight


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss and handed over, scaled in place, by the first backward pass.

    A second backward pass, and reduction "none" whose gradient has a factor per token, computes them anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        z_loss: float,
        reduction: str,
        dtype: torch.dtype,  # of the matrix products
        record: bool,  # whether gradients are recorded: forward() itself always runs without
    ) -> Tensor:
        n_labels = (targets != ignore_index).sum().clamp(min=1)
        wide = accumulator(dtype)
        unit = torch.ones(1, dtype=wide, device=hidden.device)
        row_scale = unit / n_labels if reduction == "mean" else unit
        now = record and reduction != "none"
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        ctx.args = (ignore_index, z_loss, reduction, dtype)
        ctx.save_for_backward(hidden, weight, targets)
        losses, d_hidden, d_weight = chunked_pass(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            row_scale,
            ignore_index=ignore_index,
            z_loss=z_loss,
            need_hidden=now and needs_hidden,
            need_weight=now and needs_weight,
        )
        ctx.ready = (d_hidden, d_weight) if now else None
        if reduction == "none":
            return losses
        return losses.sum() * row_scale.squeeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, targets = ctx.saved_tensors
        ignore_index, z_loss, reduction, dtype = ctx.args
        ready, ctx.ready = ctx.ready, None
        if ready is not None:
            d_hidden, d_weight = (None if g is None else g.mul_(grad) for g in ready)
        else:
            if reduction == "mean":
                grad = grad / (targets != ignore_index).sum().clamp(min=1)
            needs_hidden, needs_weight = ctx.needs_input_grad[:2]
            _, d_hidden, d_weight = chunked_pass(
                hidden.to(dtype),
                weight.to(dtype),
                targets,
                grad.reshape(-1),
                ignore_index=ignore_index,
                z_loss=z_loss,
                need_hidden=needs_hidden,
                need_weight=needs_weight,
            )
        d_hidden = None if d_hidden is None else d_hidden.to(hidden.dtype)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None, None


def linear_cross_entropy_torch(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The same function as `linear_cross_entropy_reference`."""
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    with torch.autocast(device, enabled=False):
        return LinearCrossEntropy.apply(
            hidden, weight, targets.long(), ignore_index, z_loss, reduction, dtype, torch.is_grad_enabled()
        )
