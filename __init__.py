"""graft: the whole life of a small language model in one readable package.

The public names are loaded on first use, so `import graft` (and `graft --help`) never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Tokenizer": "base.tokenizer.tokenizer",
    "ModelConfig": "base.model.config",
    "load_model": "finetune.loading",
    "save_model": "base.model.huggingface",
    "generate": "finetune.generate",
    "AdapterBank": "finetune.adapters.bank",
    "quantize": "finetune.quantize",
    "estimate_memory": "finetune.memory.predict",
}
__all__ = [
    "AdapterBank",
    "ModelConfig",
    "Tokenizer",
    "__version__",
    "estimate_memory",
    "generate",
    "load_model",
    "quantize",
    "save_model",
]

if TYPE_CHECKING:
    from .base.model.config import ModelConfig
    from .base.model.huggingface import save_model
    from .base.tokenizer.tokenizer import Tokenizer
    from .finetune.adapters.bank import AdapterBank
    from .finetune.generate import generate
    from .finetune.loading import load_model
    from .finetune.memory.predict import estimate_memory
    from .finetune.quantize import quantize


def __getattr__(name: str) -> object:
    """Import a public name's module when the name is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'graft' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
