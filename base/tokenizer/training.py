"""From files to a trained definition: read, count words, merge."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from ..data.documents import read_documents
from . import reference
from .definition import Definition, check_special_tokens, new_definition
from .patterns import resolve

Progress = Callable[[str, int, int], None]


def train_definition(
    files: Iterable[str | Path],
    *,
    vocab_size: int,
    pattern: str,
    special_tokens: Sequence[str],
    workers: int | None = None,
    progress: Progress | None = None,
    errors: Literal["strict", "replace"] = "strict",
) -> Definition:
    """See Tokenizer.train."""
    special_tokens = check_special_tokens(special_tokens)
    pattern = resolve(pattern)
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} is too small; 256 bytes and {len(special_tokens)} special tokens need {least}"
        )
    texts = (piece.data.decode() for piece in read_documents(files, errors=errors))
    counts = reference.count_words(texts, pattern, special_tokens)
    if not counts:
        raise ValueError("the files hold no text to train on; give files with text")
    merges = reference.train(counts, vocab_size - least)
    if len(merges) < vocab_size - least:
        raise ValueError(
            f"vocab_size={vocab_size} is more than this text can fill: after {len(merges)} merges no pair is left, "
            f"at vocabulary {least + len(merges)}; ask for at most that, or give more text"
        )
    return new_definition(merges, special_tokens, pattern)
