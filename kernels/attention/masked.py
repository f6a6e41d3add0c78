"""Attention over keys that a cache holds, with a mask that was made once for all layers. For decoding: no Triton form."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator
from .widths import widened


def attention_masked(
    q: Tensor,  # (B, H, T, Dh)
    k: Tensor,  # (B, K, S, Dh), H a multiple of K
    v: Tensor,  # (B, K, S, Dv)
    mask: Tensor | None,  # (B or 1, 1, T, S), 0 and -inf, added to the scores; None: every key is seen
    *,
    scale: float | None = None,  # of the scores; None is 1 / sqrt(Dh)
    softcap: float | None = None,  # scores <- softcap * tanh(scores / softcap), before the mask
) -> Tensor:  # (B, H, T, Dv)
    """softmax(q k^T * scale + mask) v. With one query a row, the H / K heads that share a kv head become its queries, so keys
    are read once and not repeated. SDPA can't soft-cap: scores are then held in full, in float32."""
    B, H, T, Dh = q.shape
    K = k.shape[1]
    if softcap is None:
        d_value, v = v.shape[-1], widened(v, Dh)
        if T > 1:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        else:
            grouped = q.reshape(B, K, H // K, Dh)
            out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(B, H, T, -1)
        return out[..., :d_value]
    wide = accumulator(q.dtype)
    queries = q.to(wide).reshape(B, K, H // K * T, Dh) * (Dh**-0.5 if scale is None else scale)
    scores = softcap * torch.tanh(queries @ k.to(wide).transpose(2, 3) / softcap)  # (B, K, H/K * T, S)
    scores = scores.view(B, K, H // K, T, -1)
    if mask is not None:
        scores = scores + mask[:, :, None]
    weights = scores.softmax(-1).flatten(2, 3)
    return (weights @ v.to(wide)).view(B, H, T, v.shape[-1]).to(q.dtype)
