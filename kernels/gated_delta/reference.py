"""The gated delta rule as it is defined: one token after the other, float32 inside."""

import torch
from torch import Tensor

from ..checks import accumulator


def gated_delta_reference(
    q: Tensor,  # (B, H, T, Dk)
    k: Tensor,  # (B, H, T, Dk)
    v: Tensor,  # (B, H, T, Dv)
    log_decay: Tensor,  # (B, H, T)
    beta: Tensor,  # (B, H, T)
    state: Tensor | None = None,  # (B, H, Dk, Dv)
    cu_seqlens: Tensor | None = None,  # (n_docs + 1,) with B = 1
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + k_t (beta_t (v_t - k_t^T a_t S_{t-1}))^T, o_t = S_t^T q_t
    (Yang et al. 2024, arXiv:2412.06464, eq. 10)."""
    dtype, out = accumulator(q.dtype), []
    S = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=dtype) if state is None else state.to(dtype)
    starts = set() if cu_seqlens is None else set(cu_seqlens.tolist())
    parts = zip(*(t.to(dtype).unbind(2) for t in (q, k, v, log_decay, beta)), strict=True)
    for t, (q_t, k_t, v_t, log_a, b) in enumerate(parts):
        S = torch.zeros_like(S) if t in starts else S * log_a.exp()[..., None, None]
        known = (k_t[..., None] * S).sum(-2)  # (B, H, Dv): what the state has under this key
        S = S + k_t[..., None] * (b[..., None] * (v_t - known))[..., None, :]
        out.append((q_t[..., None] * S).sum(-2))
    return torch.stack(out, 2).to(v.dtype), S
