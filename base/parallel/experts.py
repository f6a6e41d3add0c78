"""Expert parallel: each rank owns some of a mixture's experts; tokens travel to the owners and back by all-to-all.

GShard (Lepikhin et al. 2020, arXiv:2006.16668, section 3.2), without a capacity: what is sent has the length that the router asks
for, so no token is dropped. Ranks read different rows, so the mixture's matrices are the only weights that differ between them.

    rank 0's tokens   sorted by expert | e0 e1 | e2 e3 |       all-to-all        rank 0: e0 e1 of both ranks' tokens
    rank 1's tokens   sorted by expert | e0 e1 | e2 e3 |          -->            rank 1: e2 e3 of both ranks' tokens

Axes: M rows (a token for each of its experts), E experts in all, n ranks, D model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..model.experts import Permute


@dataclass(frozen=True)
class Owners:
    """The ranks among which the experts are dealt, in order: rank r owns experts r E / n to (r + 1) E / n - 1."""

    group: dist.ProcessGroup

    def __call__(
        self,
        rows: Tensor,  # (M, D), sorted by expert
        ends: Tensor,  # (E,) int32, one past each expert's last row
        run: Callable[[Tensor, Tensor], Tensor],  # this rank's experts: rows sorted by expert, ends (E / n,) int32
    ) -> Tensor:
        """What each row's expert makes of it, (M, D). Every rank of the group must call it at the same time."""
        n = self.group.size()
        counts = ends.to(torch.int64).diff(prepend=ends.new_zeros(1, dtype=torch.int64))  # (E,) rows of each expert
        received_counts = torch.empty_like(counts)  # (n E/n,): from each rank, for each of this rank's experts
        dist.all_to_all_single(received_counts, counts, group=self.group)
        n_sent, n_received = (c.view(n, -1).sum(1).tolist() for c in (counts, received_counts))
        received = AllToAll.apply(rows, n_sent, n_received, self.group)  # sorted by (rank, expert)
        order, inverse, own_ends = sort_received(received_counts.view(n, -1))
        made = run(Permute.apply(received, order, inverse), own_ends)
        return AllToAll.apply(Permute.apply(made, inverse, order), n_received, n_sent, self.group)


class AllToAll(torch.autograd.Function):
    """Send the first n_sent[0] rows to rank 0, the next n_sent[1] to rank 1, ...; get n_received[r] from rank r, in rank order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, n_sent: list[int], n_received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.options = n_sent, n_received, group
        received = rows.new_empty(sum(n_received), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), n_received, n_sent, group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        n_sent, n_received, group = ctx.options
        returned = grad.new_empty(sum(n_sent), *grad.shape[1:])
        dist.all_to_all_single(returned, grad.contiguous(), n_sent, n_received, group=group)
        return returned, None, None, None


def sort_received(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """counts (n, E/n) of rows sorted by (rank, expert) -> order and inverse (M,) int64 that sort them by (expert, rank), and the
    experts' ends (E/n,) int32."""
    n, n_own = counts.shape
    expert = torch.arange(n_own, device=counts.device).repeat(n).repeat_interleave(counts.flatten())  # (M,)
    order = expert.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, inverse, counts.sum(0).cumsum(0).to(torch.int32)


def expert_bytes(
    *,
    n: int,  # ranks of the group
    n_rows_away: int,  # rows that this rank sends to other ranks, and rows that it gets from them
    n_experts: int,
    d_model: int,
    element_bytes: int = 4,
    recomputed: bool = False,  # activation checkpointing runs the forward pass twice
) -> int:
    """Bytes that a rank sends for one mixture, forward and backward: a row goes out once and comes back once in each pass, so
    that every row away is D numbers sent by this rank; and each forward pass tells the other ranks 8-byte counts."""
    n_forward = 2 if recomputed else 1
    return n_forward * 8 * n_experts * (n - 1) // n + (n_forward + 1) * n_rows_away * d_model * element_bytes
