"""Linear layer + cross entropy in chunks of tokens, from PyTorch operators, for the CPU.

Only one (chunk, V) block of logits exists at a time. While it is there it becomes its own gradient in place,

    d loss / d logits = softmax(logits) * (1 + 2 z_loss lse) - onehot(target),

and is multiplied into the gradients of hidden and weight at once, so the backward pass only scales them: 3 matrix products,
as autograd does, and no logits kept. Ignored tokens are left out of every product. bench.py prints memory and time.
"""

import torch
from torch import Tensor

from ..checks import accumulator, readable
from ..cpu_loops import has_memory
from ..dispatch import sampled

# Bytes of float32 logits; 2048 x 256 x 8192, one core: 378 ms at 2 MB, 306 at 16, 318 at 32; plain 434.
CHUNK_BYTES = 16 << 20
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
    loops: bool = False,  # whether the compiled CPU loops take the softmax and its gradient
    weight_dtype: torch.dtype,  # what the caller's weight has; the sum here is float32 at least whatever it is
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Each token's loss (N,), 0 where ignored, and the gradients wanted."""
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
    for rows in sampled(kept.split(block)):
        h, weigh = hidden[rows], keep[rows].to(wide)  # (C, D), (C,)
        label = targets[rows].where(keep[rows], 0)  # (C,)
        p = torch.mm(h, weight.T, out=logits[: len(rows)]).to(wide)  # (C, V), logits now; soon their gradient
        scale = (row_scale[rows] if row_scale.numel() > 1 else row_scale) * weigh  # (C,)
        wanted = d_hidden is not None or d_weight is not None
        if loops and wanted and has_memory(p):
            from .numba_cross_entropy import softmax_and_gradient_

            row_losses = torch.empty_like(weigh)
            softmax_and_gradient_(p, label, scale, weigh, row_losses, z_loss=z_loss)
            losses[rows] = row_losses
        else:
            losses[rows] = _softmax_and_gradient_(p, label, scale, weigh, z_loss, gradient=wanted)
        if not wanted:
            continue
        p = p.to(h.dtype)
        if d_hidden is not None:
            d_hidden[rows] = p @ weight
        if d_weight is not None and d_weight.dtype == h.dtype:
            d_weight.addmm_(p.T, h)
        elif d_weight is not None:
            d_weight += p.T @ h
    return losses, d_hidden, d_weight


def _softmax_and_gradient_(
    logits: Tensor,  # (C, V)
    label: Tensor,  # (C,)
    scale: Tensor,  # (C,)
    weigh: Tensor,  # (C,)
    z_loss: float,
    *,
    gradient: bool,  # whether the logits become their gradient; else they are probabilities times a factor afterwards
) -> Tensor:
    """Each row's loss (C,); what numba_cross_entropy.softmax_and_gradient_ computes, from PyTorch operators."""
    label, p = label.unsqueeze(1), logits  # (C, 1)
    label_logit = p.gather(1, label)
    top = p.amax(1, keepdim=True)
    total = p.sub_(top).exp_().sum(1, keepdim=True)
    lse = top + total.log()  # (C, 1)
    if gradient:
        scale = scale.unsqueeze(1)
        p.mul_(scale * (1 + 2 * z_loss * lse) / total)
        p.scatter_add_(1, label, -scale)
    return (lse - label_logit + z_loss * lse.square()).squeeze(1) * weigh
