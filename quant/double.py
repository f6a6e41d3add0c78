"""Double quantization: the 32-bit absmax of every block is itself kept in 8 bits (QLoRA, arXiv:2305.14314, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import nf4
from .codebooks import dynamic8


@dataclass(frozen=True)
class DoubleQuantized:
    """absmax in 8 bits and 32 bits for every 256 of them: 0.127 bit a weight at block 64, in place of 0.5."""

    absmax_q: Tensor  # (n_blocks,) uint8
    absmax_scale: Tensor  # (ceil(n_blocks / 256),) float32
    absmax_mean: Tensor  # () float32: subtracted first, since absmax is positive and the map is symmetric
    codebook: Tensor  # (256,) float32

    def absmax(self) -> Tensor:  # (n_blocks,) float32
        """The values that dequantization uses: codebook[absmax_q] * absmax_scale + absmax_mean."""
        return nf4.dequantize_absmax(self.absmax_q, self.absmax_scale, self.absmax_mean, self.codebook)


def quantize_absmax(absmax: Tensor) -> DoubleQuantized:  # (n_blocks,) float32
    """absmax minus its mean in the signed dynamic 8-bit map, a block of 256 sharing a scale; bitsandbytes' bits."""
    mean = absmax.mean()
    codebook = torch.tensor(dynamic8(), dtype=torch.float32, device=absmax.device)
    q, scale = nf4.quantize_absmax(absmax - mean, codebook)
    return DoubleQuantized(q, scale, mean, codebook)
