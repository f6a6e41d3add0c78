"""Paged attention written out: the truth that the other backends are tested against."""

import torch
from torch import Tensor


def paged_attention_reference(
    q: Tensor,  # (B, H, T, Dh)
    keys: Tensor,  # (n_pages, K, P, Dh)
    values: Tensor,
    table: Tensor,  # (B, n) int
    lengths: Tensor,  # (B,) int
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # (B, H, T, Dh)
    """Row by row and query by query: gather the row's tokens, softmax(q k^T * scale) v (arXiv:1706.03762, eq. 1) in float32
    over those that the query sees (float64 for float64 inputs)."""
    B, H, T, _ = q.shape
    group, page = H // keys.shape[1], keys.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q)
    for b in range(B):
        for t in range(T):
            last = int(lengths[b]) - T + t
            first = 0 if window is None else max(0, last + 1 - window)
            places = [(int(table[b, s // page]), s % page) for s in range(first, last + 1)]
            k = torch.stack([keys[p, :, i] for p, i in places], dim=1).to(dtype)  # (K, S, Dh)
            v = torch.stack([values[p, :, i] for p, i in places], dim=1).to(dtype)
            for h in range(H):
                scores = k[h // group] @ q[b, h, t].to(dtype) * scale  # (S,)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.softmax(-1)
                out[b, h, t] = (weights @ v[h // group]).to(q.dtype)
    return out
