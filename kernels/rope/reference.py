"""Rotary position embedding in plain PyTorch, float32 inside."""

import torch
from torch import Tensor


def rope_reference(
    q: Tensor,  # (B, H, T, Dh)
    k: Tensor,  # (B, K, T, Dh)
    cos: Tensor,  # (B or 1, T, Dh / 2)
    sin: Tensor,  # (B or 1, T, Dh / 2)
) -> tuple[Tensor, Tensor]:
    """Rotates each pair (x_i, x_{i + Dh/2}) by its angle (Su et al. 2021, arXiv:2104.09864, eq. 34, half-split pairs)."""

    def rotate(x: Tensor) -> Tensor:
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, T, Dh / 2)
        a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, -1)
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)

    return rotate(q), rotate(k)
