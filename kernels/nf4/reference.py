"""4-bit and 8-bit blockwise quantization in plain PyTorch, to bitsandbytes' bit (checked against 0.50.2 on CPU).

The one definition of the numbers: the compiled paths are tested against this file. It favours clarity over memory: about
20 bytes a weight of temporaries.
"""

from math import prod

import torch
from torch import Tensor

from .weight import NESTED_BLOCK_SIZE, PackedWeight

SMALLEST_SCALE = 1e-38  # bitsandbytes divides by at least this, so that an all-zero block stays zero
TABLE_SIZE = 65536  # entries of the second level's lookup table


def quantize_4bit(
    weight: Tensor,  # any shape, floating point
    codebook: Tensor,  # (16,) float32, any order
    *,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Nearest code of weight / absmax, a block of `block_size` values of the flattened weight sharing its absmax.

    Returns packed (ceil(n / 2), 1) uint8, the even value in the high nibble, and absmax (n_blocks,) float32. A tie takes
    the lower code. Full blocks are multiplied by the reciprocal of absmax, a shorter last one is divided by absmax: that
    is where bitsandbytes' bits come from. Raises ValueError when a value is not finite.
    """
    flat = weight.reshape(-1).float()
    n_full = flat.numel() // block_size * block_size
    full, rest = flat[:n_full].view(-1, block_size), flat[n_full:]
    absmax = full.abs().amax(dim=1)  # (n_full_blocks,)
    scaled = (full * (1.0 / absmax.clamp(min=SMALLEST_SCALE))[:, None]).view(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=SMALLEST_SCALE)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, rest / last])
    if not absmax.isfinite().all():
        raise ValueError(not_finite(flat))
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    midpoints, order = midpoints_and_order(codebook)
    codes = order[torch.bucketize(scaled.clamp(-1, 1), midpoints)].to(torch.uint8)
    return (codes[0::2] << 4 | codes[1::2])[:, None], absmax


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """codebook[code] * absmax[block], multiplied in float32 and rounded once to `dtype`."""
    n = prod(weight.shape)
    pairs = weight.packed.reshape(-1)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).view(-1)[:n]
    absmax = weight.scales if isinstance(weight.scales, Tensor) else dequantize_absmax(*weight.scales)
    scale = absmax.repeat_interleave(weight.block_size)[:n]
    return (weight.codebook[codes.int()] * scale).to(dtype).view(tuple(weight.shape))


def dequantize_absmax(
    absmax_q: Tensor,  # (n_blocks,) uint8
    absmax_scale: Tensor,  # (ceil(n_blocks / 256),) float32
    absmax_mean: Tensor,  # () float32
    nested_codebook: Tensor,  # (256,) float32
) -> Tensor:
    """The first level's absmax from the second level (QLoRA, arXiv:2305.14314, section 3, double quantization)."""
    scale = absmax_scale.repeat_interleave(NESTED_BLOCK_SIZE)[: absmax_q.numel()]
    return nested_codebook[absmax_q.int()] * scale + absmax_mean


def quantize_8bit(
    values: Tensor,  # any shape, floating point
    bounds: Tensor,  # (255,) float32, ascending, within -1 and 1: between neighbouring codes
    *,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """The code between whose bounds values / absmax lies: (lower, upper]. Returns it and absmax (n_blocks,) float32."""
    scaled, absmax = scale_blocks(values, block_size)
    return torch.bucketize(scaled, bounds).to(torch.uint8).view(values.shape), absmax


def quantize_8bit_by_table(values: Tensor, codebook: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """To 8 bits as bitsandbytes' CPU library does it: the value, rounded to one of 65,536 steps, looks its code up.

    Near a midpoint that is not the nearest code; where the codes lie closer than a step (below 3e-5 of absmax) it is not
    even near. An all-zero block gets code 0 instead of zero's.
    """
    scaled, absmax = scale_blocks(values, block_size)
    # (scaled + 1) / 2 * 65535 + 1/2 with one rounding, as a fused multiply-add does it; the float64 product is exact
    step = (((scaled + 1) * 0.5).double() * (TABLE_SIZE - 1) + 0.5).float()
    codes = lookup_table(codebook)[step.nan_to_num(0.0).int()]
    empty = absmax.repeat_interleave(block_size)[: codes.numel()] == 0
    return codes.masked_fill(empty, 0).view(values.shape), absmax


def lookup_table(codebook: Tensor) -> Tensor:
    """(65536,) uint8: the nearest code of each step from -1 to 1, a tie taking the lower."""
    steps = torch.arange(TABLE_SIZE, dtype=torch.float32, device=codebook.device)
    midpoints = (codebook[:-1] + codebook[1:]) * 0.5
    return torch.bucketize(steps * 2 / (TABLE_SIZE - 1) - 1, midpoints).to(torch.uint8)


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, *, block_size: int) -> Tensor:
    """codebook[code] * absmax[block], float32, in the codes' shape."""
    scale = absmax.repeat_interleave(block_size)[: codes.numel()]
    return (codebook[codes.reshape(-1).int()] * scale).view(codes.shape)


def scale_blocks(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """values times the reciprocal of their block's absmax, flat and within -1 and 1, and absmax (n_blocks,)."""
    flat = values.reshape(-1).float()
    n = flat.numel()
    padded = torch.nn.functional.pad(flat, (0, -n % block_size)).view(-1, block_size)
    absmax = padded.abs().amax(dim=1)
    inverse = torch.where(absmax > 0, 1.0 / absmax, 0.0)
    return (padded * inverse[:, None]).clamp(-1, 1).view(-1)[:n], absmax


def midpoints_and_order(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The 15 midpoints between neighbouring values, and the code of each value in ascending order."""
    order = codebook.argsort(stable=True)
    return (codebook[order[:-1]] + codebook[order[1:]]) / 2, order


def not_finite(values: Tensor) -> str:
    """The message for a tensor that holds NaN or infinity."""
    bad = (~values.isfinite()).reshape(-1).nonzero()
    first = int(bad[0])
    return (
        f"{len(bad)} of {values.numel()} values are not finite, the first is {values.reshape(-1)[first].item()} at {first} "
        f"of the flattened tensor; fix the checkpoint, or take one from before the run diverged"
    )
