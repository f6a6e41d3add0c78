"""Documents -> windows of T tokens and the target of the last, as ranges of the shards; all a function of (seed, index).

    stream     the documents end to end, cut every T tokens                    no padding; many documents are cut
    aligned    each window begins at a document and is full                    no padding; the rest of the last one is left out
    best_fit   whole documents, packed (Ding et al. 2024, arXiv:2404.10830)    a little padding; only what is longer is cut

A document of more than T + 1 tokens takes several windows in any case; pieces overlap by the token that is only a target
in one and read in the next.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from .best_fit import pack
from .bounds import document_ends
from .shards import TokenShards

WindowKind = Literal["stream", "aligned", "best_fit"]
PACKED_AT_ONCE = 1 << 20  # pieces that are packed among each other


@dataclass(frozen=True)
class WindowShares:
    """What the windows of an epoch do to the documents."""

    cut: float  # of the documents: those that lie in several windows, or not wholly in one
    padding: float  # of the windows' positions: those without a label
    left_out: float  # of the tokens: those that the epoch doesn't read


class Windows(Protocol):
    """One epoch's windows of some token shards, in a seeded order; the next epoch has another."""

    tokens: TokenShards
    seq_len: int  # T, inputs of a window
    n_windows: int  # an epoch
    ends: np.ndarray  # (n_documents,) int64, one past each document

    def ranges(self, index: np.ndarray) -> list[list[tuple[int, int]]]:
        """For each index, counted over all epochs, the ranges [start, stop) of tokens whose concatenation is the window.

        At most T + 1 tokens; fewer are padded by who reads them.
        """
        ...

    def shares(self) -> WindowShares:
        """Measured on the first epoch."""
        ...


def make_windows(kind: str, tokens: TokenShards, *, seq_len: int, seed: int) -> Windows:
    """The windows of that kind. Raises ValueError for an unknown kind, and when the tokens don't fill one window."""
    kinds = {"stream": StreamWindows, "aligned": AlignedWindows, "best_fit": PackedWindows}
    if kind not in kinds:
        raise ValueError(f"unknown windows {kind!r}; choose {', '.join(kinds)}")
    if len(tokens) < seq_len + 1:
        raise ValueError(
            f"the data has {len(tokens)} tokens, one window of max_seq_len={seq_len} needs {seq_len + 1}; "
            "add text or lower max_seq_len"
        )
    return kinds[kind](tokens, seq_len=seq_len, seed=seed)


@lru_cache(maxsize=8)  # a step touches at most a few epochs of each source, one after the other
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


# ----------------------------------------------------------------------------------------------------------- stream


class StreamWindows:
    """The documents end to end, each token once an epoch, from a seeded offset that moves the cuts."""

    def __init__(self, tokens: TokenShards, *, seq_len: int, seed: int) -> None:
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.ends = document_ends(tokens)
        self.slack = min(seq_len - 1, len(tokens) - seq_len - 1)  # how far an epoch's first cut may lie
        self.n_windows = (len(tokens) - 1 - self.slack) // seq_len

    def starts(self, index: np.ndarray) -> np.ndarray:
        """The first token of each window, (n,) int64."""
        starts = np.empty(len(index), dtype=np.int64)
        epochs = index // self.n_windows
        for epoch in np.unique(epochs):
            order, offset = _order_and_offset(self.seed, int(epoch), self.n_windows, self.slack)
            mine = epochs == epoch
            starts[mine] = order[index[mine] % self.n_windows] * self.seq_len + offset
        return starts

    def ranges(self, index: np.ndarray) -> list[list[tuple[int, int]]]:
        return [[(start, start + self.seq_len + 1)] for start in self.starts(index).tolist()]

    def shares(self) -> WindowShares:
        _, offset = _order_and_offset(self.seed, 0, self.n_windows, self.slack)
        first, last = np.concatenate([[0], self.ends[:-1]]), self.ends - 1
        # The window that has `last` as a target is the one before that which reads it, so a document may end there whole.
        is_cut = (first - offset) // self.seq_len != (np.maximum(last - 1, first) - offset) // self.seq_len
        unread = len(self.tokens) - self.n_windows * self.seq_len - 1
        return WindowShares(float(is_cut.mean()), 0.0, unread / len(self.tokens))


@lru_cache(maxsize=8)
def _order_and_offset(seed: int, epoch: int, n_windows: int, slack: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(n_windows), int(rng.integers(slack + 1))


# ---------------------------------------------------------------------------------------------------------- aligned


@dataclass(frozen=True)
class _Laid:
    """An epoch's documents end to end in a seeded order, and where its windows begin."""

    order: np.ndarray  # (n_documents,) int64
    ends: np.ndarray  # (n_documents,) int64, one past each document, in the laid out order
    starts: np.ndarray  # (n,) int64 of windows, shuffled


class AlignedWindows:
    """Each window begins at a document, or where a longer one goes on, and is filled by those that follow it.

    The last of them is cut and its rest left out in this epoch; the next epoch lays the documents out in another order, so
    that others are cut.
    """

    def __init__(self, tokens: TokenShards, *, seq_len: int, seed: int) -> None:
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.ends = document_ends(tokens)
        self._first = np.concatenate([[0], self.ends[:-1]])
        self._laid: dict[int, _Laid] = {}  # epoch -> its layout: the two newest
        self.n_windows = len(self._layout(0).starts)

    def _layout(self, epoch: int) -> _Laid:
        if epoch not in self._laid:
            for old in list(self._laid)[:-1]:
                del self._laid[old]
            rng = np.random.default_rng((self.seed, epoch))
            order = rng.permutation(len(self.ends))
            ends = np.cumsum((self.ends - self._first)[order])
            starts = _aligned_starts(ends, self.seq_len)
            self._laid[epoch] = _Laid(order, ends, rng.permutation(starts))
        return self._laid[epoch]

    def ranges(self, index: np.ndarray) -> list[list[tuple[int, int]]]:
        found = []
        for one in index.tolist():
            epoch, i = divmod(one, self.n_windows)
            laid = self._layout(epoch)  # an epoch of fewer windows than the first reads some twice
            found.append(self._documents(laid, int(laid.starts[i % len(laid.starts)])))
        return found

    def _documents(self, laid: _Laid, start: int) -> list[tuple[int, int]]:
        """The ranges of [start, start + T + 1) of the layout, as ranges of the shards."""
        stop, found = start + self.seq_len + 1, []
        at = int(np.searchsorted(laid.ends, start, side="right"))
        while start < stop:
            document = laid.order[at]
            to = min(stop, int(laid.ends[at]))
            shift = int(self.ends[document] - laid.ends[at])
            found.append((start + shift, to + shift))
            start, at = to, at + 1
        return found

    def shares(self) -> WindowShares:
        laid = self._layout(0)
        starts = np.sort(laid.starts)
        first, last = np.concatenate([[0], laid.ends[:-1]]), laid.ends
        at = np.maximum(np.searchsorted(starts, first, side="right") - 1, 0)  # the window that a document begins in
        is_whole = (starts[at] <= first) & (last <= starts[at] + self.seq_len + 1)
        read = np.append(np.minimum(np.diff(starts), self.seq_len + 1), self.seq_len + 1).sum()
        return WindowShares(float(1 - is_whole.mean()), 0.0, float(1 - read / len(self.tokens)))


def _aligned_starts(ends: np.ndarray, seq_len: int) -> np.ndarray:
    """Starts of full windows: the first place behind the window before where a document begins, or a long one's window does."""
    allowed = _pieces(np.concatenate([[0], ends[:-1]]), ends, seq_len)[0]
    following = np.searchsorted(allowed, allowed + seq_len).tolist()  # of each the next, if it is chosen
    allowed = allowed[allowed + seq_len + 1 <= ends[-1]]
    chosen, at = [], 0
    while at < len(allowed):
        chosen.append(at)
        at = following[at]
    return allowed[chosen]


def _pieces(first: np.ndarray, ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) of documents' pieces of at most T + 1 tokens, each beginning with the last token of the one before."""
    lengths = ends - first
    n_pieces = np.maximum(1, -(-(lengths - 1) // seq_len))
    document = np.repeat(np.arange(len(first)), n_pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    starts = first[document] + number * seq_len
    return starts, np.minimum(seq_len + 1, ends[document] - starts)


# --------------------------------------------------------------------------------------------------------- best fit


class PackedWindows:
    """Whole documents, packed by best-fit decreasing; those longer than a window in pieces, of which the last is packed."""

    def __init__(self, tokens: TokenShards, *, seq_len: int, seed: int) -> None:
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.ends = document_ends(tokens)
        first = np.concatenate([[0], self.ends[:-1]])
        self._starts, self._lengths = _pieces(first, self.ends, seq_len)
        bins = []
        for a in range(0, len(self._starts), PACKED_AT_ONCE):
            packed = pack(self._lengths[a : a + PACKED_AT_ONCE], seq_len + 1)
            bins += [np.array(one) + a for one in packed]
        self._members = np.concatenate(bins)  # (n_pieces,) int64, window by window
        self._stops = np.cumsum([len(one) for one in bins])  # (n_windows,) int64
        self.n_windows = len(bins)

    def ranges(self, index: np.ndarray) -> list[list[tuple[int, int]]]:
        found = []
        for one in index.tolist():
            epoch, i = divmod(one, self.n_windows)
            window = int(_permutation(self.seed, epoch, self.n_windows)[i])
            members = self._members[self._stops[window - 1] if window else 0 : self._stops[window]]
            starts, lengths = self._starts[members].tolist(), self._lengths[members].tolist()
            found.append([(start, start + n) for start, n in zip(starts, lengths, strict=True)])
        return found

    def shares(self) -> WindowShares:
        is_cut = self.ends - np.concatenate([[0], self.ends[:-1]]) > self.seq_len + 1
        n_labels = int(self._lengths.sum()) - self.n_windows
        return WindowShares(float(is_cut.mean()), 1 - n_labels / (self.n_windows * self.seq_len), 0.0)
