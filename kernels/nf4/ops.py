"""4-bit quantization as PyTorch operators: opaque to torch.compile, shapes known to fake and meta tensors.

As operators they cost memory for their results alone, real or fake, which is what a memory prediction counts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference

NESTED_BLOCK_SIZE = 256  # absmax values that share one scale on the second level


@torch.library.custom_op("graft::quantize_4bit", mutates_args=())
def quantize_4bit(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes and absmax; see reference.quantize_4bit."""
    return reference.quantize_4bit(weight, codebook, block_size=block_size)


@quantize_4bit.register_fake
def _(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    packed = weight.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty((-(-n // block_size),), dtype=torch.float32)


@torch.library.custom_op("graft::quantize_absmax", mutates_args=())
def quantize_absmax(shifted: Tensor, nested_codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The second level: absmax minus its mean in 8 bits, and a scale for every 256; see reference.quantize_8bit_by_table."""
    return reference.quantize_8bit_by_table(shifted, nested_codebook, block_size=NESTED_BLOCK_SIZE)


@quantize_absmax.register_fake
def _(shifted: Tensor, nested_codebook: Tensor) -> tuple[Tensor, Tensor]:
    scale = shifted.new_empty((-(-shifted.numel() // NESTED_BLOCK_SIZE),), dtype=torch.float32)
    return torch.empty_like(shifted, dtype=torch.uint8), scale


@torch.library.custom_op("graft::dequantize_4bit", mutates_args=())
def dequantize_4bit(
    packed: Tensor,  # (ceil(n / 2), 1) uint8
    absmax: Tensor,  # (n_blocks,) float32, or uint8 with the second level
    nested: Sequence[Tensor],  # absmax_scale, absmax_mean and the (256,) codebook; empty without the second level
    codebook: Tensor,  # (16,) float32
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight; see reference.dequantize_4bit."""
    if nested:
        absmax = reference.dequantize_absmax(absmax, *nested, nested_block_size=NESTED_BLOCK_SIZE)
    return reference.dequantize_4bit(packed, absmax, codebook, block_size=block_size, shape=tuple(shape), dtype=dtype)


@dequantize_4bit.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    codebook: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


@torch.library.custom_op("graft::dequantize_absmax", mutates_args=())
def dequantize_absmax(absmax_q: Tensor, absmax_scale: Tensor, absmax_mean: Tensor, nested_codebook: Tensor) -> Tensor:
    """The first level's absmax; see reference.dequantize_absmax."""
    return reference.dequantize_absmax(
        absmax_q, absmax_scale, absmax_mean, nested_codebook, nested_block_size=NESTED_BLOCK_SIZE
    )


@dequantize_absmax.register_fake
def _(absmax_q: Tensor, absmax_scale: Tensor, absmax_mean: Tensor, nested_codebook: Tensor) -> Tensor:
    return torch.empty_like(absmax_q, dtype=torch.float32)
