"""Merging an update into a 4-bit weight the safe way: dequantize, add, quantize again, and say what that cost."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .blockwise import QuantState, dequantize_nf4, quantize_4bit
from .linear import NF4Linear


@dataclass(frozen=True)
class MergeError:
    """How far the merged 4-bit weight is from base + update."""

    rms: float  # in the weight's unit
    relative: float  # to the merged weight's root mean square
    of_update: float  # to the update's: above 1 the rounding is larger than what was merged


def requantize(module: NF4Linear, delta: Tensor) -> tuple[Tensor, QuantState, MergeError]:
    """The layer's weight + delta (out, in) in the layer's own format, and the error; the layer itself is not changed.

    `module.set_packed_(packed, state)` takes the result over. Exact where delta is zero, at one level: codes and absmax come
    back as they were. Raises ValueError for a delta of another shape, or one that is not finite.
    """
    shape = (module.out_features, module.in_features)
    if tuple(delta.shape) != shape:
        raise ValueError(f"delta is {tuple(delta.shape)}, the layer's weight is {shape}; give delta as (out, in)")
    wanted = module.dequantize(torch.float32) + delta.to(module.packed.device, torch.float32)
    packed, state = quantize_4bit(
        wanted, module.quant_type, block_size=module.block_size, double_quant=module.double_quant
    )
    rms = rms_of(dequantize_nf4(packed, state) - wanted)
    update, size = rms_of(delta.float()), rms_of(wanted)
    zero = 0.0 if rms == 0 else float("inf")
    error = MergeError(rms, rms / size if size else zero, rms / update if update else zero)
    return packed, replace(state, dtype=module.dtype), error


def rms_of(values: Tensor) -> float:
    """Root mean square."""
    return values.square().mean().sqrt().item()
