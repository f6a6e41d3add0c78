"""Attention of new tokens over keys and values that lie in pages."""

import math

import torch
from torch import Tensor

from ..checks import readable
from ..dispatch import Backend, choose_backend, name_of
from .reference import paged_attention_reference
from .torch_paged_attention import paged_attention_torch

MAX_QUERIES = 256  # of the Triton kernel: T times the heads that share a kv head, one tile


def paged_attention(
    q: Tensor,  # (B, H, T, Dh), the row's T newest tokens
    keys: Tensor,  # (n_pages, K, P, Dh), P tokens a page; H a multiple of K
    values: Tensor,  # (n_pages, K, P, Dh)
    table: Tensor,  # (B, n) int32: row b's j-th page is table[b, j]
    lengths: Tensor,  # (B,) int32: row b's tokens, the T new ones included
    *,
    scale: float | None = None,  # of the scores; None is 1 / sqrt(Dh)
    window: int | None = None,  # a query sees the last `window` keys up to its own
    softcap: float | None = None,  # scores <- softcap * tanh(scores / softcap)
    backend: Backend = "auto",
) -> Tensor:  # (B, H, T, Dh)
    """softmax(q k^T * scale) v, causal, each row's keys found through its page table (PagedAttention, Kwon et al. 2023,
    arXiv:2309.06180, section 4.1, eq. 4). Not differentiable: for decoding.

    Query t of row b is token lengths[b] - T + t. Table entries past a row's pages may be any page, since nothing there is
    seen. Raises ValueError for shapes, dtypes and, on the CPU, for lengths outside [T, n * P] and pages that don't exist.
    """
    _check(q, keys, values, table, lengths, window, softcap)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    chosen = choose_backend("paged_attention", backend, (q, keys, values), unsupported=_triton_limits(q, keys))
    if chosen == "triton":
        from .triton_paged_attention import paged_attention_triton as run
    else:
        run = paged_attention_reference if chosen == "reference" else paged_attention_torch
    return run(q, keys, values, table, lengths, scale=scale, window=window, softcap=softcap)


def _triton_limits(q: Tensor, keys: Tensor) -> str | None:
    """What the Triton kernel doesn't take, or None."""
    _, H, T, Dh = q.shape
    page, n = keys.shape[2], T * (H // keys.shape[1])
    if page & (page - 1) or page < 16:
        return f"it takes pages of 16, 32, 64 ... tokens, got {page}; use backend='torch'"
    if not 16 <= Dh <= 256:
        return f"it takes head sizes 16 to 256, got {Dh}; use backend='torch'"
    if n > MAX_QUERIES:
        return f"it takes T * H / K <= {MAX_QUERIES}, got {n}; use backend='torch'"
    return None


def _check(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    window: int | None,
    softcap: float | None,
) -> None:
    if q.ndim != 4 or keys.ndim != 4 or keys.shape != values.shape or q.shape[3] != keys.shape[3]:
        shapes = f"q {tuple(q.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}"
        raise ValueError(f"paged_attention takes q (B, H, T, Dh) and keys, values (n_pages, K, P, Dh), got {shapes}")
    B, H, T, _ = q.shape
    if keys.shape[1] == 0 or H % keys.shape[1]:
        raise ValueError(f"{H} query heads are not a multiple of {keys.shape[1]} kv heads")
    if not q.dtype == keys.dtype == values.dtype or not q.device == keys.device == values.device:
        raise ValueError(
            f"q is {name_of(q.dtype)} on {q.device}, keys are {name_of(keys.dtype)} on {keys.device}, values "
            f"{name_of(values.dtype)} on {values.device}; convert them to one dtype and device"
        )
    for name, tensor, shape in (("table", table, (B, table.shape[-1])), ("lengths", lengths, (B,))):
        if tensor.shape != shape or tensor.dtype not in (torch.int32, torch.int64) or tensor.device != q.device:
            raise ValueError(
                f"{name} is {name_of(tensor.dtype)} {tuple(tensor.shape)} on {tensor.device}; "
                f"it must be int32 with {B} rows on {q.device}"
            )
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be >= 1; leave it None for no window")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be > 0; leave it None for no cap")
    if readable(lengths) and readable(table) and B:
        low, high, limit = int(lengths.min()), int(lengths.max()), table.shape[1] * keys.shape[2]
        if low < T or high > limit:
            raise ValueError(f"lengths span {low}..{high}; each must be in {T}..{limit}, from T to what the pages hold")
        if table.numel() and not (int(table.min()) >= 0 and int(table.max()) < keys.shape[0]):
            raise ValueError(
                f"table names pages {int(table.min())}..{int(table.max())}; there are 0..{keys.shape[0] - 1}"
            )
