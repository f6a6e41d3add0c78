"""The SwiGLU gate in plain PyTorch, float32 inside."""

import torch
from torch import Tensor

from ..checks import accumulator


def swiglu_reference(
    gate: Tensor,  # (..., F)
    up: Tensor,  # (..., F)
) -> Tensor:
    """gate * sigmoid(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6)."""
    g = gate.to(accumulator(gate.dtype))
    return (g * torch.sigmoid(g) * up.to(g.dtype)).to(gate.dtype)
