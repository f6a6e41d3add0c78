"""A weight in 4 bits under one name, and the checks that stand before any code that reads its tensors by address.

Compiled loops and Triton kernels take addresses: a tensor of another dtype or length would be read or written beyond its
end. So each entry in ops.py checks dtype, size, device and block size once, for every backend.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..dispatch import name_of

NESTED_BLOCK_SIZE = 256  # absmax values that share one scale on the second level
CODES, NESTED_CODES = 16, 256  # values that a codebook of 4 bits has, and one of 8 bits


class DoubleQuantized(NamedTuple):
    """absmax in 8 bits and a scale for every 256 of them: 0.127 bit a weight at block 64, in place of 0.5.

    absmax = codebook[absmax_q] * absmax_scale + absmax_mean (QLoRA, arXiv:2305.14314, section 3, double quantization).
    """

    absmax_q: Tensor  # (n_blocks,) uint8
    absmax_scale: Tensor  # (ceil(n_blocks / 256),) float32
    absmax_mean: Tensor  # () float32: subtracted first, since absmax is positive and the map is symmetric
    codebook: Tensor  # (256,) float32

    def absmax(self) -> Tensor:  # (n_blocks,) float32
        """The scales that dequantization uses."""
        from .ops import dequantize_absmax

        return dequantize_absmax(*self)


class PackedWeight(NamedTuple):
    """A weight in 4 bits: codebook[code] * absmax[block], with `block_size` values of the flattened weight in a block."""

    packed: Tensor  # (ceil(n / 2), 1) uint8, the even value's code in the high nibble
    codebook: Tensor  # (16,) float32
    scales: Tensor | DoubleQuantized  # absmax (n_blocks,) float32, or the same in 8 bits
    block_size: int
    shape: Sequence[int]  # of the weight: (out, in) for a product

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors in one list, as PyTorch's operators and autograd take them."""
        if isinstance(self.scales, Tensor):
            return [self.packed, self.codebook, self.scales]
        return [self.packed, self.codebook, *self.scales]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], block_size: int, shape: Sequence[int]) -> "PackedWeight":
        """The inverse of `tensors`."""
        packed, codebook, *scales = tensors
        return cls(packed, codebook, scales[0] if len(scales) == 1 else DoubleQuantized(*scales), block_size, shape)


SINGLE_NAMES = ("packed", "codebook", "absmax")
DOUBLE_NAMES = ("packed", "codebook", "absmax_q", "absmax_scale", "absmax_mean", "nested_codebook")
SINGLE_DTYPES = [torch.uint8, torch.float32, torch.float32]
DOUBLE_DTYPES = [torch.uint8, torch.float32, torch.uint8, torch.float32, torch.float32, torch.float32]


def check_packed(weight: PackedWeight) -> list[Tensor]:
    """Its tensors. Raises ValueError unless they have the dtypes and sizes that the weight's shape needs, on one device.

    Runs before every dequantization, so what is right is found out in as few steps as Python allows (2 us).
    """
    tensors, block_size = weight.tensors, weight.block_size
    if type(block_size) is not int or block_size < 2 or block_size % 2:
        check_block_size(block_size, even=True)
    n = prod(weight.shape)
    n_blocks = -(-n // block_size)
    dtypes, sizes = SINGLE_DTYPES, [(n + 1) // 2, CODES, n_blocks]
    if len(tensors) > 3:
        dtypes, sizes = DOUBLE_DTYPES, [*sizes, -(-n_blocks // NESTED_BLOCK_SIZE), 1, NESTED_CODES]
    for tensor, dtype, size in zip(tensors, dtypes, sizes, strict=True):
        if tensor.dtype is not dtype or tensor.numel() != size or not tensor.is_cpu:
            break
    else:
        return tensors
    if any(size < 0 for size in weight.shape):
        raise ValueError(f"shape {tuple(weight.shape)} has a negative size")
    names = DOUBLE_NAMES if len(tensors) > 3 else SINGLE_NAMES
    for name, tensor, dtype, size in zip(names, tensors, dtypes, sizes, strict=True):
        check_tensor(name, tensor, dtype, size, weight.packed.device)
    return tensors


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, size: int, device: torch.device) -> None:
    """Raise ValueError unless the tensor has this dtype, number of values and device."""
    if tensor.dtype != dtype or tensor.numel() != size or tensor.device != device:
        raise ValueError(
            f"{name}: expected {size} {name_of(dtype)} values on {device}, got {tensor.numel()} "
            f"{name_of(tensor.dtype)} values on {tensor.device}"
        )


def check_block_size(block_size: int, *, even: bool) -> None:
    """Raise ValueError for a size that is no whole number above zero, or (where two codes share a byte) an odd one."""
    if not isinstance(cast(object, block_size), int) or block_size < 1:
        raise ValueError(f"block_size must be a whole number above 0, got {block_size!r}")
    if even and block_size % 2:
        raise ValueError(f"block_size must be even, got {block_size}: two values share a byte")


def check_float(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is floating point."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected floating-point values, got {name_of(tensor.dtype)}")
