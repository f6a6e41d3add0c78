"""Documents -> ids: every document of the files, encoded into one file on disk."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint import naming
from ..text.documents import Piece, ReadCounts, batch_pieces, total_bytes

if TYPE_CHECKING:
    from ..tokenizer.definition import Definition
    from ..tokenizer.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]


@dataclass
class Stream:
    """All tokens in one file on disk, and where each document ends in tokens and bytes."""

    file: Path
    dtype: np.dtype[Any]
    token_ends: np.ndarray  # (n_documents,) int64
    n_bytes: np.ndarray  # (n_documents,) int64, of text


class Documents:
    """The pieces of the files that train, then of those that validate, with counts of what is left out on the way."""

    def __init__(
        self,
        files: Sequence[Path],
        val_files: Sequence[Path],
        read: Callable[..., Iterator[Piece]],  # read_documents with its options
        counts: ReadCounts,
        progress: Progress | None,
    ) -> None:
        self.files, self.val_files, self._read, self.counts, self._progress = files, val_files, read, counts, progress
        self.n_train = 0  # documents of `files`, once they are read

    def __iter__(self) -> Iterator[Piece]:
        yield from self._pieces(self.files, 0)
        self.n_train = self.counts.n_documents
        if self.val_files:
            yield from self._pieces(self.val_files, total_bytes(self.files))

    def _pieces(self, files: Sequence[Path], before: int) -> Iterator[Piece]:
        total, progress = total_bytes([*self.files, *self.val_files]), self._progress
        on_read = None if progress is None else lambda done: progress("encoding", before + done, total)
        return self._read(files, counts=self.counts, on_read=on_read)


class EncodeHandler:
    """Encodes blocks of documents, EOS behind each document's last piece (text.parallel.Handler).

    Where the tokenizer asks for BOS, it precedes each document's first piece.
    """

    def __init__(self, definition: "Definition", dtype: str):
        from ..tokenizer.tokenizer import Tokenizer

        self._tokenizer = Tokenizer(definition)
        self._dtype = np.dtype(dtype)

    def take(self, block: list[tuple[Piece, bool]]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of pieces, each with whether it begins its document, and where each piece's ids end (EOS included)."""
        ids, ends = self._tokenizer.encode_ragged([piece.data.decode() for piece, _ in block])
        closes = np.array([piece.ends for piece, _ in block])
        opens = np.array([begins and self._tokenizer.add_bos for _, begins in block])
        starts = np.concatenate([[0], ends[:-1]])
        # np.insert keeps the given order at equal positions: an EOS comes before the next document's BOS.
        positions = np.concatenate([ends[closes], starts[opens]])
        special = np.repeat(
            [self._tokenizer.eos_token_id or 0, self._tokenizer.bos_token_id or 0], [closes.sum(), opens.sum()]
        )
        ids = np.insert(ids, positions, special)
        return ids.astype(self._dtype), ends + np.cumsum(closes) + np.cumsum(opens)

    def finish(self) -> None:
        pass


def encode_all(
    pieces: Iterable[Piece],
    tokenizer: "Tokenizer",
    target: Path,
    workers: int,
) -> Stream:
    """Encode every document into one file. Raises ValueError when there is none, OSError when the disk refuses."""
    from ..text.parallel import run_blocks

    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    notes: deque[list[tuple[int, bool]]] = deque()  # of the blocks under way: each piece's size, and if it ends there

    def noted() -> Iterator[list[tuple[Piece, bool]]]:
        begins = True
        for block in batch_pieces(pieces):
            notes.append([(len(piece.data), piece.ends) for piece in block])
            marked = []
            for piece in block:
                marked.append((piece, begins))
                begins = piece.ends
            yield marked

    token_ends: list[int] = []
    n_bytes: list[int] = []
    n_tokens = open_bytes = 0
    make = partial(EncodeHandler, tokenizer.definition, dtype.name)
    with naming(target), target.open("wb") as file:
        for what, result in run_blocks(make, noted(), workers):
            if what == "finish":
                continue
            ids, ends = result
            file.write(memoryview(ids))  # ndarray.tofile loses the last 4 KiB on a full disk without an error
            for (size, closes), end in zip(notes.popleft(), ends.tolist(), strict=True):
                open_bytes += size
                if closes:
                    token_ends.append(n_tokens + end)
                    n_bytes.append(open_bytes)
                    open_bytes = 0
            n_tokens += len(ids)
    check_size(target, n_tokens * dtype.itemsize)
    if not token_ends:
        raise ValueError("the files hold no document; give files with text")
    return Stream(target, dtype, np.array(token_ends, np.int64), np.array(n_bytes, np.int64))


def check_size(path: Path, expected: int) -> None:
    """Raise OSError when a file is shorter than what was written to it."""
    found = path.stat().st_size
    if found != expected:
        raise OSError(f"can't write {path}: {found:,} of {expected:,} bytes arrived; is the disk full?")
