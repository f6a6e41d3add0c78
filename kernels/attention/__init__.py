"""attention: exact softmax attention in FlashAttention's memory, with one signature for every backend."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..checks import readable
from ..dispatch import Backend, choose_backend, name_of
from .reference import attention_reference
from .sdpa import attention_torch
from .widths import widened

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: Tensor,  # (B, H, T, Dh)
    k: Tensor,  # (B, K, S, Dh), H a multiple of K
    v: Tensor,  # (B, K, S, Dv), Dv <= Dh
    *,
    causal: bool = True,  # aligned to the bottom right: the last query sees every key, also where T != S
    scale: float | None = None,  # of the scores; None is 1 / sqrt(Dh)
    window: int | None = None,  # a query sees the last `window` keys up to its own; needs causal
    softcap: float | None = None,  # scores <- softcap * tanh(scores / softcap)
    cu_seqlens: Tensor | None = None,  # (n_docs + 1,) int32, from 0: borders of packed documents, B = 1 and T = S
    key_lengths: Tensor | None = None,  # (B,) int32: row b has keys [0, key_lengths[b]), and causal ends there
    backend: Backend = "auto",
) -> Tensor:  # (B, H, T, Dv)
    """softmax(q k^T * scale) v by FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2), or by SDPA.

    A row that may see nothing is zero, and so are its gradients. Equal neighbours in cu_seqlens are empty documents;
    tokens past its last entry belong to none. Narrower values are filled up with zeros, since kernels know one width. Under
    autocast q, k and v are cast to autocast's dtype first.
    Raises ValueError for shapes, dtypes and options that don't fit.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, causal, window, softcap, cu_seqlens, key_lengths)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    chosen = choose_backend("attention", backend, (q, k, v), unsupported=_triton_limits(q.shape[-1], scale))
    if chosen == "triton":
        from .triton_attention import attention_triton as run
    else:
        run = attention_reference if chosen == "reference" else attention_torch
    out = run(
        q,
        k,
        widened(v, k.shape[-1]),
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        cu_seqlens=cu_seqlens,
        key_lengths=key_lengths,
    )
    return out if v.shape[-1] == k.shape[-1] else out[..., : v.shape[-1]]


def _triton_limits(d_head: int, scale: float) -> str | None:
    """What the Triton kernels don't take, or None."""
    if not 16 <= d_head <= 256:
        return f"it takes head sizes 16 to 256, got {d_head}; use backend='torch'"
    if scale <= 0:
        return f"it takes scale > 0, got {scale}; use backend='torch'"
    return None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    softcap: float | None,
    cu_seqlens: Tensor | None,
    key_lengths: Tensor | None,
) -> None:
    """Shapes, dtypes and options, before any backend sees them. Values of tensors are looked at on the CPU only."""
    if q.ndim != 4 or k.ndim != 4 or v.shape[:-1] != k.shape[:-1] or v.shape[-1] > k.shape[-1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(
            f"attention takes q (B, H, T, Dh) and k, v (B, K, S, Dh) of one shape, or narrower v, got {shapes}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head size; "
            "both must be (B, heads, length, Dh)"
        )
    H, K = q.shape[1], k.shape[1]
    if K == 0 or H % K:
        raise ValueError(
            f"{H} query heads are not a multiple of {K} kv heads; repeat or drop kv heads so that they are"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {name_of(tensor.dtype)} on {tensor.device} but q is {name_of(q.dtype)} on {q.device}; "
                "convert them to one dtype and device"
            )
    if q.dtype not in DTYPES:
        raise ValueError(f"attention takes {', '.join(map(name_of, DTYPES))}, got {name_of(q.dtype)}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"window={window} with causal={causal}: it counts the keys up to a query's own, so it must be >= 1 "
            "and needs causal=True; leave it None for no window"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be > 0; leave it None for no cap")
    if cu_seqlens is not None:
        if q.shape[0] != 1 or q.shape[2] != k.shape[2] or key_lengths is not None:
            raise ValueError(
                f"cu_seqlens needs B = 1, T = S and no key_lengths, got B={q.shape[0]}, T={q.shape[2]}, S={k.shape[2]}"
                f"{'' if key_lengths is None else ' and key_lengths'}; pack the documents along T"
            )
        _check_borders(cu_seqlens, q.shape[2], q.device)
    if key_lengths is not None:
        _check_ints("key_lengths", key_lengths, q.device)
        if key_lengths.shape != (q.shape[0],):
            raise ValueError(
                f"key_lengths has shape {tuple(key_lengths.shape)}; it must hold one length a row: ({q.shape[0]},)"
            )
        if readable(key_lengths) and key_lengths.numel():
            low, high = int(key_lengths.min()), int(key_lengths.max())
            if low < 0 or high > k.shape[2]:
                raise ValueError(f"key_lengths span {low}..{high}; each must be in 0..{k.shape[2]}, the keys there are")


def _check_borders(cu_seqlens: Tensor, T: int, device: torch.device) -> None:
    _check_ints("cu_seqlens", cu_seqlens, device)
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be (n_docs + 1,) with n_docs >= 1")
    if readable(cu_seqlens):
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] > T or any(a > b for a, b in pairwise(borders)):
            shown = f"{borders[:8]}{'...' if len(borders) > 8 else ''}"
            raise ValueError(f"cu_seqlens {shown} must start at 0, never fall and end at most at T={T}")


def _check_ints(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.device != device:
        raise ValueError(
            f"{name} is {name_of(tensor.dtype)} on {tensor.device}; it must be int32 on {device}, where q is"
        )
