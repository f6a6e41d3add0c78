"""graft: the whole life of a small language model in one readable package.

The public names are loaded on first use, so `import graft` (and `graft --help`) never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {  # name -> module, or module:attribute where the two names differ
    "Tokenizer": "base.tokenizer.tokenizer",
    "ModelConfig": "base.model.config",
    "load_model": "finetune.loading",
    "save_model": "base.model.huggingface",
    "generate": "finetune.generate",
    "Engine": "base.generate.engine",
    "Sampling": "base.generate.sampling",
    "pretrain": "base.pretrain",
    "sft": "finetune.sft",
    "dpo": "finetune.align.run_dpo",
    "grpo": "finetune.align.run_grpo",
    "sft_many": "finetune.many.run",
    "merge": "finetune.adapters.combine:run_combine",
    "AdapterBank": "finetune.adapters.bank",
    "AdapterShelf": "finetune.adapters.shelf",
    "Callback": "base.callbacks",
    "adapters_off": "finetune.adapters.selection",
    "quantize": "finetune.quantize",
    "estimate_memory": "finetune.memory.predict",
    "evaluate": "finetune.evaluation.run:run_evaluate",
}
__all__ = [
    "AdapterBank",
    "AdapterShelf",
    "Callback",
    "Engine",
    "ModelConfig",
    "Sampling",
    "Tokenizer",
    "__version__",
    "adapters_off",
    "dpo",
    "estimate_memory",
    "evaluate",
    "generate",
    "grpo",
    "load_model",
    "merge",
    "pretrain",
    "quantize",
    "save_model",
    "sft",
    "sft_many",
]

if TYPE_CHECKING:
    from .base.callbacks import Callback
    from .base.generate.engine import Engine
    from .base.generate.sampling import Sampling
    from .base.model.config import ModelConfig
    from .base.model.huggingface import save_model
    from .base.pretrain import pretrain
    from .base.tokenizer.tokenizer import Tokenizer
    from .finetune.adapters.bank import AdapterBank
    from .finetune.adapters.combine import run_combine as merge
    from .finetune.adapters.selection import adapters_off
    from .finetune.adapters.shelf import AdapterShelf
    from .finetune.align.run_dpo import dpo
    from .finetune.align.run_grpo import grpo
    from .finetune.evaluation.run import run_evaluate as evaluate
    from .finetune.generate import generate
    from .finetune.loading import load_model
    from .finetune.many.run import sft_many
    from .finetune.memory.predict import estimate_memory
    from .finetune.quantize import quantize
    from .finetune.sft import sft


def __getattr__(name: str) -> object:
    """Import a public name's module when the name is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'graft' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(f".{module}", __name__), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
