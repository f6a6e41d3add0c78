"""nf4: blockwise 4-bit weights, packed, unpacked and multiplied with; and 8-bit blocks for what goes with them."""

from .linear import autocast_is_on, linear_4bit
from .ops import (
    dequantize_4bit,
    dequantize_4bit_,
    dequantize_8bit,
    dequantize_absmax,
    quantize_4bit,
    quantize_8bit,
    quantize_absmax,
)
from .weight import NESTED_BLOCK_SIZE, DoubleQuantized, PackedWeight

__all__ = [
    "NESTED_BLOCK_SIZE",
    "DoubleQuantized",
    "PackedWeight",
    "autocast_is_on",
    "dequantize_4bit",
    "dequantize_4bit_",
    "dequantize_8bit",
    "dequantize_absmax",
    "linear_4bit",
    "quantize_4bit",
    "quantize_8bit",
    "quantize_absmax",
]
