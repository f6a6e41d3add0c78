"""LoRA with an adapter per row in plain PyTorch: the definition, float32 inside."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import accumulator


def grouped_lora_reference(
    x: Tensor,  # (N, in)
    lora_a: Sequence[Tensor],  # n_adapters of (R_i, in)
    lora_b: Sequence[Tensor],  # n_adapters of (out, R_i)
    rows: Tensor,  # (N,)
    scales: Tensor,  # (n_adapters,)
) -> Tensor:
    """Every adapter on every row, then a choice: the delta of Hu et al. 2021 (arXiv:2106.09685, eq. 3) for rows[n]."""
    dtype = accumulator(x.dtype)
    out = x.new_zeros(x.shape[0], lora_b[0].shape[0], dtype=dtype)
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        delta = scales[i].to(dtype) * (x.to(dtype) @ a.to(dtype).T @ b.to(dtype).T)
        out = torch.where((rows == i).unsqueeze(1), delta, out)
    return out.to(x.dtype)
