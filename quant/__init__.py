"""Number formats for any nn.Linear."""

from .adamw8bit import AdamW8bit
from .blockwise import QuantState, dequantize_nf4, quantize_4bit, quantize_nf4
from .files import nf4_from_tensors, nf4_to_tensors, quantization_config, quantized_names, read_quantization_config
from .linear import NF4Linear, quantize_linears_
from .merge import requantize
from .streaming import WeightStream

__all__ = [
    "AdamW8bit",
    "NF4Linear",
    "QuantState",
    "WeightStream",
    "dequantize_nf4",
    "nf4_from_tensors",
    "nf4_to_tensors",
    "quantization_config",
    "quantize_4bit",
    "quantize_linears_",
    "quantize_nf4",
    "quantized_names",
    "read_quantization_config",
    "requantize",
]


def __getattr__(name: str) -> object:
    """Say which names there are (PEP 562)."""
    raise AttributeError(f"module 'graft.quant' has no attribute {name!r}; it has {', '.join(__all__)}")
