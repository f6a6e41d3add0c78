"""Attention written out: the truth that the other backends are tested against. Axes: B H T Dh, K kv heads, S keys."""

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,  # (B, H, T, Dh)
    k: Tensor,  # (B, K, S, Dh), H a multiple of K: query head h reads kv head h // (H / K)
    v: Tensor,  # (B, K, S, Dh)
    *,
    causal: bool = True,
    scale: float,  # of the scores, 1 / sqrt(Dh) as a rule
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,  # (n_docs + 1,) int32
    key_lengths: Tensor | None = None,  # (B,) int32
) -> Tensor:  # (B, H, T, Dh)
    """softmax(q k^T * scale) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), scores held in full: O(T S) memory.

    Computes in float32 (float64 for float64 inputs), autocast or not. A row that sees no key is zero.
    Soft-capping is Gemma 2's, scores <- softcap * tanh(scores / softcap) (arXiv:2408.00118, section 2).
    """
    B, H, T, Dh = q.shape
    K, S = k.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        queries = q.to(dtype).reshape(B, K, H // K, T, Dh)
        scores = torch.einsum("bkgtd,bksd->bkgts", queries, k.to(dtype)) * scale  # (B, K, H/K, T, S)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mask = visible(T, S, q.device, causal=causal, window=window, cu_seqlens=cu_seqlens, key_lengths=key_lengths)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        weights = scores.softmax(-1)
        if mask is not None:  # the softmax of a row of -inf is NaN; masked_fill also stops its gradient
            weights = weights.masked_fill(~mask[:, None, None], 0.0)
        out = torch.einsum("bkgts,bksd->bkgtd", weights, v.to(dtype))
    return out.reshape(B, H, T, Dh).to(q.dtype)


def visible(
    T: int,
    S: int,
    device: torch.device,
    *,
    causal: bool,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor | None:
    """Which keys each query may see: bool (B or 1, T, S), or None where every query sees every key.

    Query t stands at key position p = t + S - T (bottom right), or t + key_lengths[b] - T. Causal: keys <= p.
    Window w: keys > p - w. cu_seqlens: keys of the query's own document; tokens past its last entry are in none.
    """
    if not causal and cu_seqlens is None and key_lengths is None:
        return None
    key = torch.arange(S, device=device)[None, None, :]  # (1, 1, S)
    ends = torch.full((1,), S, device=device) if key_lengths is None else key_lengths.to(device, torch.int64)  # (B,)
    position = torch.arange(T, device=device)[None, :, None] + (ends - T)[:, None, None]  # (B, T, 1)
    mask = (key < ends[:, None, None]).expand(-1, T, -1)
    if causal:
        mask = mask & (key <= position)
    if window is not None:
        mask = mask & (key > position - window)
    if cu_seqlens is not None:
        borders = cu_seqlens.to(device, torch.int64)
        document = torch.searchsorted(borders, torch.arange(T, device=device), right=True)  # (T,), from 1
        mask = mask & (document[:, None] == document[None, :]) & (document[None, :] < borders.numel())
    return mask
