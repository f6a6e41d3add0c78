"""LoRA with an adapter per row from PyTorch operators: the rows of each adapter that is present, one after the other."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import readable
from .reference import grouped_lora_reference


def grouped_lora_torch(
    x: Tensor,  # (N, in)
    lora_a: Sequence[Tensor],  # n_adapters of (R_i, in)
    lora_b: Sequence[Tensor],  # n_adapters of (out, R_i)
    rows: Tensor,  # (N,)
    scales: Tensor,  # (n_adapters,)
) -> Tensor:
    """The same function as `grouped_lora_reference`, which it calls where no values can be read (FakeTensor, CUDA, compile)."""
    if not readable(rows):
        return grouped_lora_reference(x, lora_a, lora_b, rows, scales)
    present = rows.unique().tolist()
    factors = scales.tolist()

    def delta(part: Tensor, i: int) -> Tensor:
        return F.linear(F.linear(part, lora_a[i].to(x.dtype)) * factors[i], lora_b[i].to(x.dtype)).to(x.dtype)

    if len(present) == 1 and present[0] >= 0:
        return delta(x, present[0])
    out = x.new_zeros(x.shape[0], lora_b[0].shape[0])
    for i in present:
        if i >= 0:
            members = (rows == i).nonzero().squeeze(1)
            out = (
                out.index_copy(0, members, delta(x[members], i))
                if torch.is_grad_enabled()
                else out.index_copy_(0, members, delta(x[members], i))
            )
    return out
