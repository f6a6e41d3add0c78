"""Tokenizer: the class that users meet. Training, encoding, decoding, files; the work is done in the modules beside."""

import codecs
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from ..hub import model_folder
from ..text.utf8 import to_utf8
from . import files as tokenizer_files
from .added_tokens import TokenMatcher
from .compiled.decode import Decoder
from .compiled.encode import Encoder
from .definition import AddedToken, Definition, check_ids

Allowed = Literal["all"] | Iterable[str]


class Tokenizer:
    """Byte-level BPE: any text becomes ids and comes back unchanged.

    Where a file's vocabulary lacks a byte (SmolLM2's lacks 21), that byte is dropped from text, as `tokenizers` does.

    `encode` never adds BOS or EOS, and never yields a special token's id unless `allowed_special` names the token.
    """

    def __init__(self, definition: Definition):
        self.definition = definition
        self.special_tokens: dict[str, int] = {token.content: token.id for token in definition.added}
        self.vocab: dict[int, bytes] = definition.vocab | {t.id: t.content.encode() for t in definition.added}
        check_ids(self.vocab)
        self.merges: list[tuple[bytes, bytes]] = definition.merges
        self.vocab_size = max(self.vocab) + 1
        self.bos_token_id = self._id_of(definition.bos)
        self.eos_token_id = self._id_of(definition.eos)
        self.pad_token_id = self._id_of(definition.pad)
        self.add_bos = definition.add_bos
        self._encoder = Encoder(definition)
        self._fingerprint: str | None = None

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.vocab)

    def _id_of(self, name: str | None) -> int | None:
        return None if name is None else self.special_tokens[name]

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special_tokens={list(self.special_tokens)})"

    # ------------------------------------------------------------------------------------------------ make and keep

    @classmethod
    def train(
        cls,
        files: Iterable[str | Path],  # text, JSONL or parquet files, or folders of them; each also gzipped
        *,
        vocab_size: int,  # the bytes and the special tokens included
        pattern: str = "gpt2",  # gpt2, gpt4, llama3, qwen2, or a regular expression of the regex package
        special_tokens: Sequence[str] = ("<|endoftext|>",),  # never split, never merged across; they get the last ids
        workers: int | None = None,  # processes that count words; None: by the size of the files
        progress: Callable[[str, int, int], None] | None = None,  # called with (stage, done, total)
        errors: Literal["strict", "replace"] = "strict",  # for bytes that are not UTF-8
    ) -> "Tokenizer":
        """Learn merges from files. The result does not depend on `workers`.

        Most frequent pair first; among equals the lexicographically greater pair of byte strings. Raises ValueError when
        the vocabulary is too small, or larger than the text can fill (the message says what was reached).
        """
        from .training import train_definition

        return cls(
            train_definition(
                files,
                vocab_size=vocab_size,
                pattern=pattern,
                special_tokens=special_tokens,
                workers=workers,
                progress=progress,
                errors=errors,
            )
        )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Open a folder with a byte-level BPE tokenizer.json, or GPT-2's vocab.json and merges.txt; or a Hugging Face id."""
        return cls(tokenizer_files.read(model_folder(path)))

    def save(self, path: str | Path) -> None:
        """Write a folder that graft, transformers' AutoTokenizer and the tokenizers library read alike."""
        tokenizer_files.write(self.definition, Path(path))

    @property
    def chat_template(self) -> str | None:
        """The jinja source that turns messages into text; saved with the tokenizer."""
        return self.definition.chat_template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self.definition = replace(self.definition, chat_template=template)

    def fingerprint(self) -> str:
        """32 hex digits that change when any text could get other ids; token shards carry it."""
        if self._fingerprint is None:
            self._fingerprint = self.definition.fingerprint()
        return self._fingerprint

    # ----------------------------------------------------------------------------------------------------- encoding

    def encode(self, text: str, *, allowed_special: Allowed = frozenset()) -> np.ndarray:
        """The ids of a text, int32. Special tokens in the text are plain text unless `allowed_special` names them."""
        return self._encode_many([text], allowed_special)[0]

    def encode_batch(self, texts: Sequence[str], *, allowed_special: Allowed = frozenset()) -> list[np.ndarray]:
        """The ids of each text."""
        return self._encode_many(texts, allowed_special)

    def _encode_many(self, texts: Sequence[str], allowed_special: Allowed) -> list[np.ndarray]:
        allowed = self._allowed(allowed_special)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"text is {type(text).__name__}, not str; decode bytes first")
        if allowed:
            matcher = TokenMatcher(allowed, self._normalized)
            return [self._encode_with_special(text, matcher) for text in texts]
        ids, ends = self.encode_ragged(texts)
        return np.split(ids, ends[:-1]) if len(texts) > 1 else [ids] * len(texts)

    def encode_ragged(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Plain texts: all ids in a row (int32), and where each text's ids end (int64)."""
        if len(texts) == 1 and not self.definition.prefix_space:
            try:
                ids = self._encoder.encode_text(self._normalized(texts[0]))
                return ids, np.array([len(ids)])
            except UnicodeEncodeError:
                pass  # a lone surrogate; replaced below
        return self._encoder.encode([self._plain(self._normalized(text)) for text in texts])

    @property
    def can_stream(self) -> bool:
        """Whether a text cut by documents.find_cut gets the same ids as the whole: for the named patterns it does."""
        return self._encoder.by_kind and not self.definition.prefix_space

    def _allowed(self, allowed_special: Allowed) -> list[AddedToken]:
        if allowed_special == "all":
            return list(self.definition.added)
        if isinstance(allowed_special, str):
            raise ValueError(
                f"allowed_special is the string {allowed_special!r}; give a set of special tokens or 'all'"
            )
        wanted = set(allowed_special)
        unknown = wanted - self.special_tokens.keys()
        if unknown:
            raise ValueError(f"allowed_special names {sorted(unknown)}; this tokenizer has {list(self.special_tokens)}")
        return [token for token in self.definition.added if token.content in wanted]

    def _normalized(self, text: str) -> str:
        form = self.definition.normalizer
        if form is None or text.isascii():
            return text
        return unicodedata.normalize(form, text)  # pyright: ignore[reportArgumentType]

    def _plain(self, text: str) -> bytes:
        """Normalized text as the splitter sees it: with the space in front, as UTF-8, lone surrogates replaced."""
        if self.definition.prefix_space and text and not text.startswith(" "):
            text = " " + text
        return to_utf8(text)

    def _encode_with_special(self, text: str, matcher: TokenMatcher) -> np.ndarray:
        """Cut the text at the allowed special tokens, encode what lies between, and put the tokens' ids in."""
        plain, special = matcher.split(text)
        ids, ends = self._encoder.encode([self._plain(part) for part in plain])
        return np.insert(ids, ends[:-1], np.array(special, np.int32))

    # ----------------------------------------------------------------------------------------------------- decoding

    def decode(self, ids: Iterable[int] | np.ndarray, *, errors: Literal["strict", "replace"] = "replace") -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD, or with errors="strict" raise UnicodeDecodeError."""
        return str(self._decoder.decode(_as_ids(ids)).data, "utf-8", errors)

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes of ids. Raises ValueError for an id that the vocabulary doesn't have."""
        return self._decoder.decode(_as_ids(ids)).tobytes()

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one token."""
        if index not in self.vocab:
            raise ValueError(f"id {index} is not in the vocabulary (0 to {self.vocab_size - 1})")
        return self.vocab[index]

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder that takes one id at a time and never emits half a character."""
        return StreamDecoder(self)


class StreamDecoder:
    """Ids one by one to text: bytes of an unfinished character wait for the ids that complete it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        """The text that became complete with this id; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(index))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing. The decoder starts afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _as_ids(ids: Iterable[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if array.size == 0:
        return np.zeros(0, np.int32)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"ids are {array.dtype} of shape {array.shape}; give a flat sequence of whole numbers")
    return array
