"""From files to a trained definition: read documents, count words in processes, merge."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import regex

from ..text.documents import PIECE_BYTES, Piece, batch_pieces, list_files, read_documents, total_bytes
from ..text.parallel import default_workers, run_blocks
from .compiled import merges
from .compiled.words import WordCounter, Words
from .definition import Definition, check_special_tokens, new_definition
from .patterns import WHOLE, kind_of, resolve
from .reference import split_at_tokens
from .split import cut

Progress = Callable[[str, int, int], None]  # stage, done, total


class CountHandler:
    """Counts the words of blocks of documents (parallel.Handler)."""

    def __init__(self, pattern: str, special_tokens: Sequence[str]):
        self._pattern = regex.compile(pattern)
        self._kind = kind_of(pattern)
        self._special_tokens = special_tokens
        self._counter = WordCounter()

    def take(self, block: list[Piece]) -> None:
        parts = [piece.data for piece in block]
        if any(token.encode() in part for token in self._special_tokens for part in parts):
            parts = [
                text.encode() for part in parts for text in split_at_tokens(part.decode(), self._special_tokens)[::2]
            ]
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))
        if self._kind == WHOLE:
            cuts = [
                cut(part.decode(), part, [self._pattern]) + end - len(part)
                for part, end in zip(parts, ends, strict=True)
            ]
            ends = np.concatenate(cuts) if cuts else ends
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self._counter.add_text(parts[0] if len(parts) == 1 else b"".join(parts), starts, ends, self._kind)

    def finish(self) -> Words:
        return self._counter.words()


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
    files = list_files(files)
    words = count_files(files, pattern, special_tokens, workers, progress, errors)
    if len(words[1]) == 0:
        raise ValueError("the files hold no text to train on; give files with text")
    n_merges = vocab_size - least
    learned = merges.train(words, n_merges, None if progress is None else lambda n: progress("merging", n, n_merges))
    if len(learned) < n_merges:
        raise ValueError(
            f"vocab_size={vocab_size} is more than this text can fill: after {len(learned)} merges no pair is left, "
            f"at vocabulary {least + len(learned)}; ask for at most that, or give more text"
        )
    return new_definition(learned, special_tokens, pattern)


def count_files(
    files: Sequence[Path],
    pattern: str,
    special_tokens: Sequence[str],
    workers: int | None,
    progress: Progress | None,
    errors: Literal["strict", "replace"],
) -> Words:
    """All words of the files with their counts; special tokens are left out and nothing crosses them."""
    total = total_bytes(files)
    pieces = read_documents(
        files,
        separators=special_tokens,
        errors=errors,
        piece_bytes=PIECE_BYTES if kind_of(pattern) != WHOLE else None,
        on_read=None if progress is None else lambda done: progress("reading", done, total),
    )
    make = partial(CountHandler, pattern, special_tokens)
    counter: WordCounter | None = None
    words: Words | None = None
    for what, result in run_blocks(make, batch_pieces(pieces), default_workers(total) if workers is None else workers):
        if what != "finish":
            continue
        if words is None:
            words = result
            continue
        if counter is None:
            counter = WordCounter()
            counter.add_words(words)
        counter.add_words(result)
    assert words is not None
    return words if counter is None else counter.words()
