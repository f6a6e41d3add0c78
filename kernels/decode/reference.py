"""The same operations in plain PyTorch: the definition that tests hold the compiled loops to."""

from torch import Tensor

from ..rms_norm.reference import rms_norm_reference
from ..rope.reference import rope_reference


def add_rms_norm_reference(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, residual + x), each (B, D)."""
    total = residual if x is None else residual + x
    normed = rms_norm_reference(total, weight, eps=eps)
    assert isinstance(normed, Tensor)
    return normed, total


def place_token_reference(
    q: Tensor,  # (B, H * Dh)
    k: Tensor,  # (B, K * Dh)
    v: Tensor,  # (B, K * Dh)
    cos: Tensor,  # (B or 1, Dh/2)
    sin: Tensor,
    keys: Tensor,  # (>= B, K, capacity, Dh)
    values: Tensor,
    column: int,
    q_weight: Tensor | None,  # (Dh,), QK-norm's weights
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q turned, (B, H * Dh); keys and values with the token in its column)."""
    B, Dh = q.shape[0], keys.shape[3]
    q, k, v = (t.view(B, -1, Dh) for t in (q, k, v))
    if q_weight is not None and k_weight is not None:
        normed = rms_norm_reference(q, q_weight, eps=eps), rms_norm_reference(k, k_weight, eps=eps)
        q, k = (n for n in normed if isinstance(n, Tensor))
    q, k = rope_reference(q[:, :, None], k[:, :, None], cos[:, None], sin[:, None])  # (B, heads, 1, Dh)
    keys, values = keys.clone(), values.clone()
    keys[:B, :, column], values[:B, :, column] = k[:, :, 0], v
    return q.reshape(B, -1), keys, values
