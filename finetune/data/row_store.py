"""Encoded rows on disk instead of in memory, for data that exceed it: `--set streaming=true`."""

import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from .chat import Encoded

ID_BYTES, MASK_BYTES = 4, 1  # of a token


class RowStore(Sequence[Encoded]):
    """Rows in a file without a name, which ends with the process; memory holds 12 bytes a row: where it starts, how long it is.

    Append all rows first, then read any of them in any order: a row is one read of the file.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as the rows)
        self._starts, self._sizes, self._end = array("q"), array("i"), 0

    def append(self, row: Encoded) -> None:
        """One more row. Raises OSError when the disk is full."""
        with self._explained():
            self._file.write(row.ids.astype(np.int32).tobytes() + row.loss_mask.astype(np.bool_).tobytes())
        self._starts.append(self._end)
        self._sizes.append(len(row.ids))
        self._end += len(row.ids) * (ID_BYTES + MASK_BYTES)

    def finish(self) -> None:
        """Hand the last rows to the system; call it once, before the first reading."""
        with self._explained():
            self._file.flush()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Encoded:  # pyright: ignore[reportIncompatibleMethodOverride] (no slices)
        size = self._sizes[i]
        self._file.seek(self._starts[i])
        data = self._file.read(size * (ID_BYTES + MASK_BYTES))
        ids = np.frombuffer(data, np.int32, size)
        return Encoded(ids, np.frombuffer(data, np.bool_, size, offset=size * ID_BYTES))

    def __iter__(self) -> Iterator[Encoded]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:  # (n,) int32
        """Tokens of each row."""
        return np.frombuffer(self._sizes, np.int32)

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return self._end

    def close(self) -> None:
        """Remove the file."""
        with suppress(OSError):  # on a full disk closing tries to write once more; the file is closed all the same
            self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror} after {self._end:,} bytes of encoded rows (streaming=true: {ID_BYTES + MASK_BYTES} bytes "
                "a token); make room there, or choose an --out on another disk",
                str(self._folder),
            ) from None


def row_lengths(rows: Sequence[Encoded]) -> np.ndarray:  # (n,) int32
    """Tokens of each row, of those in memory or on disk."""
    return rows.lengths if isinstance(rows, RowStore) else np.array([len(row.ids) for row in rows], np.int32)
