"""Number formats for any nn.Linear."""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "QuantState": "blockwise",
    "quantize_nf4": "blockwise",
    "dequantize_nf4": "blockwise",
    "quantize_4bit": "blockwise",
    "NF4Linear": "linear",
    "quantize_linears_": "linear",
    "nf4_to_tensors": "files",
    "nf4_from_tensors": "files",
    "quantized_names": "files",
    "quantization_config": "files",
    "read_quantization_config": "files",
    "WeightStream": "streaming",
    "AdamW8bit": "adamw8bit",
    "requantize": "merge",
}
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

if TYPE_CHECKING:
    from .adamw8bit import AdamW8bit
    from .blockwise import QuantState, dequantize_nf4, quantize_4bit, quantize_nf4
    from .files import nf4_from_tensors, nf4_to_tensors, quantization_config, quantized_names, read_quantization_config
    from .linear import NF4Linear, quantize_linears_
    from .merge import requantize
    from .streaming import WeightStream


def __getattr__(name: str) -> object:
    """Import a public name's module when the name is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'graft.quant' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
