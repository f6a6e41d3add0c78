"""Readers: files of text, JSON, JSONL, Parquet or Arrow (compressed or not) to documents, in pieces of bounded size."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import IO, Literal

import regex

from .compressed import opened
from .files import RECORD_SUFFIXES, kind_of, list_files, total_bytes
from .rows import BadRow, rows_of
from .utf8 import Errors, checked, to_utf8

__all__ = [
    "PIECE_BYTES", "Errors", "OnBad", "Piece", "ReadCounts", "batch_pieces", "checked", "find_cut", "list_files",
    "read_documents", "total_bytes",
]  # fmt: skip

PIECE_BYTES = 4 << 20  # a longer document comes in pieces of about this size
OnBad = Literal["error", "skip"]
SHOWN = 5  # bad rows that are kept to be told


@dataclass(frozen=True)
class Piece:
    """UTF-8 text of one document, or a stretch of it that ends where no word of the known patterns can go on."""

    data: bytes
    ends: bool  # the document ends here
    path: Path


@dataclass
class ReadCounts:
    """What became of the documents of the files read so far."""

    n_documents: int = 0  # with text
    n_empty: int = 0  # null, or no character: left out
    n_bad: int = 0  # rows that give no text: left out
    n_replaced: int = 0  # pieces of text in which bytes that are no UTF-8 became U+FFFD
    shown: list[str] = dataclass_field(default_factory=list)  # the first bad rows

    def replaced(self) -> None:
        """One more piece of text with U+FFFD in place of bytes that are no UTF-8."""
        self.n_replaced += 1

    def figures(self) -> dict[str, int]:
        """What was left out or changed, for meta.json."""
        return {"n_empty": self.n_empty, "n_bad": self.n_bad, "n_replaced": self.n_replaced}

    def lines(self) -> list[str]:
        """What a user should know, a sentence each; nothing when every document went in as it is."""
        said = []
        if self.n_empty:
            said.append(f"{self.n_empty:,} empty documents were left out")
        if self.n_bad:
            more = f" (and {self.n_bad - len(self.shown):,} more)" if self.n_bad > len(self.shown) else ""
            said.append(f"{self.n_bad:,} rows that give no text were left out: {'; '.join(self.shown)}{more}")
        if self.n_replaced:
            said.append(f"in {self.n_replaced:,} places bytes that are no UTF-8 became U+FFFD (--errors replace)")
        return said


def batch_pieces(pieces: Iterable[Piece], n_bytes: int = PIECE_BYTES) -> Iterator[list[Piece]]:
    """Neighbouring pieces together, until they hold n_bytes."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.data)
        if size >= n_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_documents(
    paths: Iterable[str | Path],
    *,
    separators: Sequence[str] = (),  # special tokens at which a text file is cut into documents; they are dropped
    field: str = "text",  # which field of JSON, Parquet and Arrow rows
    errors: Errors = "strict",
    on_bad: OnBad = "error",  # rows that give no text: raise at the first, or leave out and count
    piece_bytes: int | None = PIECE_BYTES,  # None: whole documents, however long
    on_read: Callable[[int], None] | None = None,  # called with how many bytes of the files have been read so far
    counts: ReadCounts | None = None,  # is added to on the way
) -> Iterator[Piece]:
    """The documents of the files, in order. Never yields an empty document.

    A text file is one document unless it holds a separator. Raises ValueError that names the file and the byte offset
    (text, compressed data) or the line (JSONL) where it can't be read.
    """
    total = 0
    counts = ReadCounts() if counts is None else counts
    for file in list_files(paths):
        kind = kind_of(file)
        with opened(file) as (stream, position):
            if kind in RECORD_SUFFIXES:
                pieces = _row_pieces(stream, file, kind, field, errors, on_bad, counts)
            else:
                pieces = _text_pieces(stream, file, [s.encode() for s in separators], errors, piece_bytes, counts)
            for piece in pieces:
                counts.n_documents += piece.ends
                yield piece
                if on_read:
                    on_read(total + position())
        total += file.stat().st_size
        if on_read:
            on_read(total)


def _row_pieces(
    stream: IO[bytes], file: Path, kind: str, field: str, errors: Errors, on_bad: OnBad, counts: ReadCounts
) -> Iterator[Piece]:
    for row in rows_of(kind, stream, file, field, errors, counts.replaced):
        if isinstance(row, BadRow):
            if on_bad == "error":
                raise ValueError(row.message)
            counts.n_bad += 1
            if len(counts.shown) < SHOWN:
                counts.shown.append(row.message)
        elif row:
            yield Piece(to_utf8(row), True, file)
        else:
            counts.n_empty += 1


# ------------------------------------------------------------------------------------------------------------- text

# Places where all four split patterns begin a new word whatever lies further left or right: before a blank or tab that
# follows something visible, after a lone line break, and between a letter and punctuation. (?r) searches from the end.
_CUT = regex.compile(r"(?r)(?<=\S)(?=[ \t])|(?<=\S\n)(?=\S)|(?<=\p{L})(?=[,.!?;:。，、！？；：…])")


def find_cut(data: bytes, limit: int) -> int:
    """The last place at or before `limit` where a text can be cut without changing its words; 0 when there is none."""
    for window in (1 << 12, 1 << 18, len(data)):
        start = max(0, limit - window)
        # Up to 4 bytes right of the limit are enough: each rule looks at one character on its right.
        text = data[start : limit + 4].decode("utf-8", "surrogateescape")
        right = len(data[limit : limit + 4].decode("utf-8", "surrogateescape"))
        match = _CUT.search(text, 1, max(1, len(text) - right))
        if match:
            return start + len(text[: match.start()].encode("utf-8", "surrogateescape"))
    return 0


def _text_pieces(
    stream: IO[bytes],
    file: Path,
    separators: list[bytes],
    errors: Errors,
    piece_bytes: int | None,
    counts: ReadCounts,
) -> Iterator[Piece]:
    splitter = re.compile(b"|".join(map(re.escape, sorted(separators, key=len, reverse=True)))) if separators else None
    longest = max(map(len, separators), default=1)
    offset = 0  # of `rest` in the file
    rest = b""
    while chunk := stream.read(piece_bytes or PIECE_BYTES):
        rest += chunk
        done = 0
        for match in splitter.finditer(rest) if splitter else ():
            if match.start() > done:
                text = checked(rest[done : match.start()], file, offset + done, errors, counts.replaced)
                yield Piece(text, True, file)
            elif offset + done:  # a separator at the file's very start closes no document
                counts.n_empty += 1
            done = match.end()
        rest, offset = rest[done:], offset + done
        cut = find_cut(rest, len(rest) - longest) if piece_bytes and len(rest) >= piece_bytes else 0
        if cut:
            yield Piece(checked(rest[:cut], file, offset, errors, counts.replaced), False, file)
            rest, offset = rest[cut:], offset + cut
    if rest:
        yield Piece(checked(rest, file, offset, errors, counts.replaced), True, file)
