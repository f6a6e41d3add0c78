"""Blockwise 4-bit quantization of one tensor: a code per value, an absmax per block of 64."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..kernels import nf4
from ..kernels.checks import has_values
from ..kernels.dispatch import name_of
from ..kernels.nf4 import DoubleQuantized, PackedWeight
from ..kernels.nf4.reference import not_finite
from .codebooks import codebook
from .double import quantize_absmax

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes reads
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QuantState:
    """All that a packed weight needs to become a weight again."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # the weight's before; dequantization returns it
    quant_type: str  # nf4, fp4 or int4
    block_size: int  # weights that share one absmax
    codebook: Tensor  # (16,) float32
    scales: Tensor | DoubleQuantized  # absmax (n_blocks,) float32, or the same in 8 bits

    @property
    def double(self) -> DoubleQuantized | None:
        """The second level, or None."""
        return self.scales if isinstance(self.scales, DoubleQuantized) else None

    @property
    def absmax(self) -> Tensor:  # (n_blocks,) float32
        """The scale of each block, decoded when it is double-quantized."""
        return self.scales if isinstance(self.scales, Tensor) else self.scales.absmax()

    def weight(self, packed: Tensor) -> PackedWeight:
        """The weight with its packed codes, as graft.kernels.nf4 takes it."""
        return PackedWeight(packed, self.codebook, self.scales, self.block_size, self.shape)


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> tuple[Tensor, QuantState]:
    """NF4 (QLoRA, arXiv:2305.14314, section 3): packed (ceil(n / 2), 1) uint8 and its state, bitsandbytes' bytes.

    The flattened weight is cut into blocks; the last may be shorter. Raises ValueError for a weight that is not float32,
    float16 or bfloat16, is empty, or holds NaN or infinity, and for an unknown block size.
    """
    return quantize_4bit(weight, "nf4", block_size=block_size, double_quant=double_quant)


def quantize_4bit(
    weight: Tensor, quant_type: str, *, block_size: int = 64, double_quant: bool = True
) -> tuple[Tensor, QuantState]:
    """`quantize_nf4` for any 4-bit type: nf4, fp4 or int4."""
    check_dtype_and_size(weight)
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size={block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}; use 64, the paper's"
        )
    values = torch.tensor(codebook(quant_type), dtype=torch.float32, device=weight.device)
    packed, absmax = nf4.quantize_4bit(weight.detach(), values, block_size)
    scales = quantize_absmax(absmax) if double_quant else absmax
    return packed, QuantState(tuple(weight.shape), weight.dtype, quant_type, block_size, values, scales)


def check_dtype_and_size(weight: Tensor) -> None:
    """Raise ValueError for what is no weight."""
    if not isinstance(weight, Tensor):
        raise ValueError(f"a weight is a torch tensor, got {type(weight).__name__}; use torch.from_numpy for an array")
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"cannot quantize a {name_of(weight.dtype)} tensor of shape {tuple(weight.shape)}; "
            "a weight is float32, float16 or bfloat16"
        )
    if weight.numel() == 0:
        raise ValueError(f"cannot quantize an empty tensor of shape {tuple(weight.shape)}; leave it as it is")


def check_weight(weight: Tensor) -> None:
    """Raise ValueError for what `quantize_nf4` refuses; the values of meta and fake tensors are not looked at."""
    check_dtype_and_size(weight)
    values = weight.detach()
    if values.is_meta or not has_values(values):
        return
    low, high = torch.aminmax(values)
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(not_finite(values))


def dequantize_nf4(
    packed: Tensor, state: QuantState, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """The weight again, in its own dtype or the requested one: codebook[code] * absmax in float32, then one rounding.

    `out` is memory to use again, contiguous and of the state's shape; its dtype is the result's. Raises ValueError when
    packed does not have the bytes that the state's shape needs, and when `out` does not fit.
    """
    n_bytes = (prod(state.shape) + 1) // 2
    if packed.dtype != torch.uint8 or packed.numel() != n_bytes:
        raise ValueError(
            f"packed is {tuple(packed.shape)} {name_of(packed.dtype)}, but shape {state.shape} needs {n_bytes} uint8; "
            "was it packed with another state?"
        )
    weight = state.weight(packed)
    if out is not None:
        if out.shape != state.shape or not out.is_contiguous() or (dtype or out.dtype) != out.dtype:
            raise ValueError(
                f"out: expected a contiguous {state.shape} tensor, got {tuple(out.shape)} {name_of(out.dtype)} with "
                f"strides {out.stride()}"
            )
        if out.is_cpu and out.dtype in FLOATS:
            nf4.dequantize_4bit_(out, weight)
            return out
        return out.copy_(dequantize_nf4(packed, state, dtype=out.dtype))
    return nf4.dequantize_4bit(weight, dtype or state.dtype)
