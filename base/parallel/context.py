"""Context parallel: the positions of each row are spread over ranks; keys and values go round a ring.

Ring attention (Liu et al. 2023, arXiv:2310.01889): each rank keeps its queries; in n - 1 steps every rank's keys and values pass
by, and the blocks' outputs are merged by their log-sum-exps. In the backward pass keys and values go round again with their
gradients, which end where they began.

A causal row gives late positions more work than early ones. Where 2 n divides the length, a rank therefore has one chunk from the
front and one from the back (Brandon et al. 2023, arXiv:2311.09431; Llama 3, arXiv:2407.21783, section 3.3.2):

    n = 2, chunks 0 1 2 3      rank 0: 0 and 3      rank 1: 1 and 2

Axes: B batch, H query heads, K kv heads, T a rank's positions, Dh head.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocks import Block, Rules, attend_block, block_gradients, merge


@dataclass(frozen=True)
class Ring:
    """The ranks that share each row, and this one's part of the positions."""

    group: dist.ProcessGroup
    balanced: bool  # two chunks a rank, one from each end; else one, in order

    @property
    def n(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def chunks(self, rank: int) -> list[int]:
        """Which of the row's chunks a rank has, in the order in which it holds them."""
        return [rank, 2 * self.n - 1 - rank] if self.balanced else [rank]

    def own(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """This rank's positions of whole rows, (B, n T) -> (B, T)."""
        pieces = tensor.chunk(2 * self.n if self.balanced else self.n, dim)
        return torch.cat([pieces[i] for i in self.chunks(self.rank)], dim)

    def filled(self, tensor: Tensor, value: int) -> Tensor:
        """Whole rows (B, length), with `value` behind them up to a length that the ranks can share."""
        missing = -tensor.shape[1] % ((2 if self.balanced else 1) * self.n)
        return torch.cat([tensor, tensor.new_full((len(tensor), missing), value)], 1)

    def positions(self, T: int, rank: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Where a rank's T positions lie in the whole row, (T,) int64."""
        chunks = self.chunks(self.rank if rank is None else rank)
        size = T // len(chunks)
        return torch.cat([torch.arange(i * size, (i + 1) * size, device=device) for i in chunks])

    def attend(
        self,
        q: Tensor,  # (B, H, T, Dh), of this rank's positions
        k: Tensor,  # (B, K, T, Dh)
        v: Tensor,
        *,
        window: int | None = None,
        cu_seqlens: Tensor | None = None,  # (n_docs + 1,) int32, of the whole row
        scale: float | None = None,  # of the scores; None is 1 / sqrt(Dh)
        softcap: float | None = None,
    ) -> Tensor:  # (B, H, T, Dh)
        """Causal attention of this rank's queries over the whole rows: what kernels.attention gives on one rank.

        Every rank of the ring must call it at the same time. Under autocast q, k and v are cast to its dtype first.
        """
        if torch.is_autocast_enabled(q.device.type):
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        documents = document_ids(cu_seqlens, self.n * q.shape[2])
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        return RingAttention.apply(q, k, v, self, Rules(scale, softcap, window, documents))

    def pass_on(self, tensors: tuple[Tensor, ...]) -> "Travelling":
        """Start sending tensors to the right neighbour and receiving as many of the same shapes from the left."""
        if self.n == 1:
            return Travelling(tensors, tensors, [])
        right, left = ((self.rank + step) % self.n for step in (1, -1))
        received = tuple(torch.empty_like(tensor) for tensor in tensors)
        operations = [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=right) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=left) for tensor in received]
        return Travelling(tensors, received, dist.batch_isend_irecv(operations))

    def blocks(self, other: int, T: int, rules: Rules) -> Iterator[Block]:
        """The parts of this rank's queries x rank `other`'s keys that are not all hidden."""
        query_chunks, key_chunks = self.chunks(self.rank), self.chunks(other)
        size = T // len(query_chunks)
        for i, query_chunk in enumerate(query_chunks):
            for j, key_chunk in enumerate(key_chunks):
                at = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                block = Block.between(query_chunk, key_chunk, at, rules)
                if block is not None:
                    yield block


@dataclass(frozen=True)
class Travelling:
    """Tensors on their way round the ring."""

    sent: tuple[Tensor, ...]  # kept until they have gone
    received: tuple[Tensor, ...]
    works: list[Any]

    def arrive(self) -> tuple[Tensor, ...]:
        """Wait for both directions."""
        for work in self.works:
            work.wait()
        return self.received


class RingAttention(torch.autograd.Function):
    """softmax of the scores times v, over all ranks' keys; keeps q, k, v, the output and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring, rules: Rules) -> Tensor:
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=torch.float32)
        lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device)  # (B, H, T) nats
        keys, values = k.contiguous(), v.contiguous()
        for step in range(ring.n):
            travelling = ring.pass_on((keys, values)) if step < ring.n - 1 else None
            for block in ring.blocks((ring.rank - step) % ring.n, q.shape[2], rules):
                part = attend_block(block, q, keys, values)
                merge(out[:, :, block.queries], lse[:, :, block.queries], *part)
            if travelling is not None:
                keys, values = travelling.arrive()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.rules = ring, rules
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        dq = torch.zeros_like(q, dtype=torch.float32)
        keys, values = k.contiguous(), v.contiguous()
        gradients = None  # of the keys and values at hand, from the ranks that they have passed: on their way
        for step in range(ring.n):
            travelling = ring.pass_on((keys, values)) if step < ring.n - 1 else None
            dk, dv = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (keys, values))
            for block in ring.blocks((ring.rank - step) % ring.n, q.shape[2], ctx.rules):
                parts = block_gradients(block, d_out, q, keys, values, out, lse)
                dq[:, :, block.queries] += parts[0]
                dk[:, :, block.keys] += parts[1]
                dv[:, :, block.keys] += parts[2]
            if gradients is not None:
                dk, dv = (own.add_(earlier) for own, earlier in zip((dk, dv), gradients.arrive(), strict=True))
            gradients = ring.pass_on((dk, dv))
            if travelling is not None:
                keys, values = travelling.arrive()
        assert gradients is not None
        dk, dv = gradients.arrive()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def document_ids(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """The document of each position of the whole row, (length,) int64; -1 past the last one, which nobody sees."""
    if cu_seqlens is None:
        return None
    found = torch.bucketize(torch.arange(length, device=cu_seqlens.device), cu_seqlens[1:], right=True)
    return found.masked_fill(found == len(cu_seqlens) - 1, -1)


def ring_bytes(
    *,
    n: int,  # ranks of the ring
    T: int,  # a rank's positions
    rows: int,
    n_kv_heads: int,
    d_head: int,
    element_bytes: int = 4,  # of keys and values; their gradients travel in float32
    recomputed: bool = False,  # activation checkpointing runs the forward pass twice
) -> int:
    """Bytes that a rank sends for one attention layer, forward and backward: 2 B K T Dh numbers, n - 1 hops for keys and values
    each way, n hops for their gradients."""
    numbers = 2 * rows * n_kv_heads * T * d_head
    return numbers * ((n - 1) * element_bytes * (3 if recomputed else 2) + n * 4) if n > 1 else 0
