"""Attention over a sequence that is spread over ranks, by hand (Ring Attention, Liu et al. 2023, arXiv:2310.01889, section 3).

Each rank has T positions' queries, keys and values. Keys and values go round a ring; each rank attends to what passes by and keeps
a running softmax (Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3): the largest score so far, the sum of the exponentials,
and the output under them.

    n = 3          step 0          step 1          step 2
    rank 0      q0 x k0 v0      q0 x k2 v2      q0 x k1 v1
    rank 1      q1 x k1 v1      q1 x k0 v0      q1 x k2 v2
    rank 2      q2 x k2 v2      q2 x k1 v1      q2 x k0 v0

No rank ever holds more than one rank's keys beside its own. Gradients are autograd's: what a rank receives from the left, it sends
the gradient of to the left. base/parallel/context.py is the form for training, which keeps no scores and balances causal rows.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PassRight(torch.autograd.Function):
    """The left neighbour's tensor; backward the right neighbour's gradient. Every rank calls it at the same time."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        del ctx
        return shifted(tensor, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return shifted(grad, -1)


def shifted(tensor: Tensor, step: int) -> Tensor:
    """Send a tensor `step` ranks on round the ring, and return the one that comes from as far back."""
    rank, n = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    operations = [
        dist.P2POp(dist.isend, tensor.contiguous(), (rank + step) % n),
        dist.P2POp(dist.irecv, received, (rank - step) % n),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


def ring_attention(
    q: Tensor,  # (B, H, T, Dh): this rank's positions, rank r's are r T to (r + 1) T - 1 of the row
    k: Tensor,  # (B, H, T, Dh)
    v: Tensor,
    *,
    causal: bool = True,
) -> Tensor:  # (B, H, T, Dh)
    """softmax(q k^T / sqrt(Dh)) v over the keys of all ranks."""
    rank, n, T = dist.get_rank(), dist.get_world_size(), q.shape[2]
    highest = torch.full((*q.shape[:3], 1), -math.inf)  # largest score so far
    total, out = torch.zeros_like(highest), torch.zeros_like(q)
    positions = torch.arange(T)
    for step in range(n):
        owner = (rank - step) % n  # of the keys at hand
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, T)
        if causal:
            hidden = owner * T + positions > rank * T + positions[:, None]
            scores = scores.masked_fill(hidden, -math.inf)
        new = torch.maximum(highest, scores.amax(-1, keepdim=True))  # finite: step 0 holds each query's own key
        weights, kept = (scores - new).exp(), (highest - new).exp()
        total = total * kept + weights.sum(-1, keepdim=True)
        out = out * kept + weights @ v
        highest = new
        if step < n - 1:
            k, v = PassRight.apply(k), PassRight.apply(v)
    return out / total
