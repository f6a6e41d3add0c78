"""One block of ring attention: some queries over some keys, its log-sum-exp, and how two blocks are merged.

Axes: B batch, H query heads, K kv heads, G = H / K, T queries, S keys, Dh head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.dispatch import choose_backend


@dataclass(frozen=True)
class Rules:
    """How scores are made and which of them count, in the whole row."""

    scale: float
    softcap: float | None  # scores <- softcap * tanh(scores / softcap)
    window: int | None  # a query sees so many keys up to its own
    documents: Tensor | None  # of each position of the row, (n T,) int64; -1: seen by none


@dataclass(frozen=True)
class Block:
    """Which queries see which keys."""

    rules: Rules
    queries: slice  # of the rank's positions
    keys: slice
    seen: Tensor | None  # (T, S) bool; None: all, or with `causal` all up to each query's own
    causal: bool

    @classmethod
    def between(
        cls,
        query_chunk: int,  # numbered from the row's start, as key_chunk
        key_chunk: int,
        at: tuple[slice, slice],  # where the two chunks lie in the ranks' tensors
        rules: Rules,
    ) -> "Block | None":
        """The block of two chunks; None when nothing is seen."""
        size, window, documents = at[0].stop - at[0].start, rules.window, rules.documents
        if key_chunk > query_chunk:
            return None
        if window is not None and (query_chunk - key_chunk - 1) * size + 1 >= window:
            return None  # even the last key is too far back for the first query
        if documents is None and (window is None or window >= (query_chunk - key_chunk + 1) * size):
            return cls(rules, *at, seen=None, causal=query_chunk == key_chunk)
        device = documents.device if documents is not None else "cpu"
        steps = torch.arange(size, device=device)
        query, key = query_chunk * size + steps[:, None], key_chunk * size + steps  # (T, 1), (S,)
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        if documents is not None:
            seen &= (documents[query] == documents[key]) & (documents[key] >= 0)
        return cls(rules, *at, seen=seen, causal=False)

    def hidden(self, T: int, S: int, device: torch.device) -> Tensor | None:
        """(T, S) bool: what the queries do not see; None: nothing."""
        if self.seen is not None:
            return ~self.seen.to(device)
        return torch.ones(T, S, dtype=torch.bool, device=device).triu(1) if self.causal else None


def attend_block(block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The block's output (B, H, T, Dh) and log-sum-exp (B, H, T) in nats, both float32; -inf and 0 where nothing is seen."""
    rules = block.rules
    q, k, v = q[:, :, block.queries], k[:, :, block.keys], v[:, :, block.keys]
    if uses_triton(block, q):
        from ...kernels.attention.triton_attention import forward

        out, lse2 = forward(q, k, v, None, None, block.causal, rules.scale, None, rules.softcap)
        return out.float(), lse2 * math.log(2)
    scores = block_scores(block, q, k)  # (B, K, G, T, S)
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - finite(lse)[..., None]) @ v[:, :, None].float()
    return out.flatten(1, 2), lse.flatten(1, 2)


def block_gradients(
    block: Block, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of dq (B, H, T, Dh), dk and dv (B, K, S, Dh), float32; `out` and `lse` are those of all blocks together.

    FlashAttention-2 (Dao 2023, arXiv:2307.08691), section 3.1.2: P = exp(S - lse), dV = P^T dO, dS = P (dO V^T - rowsum(dO O)).
    """
    q, d_out, out, lse = (tensor[:, :, block.queries] for tensor in (q, d_out, out, lse))
    k, v = k[:, :, block.keys], v[:, :, block.keys]
    rules = block.rules
    if uses_triton(block, q):
        from ...kernels.attention.triton_attention import backward

        lse2 = (lse / math.log(2)).contiguous()
        parts = backward(d_out, q, k, v, out, lse2, None, None, block.causal, rules.scale, None, rules.softcap)
        return parts[0].float(), parts[1].float(), parts[2].float()
    K = k.shape[1]
    groups = d_out.float().unflatten(1, (K, -1))  # (B, K, G, T, Dh)
    scores = block_scores(block, q, k)  # (B, K, G, T, S)
    weights = torch.exp(scores - finite(lse).unflatten(1, (K, -1))[..., None])
    delta = (d_out.float() * out.float()).sum(-1).unflatten(1, (K, -1))[..., None]
    d_scores = weights * (groups @ v[:, :, None].float().mT - delta) * rules.scale
    if rules.softcap is not None:  # tanh' = 1 - tanh^2; where hidden, the weight is 0
        d_scores = d_scores * (1 - (scores.masked_fill(scores == -math.inf, 0.0) / rules.softcap).square())
    dq = (d_scores @ k[:, :, None].float()).flatten(1, 2)
    dk = (d_scores.mT @ q.float().unflatten(1, (K, -1))).sum(2)
    return dq, dk, (weights.mT @ groups).sum(2)


def block_scores(block: Block, q: Tensor, k: Tensor) -> Tensor:
    """q k^T * scale under the soft cap, (B, K, G, T, S) float32, -inf where it is hidden."""
    rules = block.rules
    scores = q.float().unflatten(1, (k.shape[1], -1)) @ k[:, :, None].float().mT * rules.scale
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    hidden = block.hidden(q.shape[2], k.shape[2], q.device)
    return scores if hidden is None else scores.masked_fill(hidden, -math.inf)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a block to what was merged before, in place: softmax over both, from each one's log-sum-exp."""
    both = finite(torch.logaddexp(lse, part_lse))
    out.mul_(torch.exp(lse - both)[..., None]).add_(torch.exp(part_lse - both)[..., None] * part)
    lse.copy_(torch.logaddexp(lse, part_lse))


def finite(lse: Tensor) -> Tensor:
    """0 in place of -inf, where a query sees nothing: exp(-inf - 0) is 0, exp(-inf + inf) is not a number."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def uses_triton(block: Block, q: Tensor) -> bool:
    """Whether our attention kernels run this block: on a GPU, with no mask but the causal one."""
    if not q.is_cuda or block.seen is not None or not 16 <= q.shape[-1] <= 256:
        return False
    return choose_backend("attention", "auto", (q,)) == "triton"
