"""A hash table whose keys are words: open addressing, four 64-bit numbers a slot.

    slot:  key   key   value   n
A word of at most 15 bytes lies in the two keys itself, its length in the top byte; of a longer one the first key is a
hash and the second says where in `long_bytes` its bytes are. `n` is zero in an empty slot. Here the value is a count
and n the word's size; in encode.py both hold ids.
"""

import numpy as np

from ....kernels.numba_jit import compiled, inlined
from ....kernels.numba_memory import address, byte_at, eight_at
from ..patterns import WHOLE
from .memory import PADDING, aligned_zeros, check_array, check_bounds, padded
from .scan import cut_words, new_buffers, unicode_classes

SLOT = 4
INLINE = 15  # bytes of a word that fit into the two keys
_LOW_MASK = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(INLINE + 1)], np.uint64)
_HIGH_MASK = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(INLINE + 1)], np.uint64)
_LONG = np.uint64(0xFF << 56)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_MIX_2 = np.uint64(0xD6E8FEB86659FD93)
_0, _1, _4, _8, _32, _56 = (np.uint64(number) for number in (0, 1, 4, 8, 32, 56))
KEY, VALUE, N = (np.uint64(number) for number in (1, 2, 3))  # places in a slot


@inlined
def hash_long(word, size):
    """A 64-bit hash of more than 8 bytes."""
    value = np.uint64(size) * _MIX
    at = word
    stop = word + size - 8
    while at < stop:
        value = (value ^ eight_at(at)) * _MIX_2
        value ^= value >> _32
        at += 8
    value = (value ^ eight_at(stop)) * _MIX  # the last eight bytes, which may overlap
    return value ^ (value >> _32)


@inlined
def same_bytes(a, b, size):
    """Whether two stretches of more than 8 bytes are equal."""
    for step in range(0, size - 8, 8):
        if eight_at(a + step) != eight_at(b + step):
            return False
    return eight_at(a + size - 8) == eight_at(b + size - 8)


@inlined
def short_keys(word, size):
    """The two keys of a word of at most 15 bytes, and its hash, of which only the upper half depends on every byte."""
    low = eight_at(word) & _LOW_MASK[np.uint64(size)]
    high = (eight_at(word + 8) & _HIGH_MASK[np.uint64(size)]) | (np.uint64(size) << _56)
    mixed = (low ^ (high * _MIX_2)) * _MIX
    return low, high, mixed ^ (mixed >> _32)


@inlined
def first_look(slots, mask, word, size):
    """Probe the first slot only: its offset, and whether it holds this word (about 90% of lookups do). On a miss, `search`."""
    low, high, mixed = short_keys(word, size & INLINE)
    base = (mixed & mask) * _4
    slot = slots + np.int64(base * _8)
    return base, size <= INLINE and eight_at(slot) == low and eight_at(slot + 8) == high


@compiled
def search(slots, mask, long_bytes, word, size):
    """The offset of the word's slot, or of the empty slot where it would be put. All arguments but the mask are addresses."""
    at = np.uint64(0)
    if size <= INLINE:
        low, high, mixed = short_keys(word, size)
        at = mixed & mask
        while True:
            slot = slots + np.int64(at * _32)
            if eight_at(slot + 24) == _0 or (eight_at(slot) == low and eight_at(slot + 8) == high):
                return at * _4
            at = (at + _1) & mask
    mixed = hash_long(word, size)
    at = mixed & mask
    while True:
        slot = slots + np.int64(at * _32)
        if eight_at(slot + 24) == _0:
            return at * _4
        key = eight_at(slot + 8)
        if eight_at(slot) == mixed and key >= _LONG:
            known = long_bytes + np.int64(key - _LONG)
            if eight_at(known) == np.uint64(size) and same_bytes(known + 8, word, size):
                return at * _4
        at = (at + _1) & mask


@compiled
def put_key(slots, base, long_bytes, long_used, word, size):
    """Write a new word's keys into its slot; returns how much of `long_bytes` is used then.

    A long word lies there behind its length, which takes eight bytes.
    """
    if size <= INLINE:
        slots[base], slots[base + KEY], _ = short_keys(word, size)
        return long_used
    slots[base] = hash_long(word, size)
    slots[base + KEY] = _LONG + np.uint64(long_used)
    for place in range(8):
        long_bytes[long_used + place] = (size >> (8 * place)) & 0xFF
    long_used += 8
    for place in range(size):
        long_bytes[long_used + place] = byte_at(word + place)
    return long_used + size


@compiled
def move_words(old, slots):
    """Enter the words of a table into a larger empty one; their long bytes keep their places."""
    mask = np.uint64(len(slots) // SLOT - 1)
    for base in range(0, len(old), SLOT):
        if old[base + 3] == _0:
            continue
        low, high = old[base], old[base + 1]
        mixed = low
        if high < _LONG:
            mixed = (low ^ (high * _MIX_2)) * _MIX
            mixed ^= mixed >> _32
        at = mixed & mask
        while slots[at * _4 + N] != _0:
            at = (at + _1) & mask
        for part in range(SLOT):
            slots[at * _4 + np.uint64(part)] = old[base + part]


@compiled
def count_words(text, starts, ends, weights, kind, classes, slots, long_bytes, state):
    """Count the words of stretches of text into the table; true when all is done, false when the table must grow first.

    state: the stretch and the place where to go on, slots used, bytes of `long_bytes` used. With no `weights` each word
    counts once.
    """
    mask = np.uint64(len(slots) // SLOT - 1)
    buffers = new_buffers()
    places = buffers.places
    text_at, classes_at, slots_at, long_at = address(text), address(classes), address(slots), address(long_bytes)
    stretch, at, used, long_used = state[0], state[1], state[2], state[3]
    while stretch < len(ends):
        following = max(at, starts[stretch])
        end = ends[stretch]
        weight = np.uint64(weights[stretch]) if len(weights) else np.uint64(1)
        while following < end:
            n, following = cut_words(kind, text_at, classes_at, following, end, buffers)
            for word in range(n):
                at = places[word]
                size = places[word + 1] - at
                base, found = first_look(slots_at, mask, text_at + at, size)
                if not found:
                    base = search(slots_at, mask, long_at, text_at + at, size)
                if slots[base + N] == _0:
                    if 2 * used > len(slots) // SLOT or long_used + size + 8 + PADDING > len(long_bytes):
                        state[0], state[1], state[2], state[3] = stretch, at, used, long_used
                        return False
                    long_used = put_key(slots, base, long_bytes, long_used, text_at + at, size)
                    slots[base + N] = np.uint64(size)
                    used += 1
                slots[base + VALUE] += weight
        at = end
        stretch += 1
    state[0], state[1], state[2], state[3] = stretch, at, used, long_used
    return True


@compiled
def dump_words(slots, long_bytes, flat, sizes, counts):
    """Write out the table's words end to end, their sizes and their counts."""
    word = at = 0
    for base in range(0, len(slots), SLOT):
        size = np.int64(slots[base + 3])
        if size == 0:
            continue
        if size <= INLINE:
            for place in range(size):
                key = slots[base] if place < 8 else slots[base + 1]
                flat[at + place] = (key >> np.uint64(8 * (place & 7))) & np.uint64(0xFF)
        else:
            first = np.int64(slots[base + 1] - _LONG) + 8
            for place in range(size):  # Numba compiles a copy of a slice for two seconds
                flat[at + place] = long_bytes[first + place]
        sizes[word] = size
        counts[word] = np.int64(slots[base + 2])
        at += size
        word += 1


Words = tuple[np.ndarray, np.ndarray, np.ndarray]  # bytes end to end; sizes (n,) int64; counts (n,) int64


def check_words(words: Words) -> None:
    """Raises ValueError unless the sizes and counts fit the bytes."""
    flat, sizes, counts = words
    for array, dtype, name in ((flat, np.uint8, "bytes"), (sizes, np.int64, "sizes"), (counts, np.int64, "counts")):
        check_array(array, dtype, f"the words' {name}")
    if len(sizes) != len(counts) or sizes.min(initial=0) < 0 or int(sizes.sum()) != len(flat):
        raise ValueError(f"{len(sizes)} sizes and {len(counts)} counts do not fit words of {len(flat):,} bytes in all")


class WordCounter:
    """Counts words; its memory grows with the number of different words, not with the text."""

    def __init__(self) -> None:
        self._slots = aligned_zeros(SLOT << 16)
        self._long = np.zeros(1 << 20, np.uint8)
        self._state = np.zeros(4, np.int64)

    def add_text(self, data: bytes, starts: np.ndarray, ends: np.ndarray, kind: int) -> None:
        """Count the words of data[starts[i]:ends[i]] (UTF-8)."""
        self._count(data, starts, ends, np.zeros(0, np.int64), kind)

    def add_words(self, words: Words) -> None:
        """Add another counter's words."""
        flat, sizes, counts = words
        check_words(words)
        ends = np.cumsum(sizes)
        self._count(flat.tobytes(), ends - sizes, ends, counts, WHOLE)

    def _count(self, data: bytes, starts: np.ndarray, ends: np.ndarray, weights: np.ndarray, kind: int) -> None:
        check_bounds(starts, ends, len(data))
        check_array(weights, np.int64, "weights")
        if len(weights) not in (0, len(ends)):
            raise ValueError(f"{len(weights)} weights for {len(ends)} stretches; expected one each, or none")
        text = padded(data)
        classes = unicode_classes()
        self._state[:2] = 0
        while not count_words(text, starts, ends, weights, kind, classes, self._slots, self._long, self._state):
            self._grow(len(data))

    def _grow(self, n_bytes: int) -> None:
        """Twice the slots, and room for any one long word of the text at hand."""
        words = self.words()
        place = self._state[:2].copy()
        larger = WordCounter()
        larger._slots = aligned_zeros(2 * len(self._slots))
        larger._long = np.zeros(2 * len(self._long) + n_bytes, np.uint8)
        larger.add_words(words)
        self._slots, self._long, self._state = larger._slots, larger._long, larger._state
        self._state[:2] = place

    def words(self) -> Words:
        """All words, in no meaningful order."""
        used = int(self._state[2])
        sizes = self._slots[3::SLOT]
        flat = np.empty(int(sizes.sum()), np.uint8)
        out = np.empty(used, np.int64), np.empty(used, np.int64)
        dump_words(self._slots, self._long, flat, *out)
        return flat, *out
