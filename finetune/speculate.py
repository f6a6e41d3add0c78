"""`--speculate`: what guesses tokens ahead, by its name."""

from pathlib import Path

from ..base.generate.speculative import Drafter, ModelDraft, NgramDraft
from ..base.model.transformer import Transformer
from ..base.tokenizer.tokenizer import Tokenizer
from .loading import load_model

NGRAM = "ngram"


def make_drafter(name: str, model: Transformer, tokenizer: Tokenizer, *, dtype: str, device: str) -> Drafter:
    """`ngram`: what followed the last tokens before; else the folder of a small model with the same tokenizer.

    Raises ValueError for a draft model with another tokenizer, FileNotFoundError for a folder that doesn't exist.
    """
    if name == NGRAM:
        return NgramDraft()
    folder = Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"--speculate {name}: no such folder; give {NGRAM}, or the folder of a small model")
    if Tokenizer.load(folder).vocab != tokenizer.vocab:
        raise ValueError(f"--speculate {name}: its tokenizer differs from the base's; both must give the same ids")
    draft = load_model(folder, dtype=dtype, device=device)
    draft.requires_grad_(False)
    return ModelDraft(draft, vocab_size=model.config.vocab_size)
