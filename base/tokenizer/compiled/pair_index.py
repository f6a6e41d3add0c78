"""A hash table from a pair of tokens to a number: open addressing, flat: key plus one, value, key plus one, value, ..."""

import numpy as np

from ....kernels.numba_jit import compiled, inlined

_MIX = np.uint64(0x9E3779B97F4A7C15)
_32 = np.uint64(32)
_1 = np.uint64(1)


@inlined
def pair_slot(index, left, right):
    """Where the pair lies, or the empty place where it belongs; an empty place holds 0."""
    key = (np.uint64(left) << _32 | np.uint64(right)) + _1
    mask = len(index) // 2 - 1
    mixed = key * _MIX
    at = np.int64(mixed ^ (mixed >> _32)) & mask
    while index[2 * at] != key and index[2 * at] != np.uint64(0):
        at = (at + 1) & mask
    return 2 * at


@compiled
def put_pairs(index, left, right, start, stop):
    """Enter the pairs start to stop of two arrays, each with its own number as value; the first of equal pairs stays."""
    for pair in range(start, stop):
        at = pair_slot(index, left[pair], right[pair])
        if index[at] == np.uint64(0):
            index[at] = (np.uint64(left[pair]) << _32 | np.uint64(right[pair])) + _1
            index[at + 1] = np.uint64(pair)


def new_index(left: np.ndarray, right: np.ndarray, n: int, at_least: int = 1 << 10) -> np.ndarray:
    """A table of the first n pairs, at most half full: a power of two of places, `at_least` or more numbers in all."""
    size = at_least
    while size < 4 * n:
        size *= 2
    index = np.zeros(size, np.uint64)
    put_pairs(index, left, right, 0, n)
    return index
