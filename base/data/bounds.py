"""Where the documents of token shards end, and which documents two of them share: each from one reading of the ids."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .shards import TokenShards

BASE = 0x9E3779B97F4A7C15  # of the polynomial: odd, so that it has an inverse modulo 2^64


def document_ends(tokens: "TokenShards") -> np.ndarray:
    """One past the last token of each document, (n_documents,) int64, ascending. The last may lack its EOS (a cut text)."""
    eos, bos = tokens.meta["eos_token_id"], tokens.meta.get("bos_token_id")
    found, start = [np.zeros(0, np.int64)], 0
    for block in tokens.blocks():
        found.append(np.flatnonzero(block == eos) + start)
        start += len(block)
    at = np.concatenate(found)
    if bos == eos:  # one id for both: no document is empty, so a BOS is the first token, or stands right behind an EOS
        is_bos = np.diff(at, prepend=-1) == 1
        at = at[~is_bos]
    ends = at + 1
    return ends if len(tokens) == (ends[-1] if len(ends) else 0) else np.append(ends, len(tokens))


def shared_documents(train: "TokenShards", val: "TokenShards") -> np.ndarray:
    """Indices of val's documents that are among train's too, id for id (by 64-bit hashes, so that equal ones are found and
    others are taken for equal with a chance of about n_train x n_val / 2^64)."""
    if len(val) == 0 or len(train) == 0:
        return np.zeros(0, np.int64)
    wanted = _hashes(val)
    return np.flatnonzero(np.isin(wanted, _hashes(train)))


def _hashes(tokens: "TokenShards") -> np.ndarray:
    """A hash of each document, (n_documents,) uint64: the sum of mix(id_i) BASE^i over its ids, and of its length."""
    ends = document_ends(tokens)
    starts = np.concatenate([[0], ends[:-1]])
    sums = np.zeros(len(ends), np.uint64)
    powers = np.zeros(0, np.uint64)
    for first, block in _numbered(tokens):
        if len(powers) < len(block):
            powers = _powers(len(block))
        last = first + len(block)
        a, b = np.searchsorted(ends, first, side="right"), np.searchsorted(starts, last, side="left")
        begin = np.maximum(starts[a:b] - first, 0)  # of each document's part in this block
        parts = np.add.reduceat(_mix(block.astype(np.uint64)) * powers[: len(block)], begin)
        shift = first - starts[a:b]  # the exponent that BASE^(index in the block) lacks; negative inside the block
        sums[a:b] += parts * _power(shift)
    return _mix(sums ^ _mix((ends - starts).astype(np.uint64)))


def _numbered(tokens: "TokenShards") -> Iterator[tuple[int, np.ndarray]]:
    first = 0
    for block in tokens.blocks():
        yield first, block
        first += len(block)


def _powers(n: int) -> np.ndarray:
    factors = np.full(n, BASE, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _power(exponents: np.ndarray) -> np.ndarray:
    """BASE^exponents modulo 2^64, the inverse's power for negative ones; by squaring."""
    inverse = pow(BASE, -1, 1 << 64)
    result = np.ones(len(exponents), np.uint64)
    left = np.abs(exponents)
    square = np.where(exponents < 0, np.uint64(inverse), np.uint64(BASE))
    while left.any():
        result *= np.where(left & 1, square, np.uint64(1))
        square = square * square
        left >>= 1
    return result


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele et al. 2014, doi:10.1145/2660193.2660195, fig. 17): well spread bits, one to one."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
