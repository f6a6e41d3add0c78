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
}
__all__ = ["NF4Linear", "QuantState", "dequantize_nf4", "quantize_4bit", "quantize_linears_", "quantize_nf4"]

if TYPE_CHECKING:
    from .blockwise import QuantState, dequantize_nf4, quantize_4bit, quantize_nf4
    from .linear import NF4Linear, quantize_linears_


def __getattr__(name: str) -> object:
    """Import a public name's module when the name is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'graft.quant' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
