"""What a tokenizer is, apart from how fast it runs: vocabulary, merges, special tokens and how text is split."""

import hashlib
import json
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np

Pair = tuple[bytes, bytes]
ID_BITS = 21  # encode.py keeps a merge in 64 bits: two ids, and its rank plus one; Qwen 3 needs 18 for each


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in text as a whole, before any splitting (Hugging Face's `added_tokens`)."""

    content: str
    id: int
    special: bool = True  # false: some libraries show it when they skip special tokens
    lstrip: bool = False  # takes the white space on its left with it
    rstrip: bool = False
    single_word: bool = False  # only between characters that aren't letters, digits or _
    normalized: bool = False
    in_vocab: bool = False  # the file lists it in the model's vocabulary too


@dataclass(frozen=True)
class Definition:
    """Everything that decides which ids a text gets, and what tokenizer.json says beside that."""

    vocab: dict[int, bytes]  # without the added tokens
    merges: list[Pair]  # in rank order
    added: tuple[AddedToken, ...]
    splits: tuple[str, ...]  # patterns, each applied to the pieces that the one before left
    prefix_space: bool = False  # put a space before each stretch of plain text that has none
    normalizer: str | None = None  # a Unicode normal form
    ignore_merges: bool = False  # a word that is in the vocabulary is one token, whatever the merges give
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    add_bos: bool = False  # the file asks for BOS before each text
    chat_template: str | None = None
    raw: dict[str, Any] = field(default_factory=dict)  # sections of the files that were read, to write them back

    @cached_property
    def merge_ids(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of each merge's left and right token and of the one that it makes, int32 (n_merges,) each.

        Raises KeyError for a token that the vocabulary doesn't have.
        """
        id_of = {token: index for index, token in self.vocab.items()}
        left, right = zip(*self.merges, strict=True) if self.merges else ((), ())
        made = map(bytes.__add__, left, right)
        n = len(self.merges)
        return tuple(np.fromiter(map(id_of.__getitem__, tokens), np.int32, n) for tokens in (left, right, made))  # pyright: ignore[reportReturnType]

    def fingerprint(self) -> str:
        """32 hex digits that change when any text could get other ids.

        Not covered: the Unicode version. Ids of code points that an older table has not assigned depend on the `regex` package
        (its classes split the text) and on Python's unicodedata (its normal forms); see `unicode_versions`.
        """
        digest = hashlib.sha256()
        settings = [self.splits, self.prefix_space, self.normalizer, self.ignore_merges]
        digest.update(json.dumps(settings).encode())
        for token in sorted(self.added, key=lambda token: token.id):
            flags = f"{token.lstrip} {token.rstrip} {token.single_word}" + " normalized" * token.normalized
            digest.update(f"\0{token.id} {flags} {token.content}".encode())
        for index in sorted(self.vocab):
            digest.update(b"\1%d %d " % (index, len(self.vocab[index])) + self.vocab[index])
        for left, right in self.merges:
            digest.update(b"\2%d %d " % (len(left), len(right)) + left + right)
        return digest.hexdigest()[:32]


def unicode_versions() -> dict[str, str]:
    """What splits and normalizes text here: kept beside a fingerprint as a note, so that a difference can be explained."""
    return {"regex": version("regex"), "unicodedata": unicodedata.unidata_version}


def check_ids(ids: Collection[int]) -> None:
    """Raises ValueError unless each id is a whole number from 0 to 2^21 - 1 and there is one at least."""
    least, largest = min(ids, default=-1), max(ids, default=-1)
    if least < 0:
        raise ValueError(
            f"the vocabulary's least id is {least}; expected 0 or more" if ids else "the vocabulary is empty"
        )
    if largest >= 1 << ID_BITS:
        raise ValueError(f"the vocabulary has ids up to {largest:,}; graft encodes with ids below {1 << ID_BITS:,}")


def new_definition(merges: Sequence[Pair], special_tokens: Sequence[str], pattern: str) -> Definition:
    """A trained tokenizer: ids 0-255 are the bytes, then the merges in rank order, then the special tokens."""
    vocab = {byte: bytes([byte]) for byte in range(256)}
    vocab.update({256 + rank: left + right for rank, (left, right) in enumerate(merges)})
    added = tuple(AddedToken(content, len(vocab) + place) for place, content in enumerate(special_tokens))
    eos = "<|endoftext|>" if "<|endoftext|>" in special_tokens else next(iter(special_tokens), None)
    return Definition(vocab, list(merges), added, (pattern,), eos=eos)


def check_special_tokens(special_tokens: Sequence[str]) -> tuple[str, ...]:
    """The special tokens as a tuple. Raises ValueError for an empty or repeated one."""
    if isinstance(special_tokens, str):
        raise ValueError(f"special_tokens is the string {special_tokens!r}; give a list of strings")
    for place, token in enumerate(special_tokens):
        if token == "":
            raise ValueError(f"special token number {place + 1} is empty; remove it or give it a name")
        if token in special_tokens[:place]:
            raise ValueError(f"special token {token!r} is given twice; name each once")
    return tuple(special_tokens)
