"""Ids to bytes. Each token of at most 15 bytes is written as two 8-byte stores; bytes beyond its length are overwritten by
the next token.
"""

from typing import NoReturn

import numpy as np

from ....kernels.numba_jit import compiled
from ....kernels.numba_memory import address, put_eight
from ..definition import check_ids
from .memory import PADDING

_LONG = np.uint64(16)  # in place of the size: the token is longer than 15 bytes, or the vocabulary has no such id
_1, _2, _56 = (np.uint64(number) for number in (1, 2, 56))


@compiled
def all_below(ids, limit):
    """Whether each id is at least 0 and below the limit."""
    wrong = np.uint32(0)
    for place in range(len(ids)):
        wrong |= np.uint32(np.uint32(ids[place]) >= np.uint32(limit))  # a negative id is a large one
    return wrong == 0


@compiled
def decode_ids(ids, place, at, heads, sizes, starts, spelling, out):
    """Write the bytes of the tokens from index `place` on. 16 bytes are stored for each; the next token overwrites the excess.

    Returns where it stopped, in the ids and in `out`: at the end, at an id without a token, or at a long token for which
    `out` has no room beside 16 bytes for each id behind it.
    """
    at = np.uint64(at)
    out_at = address(out)
    for place in range(place, len(ids)):  # noqa: B020
        index = np.uint64(ids[place])
        high = heads[index * _2 + _1]
        put_eight(out_at + np.int64(at), heads[index * _2])
        put_eight(out_at + np.int64(at) + 8, high)
        size = high >> _56
        if size == _LONG:
            long_size = sizes[index]
            if long_size < 0 or np.int64(at) + long_size + 16 * (len(ids) - place) > len(out):
                return place, np.int64(at)
            size = np.uint64(long_size)
            start = starts[index]
            for more in range(size):
                out[at + np.uint64(more)] = spelling[start + np.uint64(more)]
        at += size
    return len(ids), np.int64(at)


class Decoder:
    """Ids to bytes. A token of at most 15 bytes is held in 16: its bytes, and its size in the last one."""

    def __init__(self, vocab: dict[int, bytes]):
        check_ids(vocab)
        self._n = max(vocab) + 1
        tokens = [vocab.get(index, b"") for index in range(self._n)]
        sizes = np.fromiter(map(len, tokens), np.int32, self._n)
        self._starts = (np.cumsum(sizes, dtype=np.int64) - sizes).astype(np.uint64)
        self._spelling = np.frombuffer(b"".join(tokens) + bytes(PADDING), np.uint8)
        sizes[[index for index in range(self._n) if index not in vocab]] = -1
        self._sizes = sizes
        heads = np.array(tokens, "S15").view(np.uint8).reshape(self._n, 15)
        last = np.where((sizes < 0) | (sizes > 15), _LONG, sizes).astype(np.uint8)
        self._heads = np.column_stack([heads, last]).view(np.uint64).ravel()

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """The tokens' bytes in a row, uint8. Raises ValueError for an id that the vocabulary doesn't have."""
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"ids are {ids.dtype} of shape {ids.shape}; expected whole numbers in one dimension")
        narrow = np.ascontiguousarray(ids, np.int32)
        if not (all_below(narrow, self._n) and (narrow is ids or np.array_equal(narrow, ids))):
            self._refuse(int(ids[((narrow < 0) | (narrow >= self._n) | (narrow != ids)).argmax()]))
        place = at = extra = 0
        out = np.empty(0, np.uint8)
        while True:
            larger = np.empty(
                at + extra + 16 * (len(narrow) - place) + 2 * PADDING,
                np.uint8,
                # Memory that is never written costs nothing.
            )
            larger[:at] = out[:at]
            out = larger
            place, at = decode_ids(narrow, place, at, self._heads, self._sizes, self._starts, self._spelling, out)
            if place == len(narrow):
                return out[:at]
            size = int(self._sizes[narrow[place]])
            if size < 0:
                self._refuse(int(narrow[place]))
            extra = at + size

    def _refuse(self, index: int) -> NoReturn:
        raise ValueError(f"id {index} is not in the vocabulary (0 to {self._n - 1})")
