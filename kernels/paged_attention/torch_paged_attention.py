"""Paged attention by PyTorch: the rows' pages side by side, then attention with a mask. Moves every key and value twice."""

import torch
from torch import Tensor

from ..attention.masked import attention_masked


def paged_attention_torch(
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
    """The same function as `paged_attention_reference`."""
    B, _, T, Dh = q.shape
    K, page = keys.shape[1:3]
    S = table.shape[1] * page
    flat = table.reshape(-1).long()
    k, v = (
        pages.index_select(0, flat).view(B, -1, K, page, Dh).transpose(1, 2).reshape(B, K, S, Dh)
        for pages in (keys, values)
    )
    column = torch.arange(S, device=q.device)  # (S,)
    last = lengths.long()[:, None, None] - T + torch.arange(T, device=q.device)[:, None]  # (B, T, 1)
    seen = column <= last
    if window is not None:
        seen &= column > last - window
    mask = torch.zeros(B, 1, T, S, dtype=q.dtype, device=q.device).masked_fill_(~seen[:, None], -torch.inf)
    return attention_masked(q, k, v, mask, scale=scale, softcap=softcap)
