"""Double quantization: the 32-bit absmax of every block is itself kept in 8 bits (QLoRA, arXiv:2305.14314, section 3)."""

import torch
from torch import Tensor

from ..kernels import nf4
from ..kernels.nf4 import DoubleQuantized
from .codebooks import dynamic8


def quantize_absmax(absmax: Tensor) -> DoubleQuantized:  # (n_blocks,) float32
    """absmax minus its mean in the signed dynamic 8-bit map, a block of 256 sharing a scale; bitsandbytes' bits."""
    mean = absmax.mean()
    codebook = torch.tensor(dynamic8(), dtype=torch.float32, device=absmax.device)
    absmax_q, absmax_scale = nf4.quantize_absmax(absmax - mean, codebook)
    return DoubleQuantized(absmax_q, absmax_scale, mean, codebook)
