"""Words to ids by merge rank, with a cache of words.

Encoding is exact: in each word the pair of lowest rank is merged first, the leftmost of equals, until no pair is left.
A word encoded before costs one lookup in the cache, a hash table (words.py) whose slots hold up to three ids.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import regex

from ....kernels.numba_jit import collector_paused, compiled, inlined
from ....kernels.numba_memory import address, byte_at, eight_at, four_at, put_eight
from ..definition import ID_BITS, Definition, check_ids
from ..patterns import WHOLE, kind_of
from ..split import cut
from .memory import PADDING, aligned_zeros, check_bounds, padded, utf8_address
from .scan import cut_words, new_buffers, unicode_classes
from .words import SLOT, VALUE, N, count_words, first_look, move_words, put_key, search

FIRST_SLOTS = 1 << 17  # of the cache, 32 bytes each; when half are used it gives way to a larger one
LAST_SLOTS = 1 << 19
LONGEST = 128  # bytes of a cached word; longer ones are rare and go through a heap
_NONE = 2**31 - 1
_1, _8, _32 = (np.uint64(number) for number in (1, 8, 32))
RANK_BITS = 64 - 2 * ID_BITS
_ID_BITS, _RANK_BITS = np.uint64(ID_BITS), np.uint64(RANK_BITS)
_RANK_MASK = np.uint64((1 << RANK_BITS) - 1)
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Ranks(NamedTuple):
    """The vocabulary as the merge loop needs it."""

    byte_id: np.ndarray  # int32 (256,), -1 for a byte that the vocabulary lacks
    lacks_bytes: bool  # such bytes are dropped from a word before it is merged
    byte_pair_rank: np.ndarray  # int32 (65536,), two bytes -> the rank of their merge, _NONE when they have none
    pair_rank: np.ndarray  # uint64, open addressing by two ids: the ids and the rank plus one, or 0
    merged_id: np.ndarray  # int32, the id that the merge of each rank makes
    whole: np.ndarray  # uint64, words.py: each token -> its id plus one, when whole words need no merges; else empty
    whole_long: np.ndarray  # uint8


class Tables(NamedTuple):
    """The same by address."""

    byte_id: int
    lacks_bytes: bool
    byte_pair_rank: int
    pair_rank: int
    pair_mask: int  # the number of its entries, less one
    merged_id: int
    whole: int
    whole_mask: int  # the number of its slots, less one; -1 when there are none
    whole_long: int


class Cache(NamedTuple):
    """Words encoded before."""

    slots: np.ndarray  # uint64, words.py: value = the first two ids, n = the third id and above it how many there are
    long_bytes: np.ndarray  # uint8
    ids: np.ndarray  # int32, of words of more than three ids; the slot's value is the index of the first
    used: np.ndarray  # int64: slots, bytes, ids


@inlined
def first_place(pair, mask):
    """Where to look for a pair of ids first."""
    mixed = pair * _MIX
    return (mixed ^ mixed >> _32) & np.uint64(mask)


@inlined
def rank_of(tables, left, right):
    """The rank of a pair's merge, _NONE when it has none."""
    pair = np.uint64(left) << _ID_BITS | np.uint64(right)
    at = first_place(pair, tables.pair_mask)
    while True:
        entry = eight_at(tables.pair_rank + np.int64(at * _8))
        if not entry:
            return _NONE
        if entry >> _RANK_BITS == pair:
            return np.int64(entry & _RANK_MASK) - 1
        at = (at + _1) & np.uint64(tables.pair_mask)


@compiled
def index_merges(table, left, right):
    """Fill the table of `rank_of`; of equal pairs the first counts."""
    mask = np.uint64(len(table) - 1)
    for rank in range(len(left)):
        pair = np.uint64(left[rank]) << _ID_BITS | np.uint64(right[rank])
        at = first_place(pair, mask)
        while table[at] and table[at] >> _RANK_BITS != pair:
            at = (at + _1) & mask
        if not table[at]:
            table[at] = pair << _RANK_BITS | np.uint64(rank + 1)


@compiled
def merge_short(tables, word, size, ids, rank):
    """Encode a short word into `ids`; returns how many. `rank[i]` is that of the pair that starts at i."""
    n = size
    for place in range(n):
        ids[place] = four_at(tables.byte_id + 4 * byte_at(word + place))
    for place in range(n - 1):
        rank[place] = four_at(tables.byte_pair_rank + 4 * (byte_at(word + place) << 8 | byte_at(word + place + 1)))
    while n > 1:
        least = _NONE << 8
        for place in range(n - 1):
            least = min(
                least, np.int64(rank[place]) << 8 | place
            )  # without a branch, which would often be mispredicted
        best, least_rank = least & 0xFF, least >> 8
        if least_rank == _NONE:
            break
        ids[best] = four_at(tables.merged_id + 4 * least_rank)
        n -= 1
        place = best + 1
        while place < n:  # a for loop becomes a call of memmove, which costs more than these few
            ids[place] = ids[place + 1]
            rank[place] = rank[place + 1]
            place += 1
        if best + 1 < n:
            rank[best] = rank_of(tables, ids[best], ids[best + 1])
        if best > 0:
            rank[best - 1] = rank_of(tables, ids[best - 1], ids[best])
    return n


@inlined
def sink(heap, n, at):
    """Restore the order of a min-heap of n entries: move the entry at index `at` down."""
    value = heap[at]
    while 2 * at + 1 < n:
        child = 2 * at + 1
        if child + 1 < n and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value


@inlined
def rise(heap, at):
    """Restore the order of the min-heap: move the entry at index `at` up."""
    value = heap[at]
    while at > 0 and heap[(at - 1) >> 1] > value:
        heap[at] = heap[(at - 1) >> 1]
        at = (at - 1) >> 1
    heap[at] = value


@compiled
def merge_long(tables, word, size, out):
    """Encode a word of any length in n log n steps; returns how many ids were written to `out`.

    A token is identified by the index of its first byte. A heap entry is the pair's rank << 32 | index; an entry whose pair has
    changed since is skipped.
    """
    ids = np.empty(size, np.int32)
    before = np.empty(size, np.int32)
    behind = np.empty(size, np.int32)
    heap = np.empty(3 * size, np.int64)
    n = 0
    for place in range(size):
        ids[place] = four_at(tables.byte_id + 4 * byte_at(word + place))
        before[place], behind[place] = place - 1, place + 1
    for place in range(size - 1):
        rank = rank_of(tables, ids[place], ids[place + 1])
        if rank != _NONE:
            heap[n] = rank << 32 | place
            n += 1
    for place in range(n // 2 - 1, -1, -1):
        sink(heap, n, place)
    while n > 0:
        place = heap[0] & 0xFFFFFFFF
        rank = heap[0] >> 32
        second = behind[place]
        if ids[place] < 0 or second >= size or rank_of(tables, ids[place], ids[second]) != rank:
            n -= 1
            heap[0] = heap[n]
            sink(heap, n, 0)
            continue
        ids[place] = four_at(tables.merged_id + 4 * rank)
        ids[second] = -1
        third = behind[second]
        behind[place] = third
        if third < size:
            before[third] = place
        n -= 1
        heap[0] = heap[n]
        sink(heap, n, 0)
        for side in range(2):
            start = np.int64(before[place]) if side == 0 else place
            if start < 0 or behind[start] >= size:
                continue
            rank = rank_of(tables, ids[start], ids[behind[start]])
            if rank != _NONE:
                heap[n] = rank << 32 | start
                rise(heap, n)
                n += 1
    n_out = 0
    place = 0
    while place < size:
        out[n_out] = ids[place]
        n_out += 1
        place = behind[place]
    return n_out


@compiled
def encode_word(tables, word, size, out, rank):
    """Encode one word into `out`; returns how many ids it has."""
    if tables.whole_mask >= 0:
        base = search(tables.whole, np.uint64(tables.whole_mask), tables.whole_long, word, size)
        slot = tables.whole + np.int64(base * _8)
        if eight_at(slot + 24):
            out[0] = np.int64(eight_at(slot + 16)) - 1
            return 1
    if tables.lacks_bytes:
        kept = np.empty(size + PADDING, np.uint8)
        n = 0
        for place in range(size):
            byte = byte_at(word + place)
            if four_at(tables.byte_id + 4 * byte) >= 0:
                kept[n] = byte
                n += 1
        if n == 0:
            return 0
        if n <= LONGEST:
            return merge_short(tables, address(kept), n, out, rank)
        return merge_long(tables, address(kept), n, out)
    if size <= LONGEST:
        return merge_short(tables, word, size, out, rank)
    return merge_long(tables, word, size, out)


@compiled
def remember(cache, base, word, size, ids, n):
    """Put a word and its n ids into the cache's empty slot; false when there is no room."""
    slots, long_bytes, more, used = cache
    if 2 * used[0] > len(slots) // SLOT or used[1] + size + 8 + PADDING > len(long_bytes) or used[2] + n >= len(more):
        return False
    used[0] += 1
    used[1] = put_key(slots, base, long_bytes, used[1], word, size)
    if n > 3:
        for place in range(n):
            more[used[2] + place] = ids[place]
        slots[base + VALUE] = np.uint64(used[2])
        slots[base + N] = np.uint64(n) << _32
        used[2] += n
        return True
    second = np.uint64(ids[1]) if n > 1 else np.uint64(0)
    third = np.uint64(ids[2]) if n > 2 else np.uint64(0)
    slots[base + VALUE] = np.uint64(ids[0]) | second << _32
    slots[base + N] = third | np.uint64(n) << _32
    return True


@compiled
def copy_known(slots, mask, long_bytes, more, word, size, out):
    """Write a cached word's ids to an address, with room for three at least; returns how many, 0 for an unknown word."""
    slot = slots + np.int64(search(slots, mask, long_bytes, word, size) * _8)
    value, last = eight_at(slot + 16), eight_at(slot + 24)
    n = np.int64(last >> _32)
    if n <= 3:
        put_eight(out, value)
        put_eight(out + 8, last)
    else:
        first = more + 4 * np.int64(value)
        for place in range(0, n, 2):
            put_eight(out + 4 * place, eight_at(first + 4 * place))
    return n


@compiled
def encode_text(text_at, ends, kind, classes, ranks, cache, out, out_ends, state):
    """Encode stretches of text that lie end to end from an address on; `out_ends` tells where each one's ids end.

    `out` needs room for as many ids as the text has bytes, and four more. state: the stretch and the place where to go
    on, ids written. Returns false when the cache is full: call again with another one.
    """
    tables = by_address(ranks)
    mask = np.uint64(len(cache.slots) // SLOT - 1)
    slots_at, long_at, more_at = address(cache.slots), address(cache.long_bytes), address(cache.ids)
    classes_at, out_at = address(classes), address(out)
    buffers = new_buffers()
    places = buffers.places
    ids, rank = np.empty(LONGEST, np.int32), np.empty(LONGEST, np.int32)
    stretch, following, n_out = state[0], state[1], state[2]
    while stretch < len(ends):
        end = ends[stretch]
        while following < end:
            n_words, following = cut_words(kind, text_at, classes_at, following, end, buffers)
            for i in range(n_words):
                word, size = text_at + places[i], places[i + 1] - places[i]
                here = out_at + 4 * n_out
                base, found = first_look(slots_at, mask, word, size)
                slot = slots_at + np.int64(base * _8)
                last = eight_at(slot + 24)
                n = np.int64(last >> _32)
                if found and n <= 3:
                    put_eight(here, eight_at(slot + 16))
                    put_eight(
                        here + 8, last
                    )  # the third id; the other four bytes are overwritten by the next word's ids
                else:
                    n = copy_known(slots_at, mask, long_at, more_at, word, size, here)
                if n == 0:
                    if size > LONGEST:
                        n = encode_word(tables, word, size, out[n_out:], rank)
                    else:
                        n = encode_word(tables, word, size, ids, rank)
                        if n == 0:  # all its bytes were dropped; the cache has no room for words without ids
                            continue
                        base = search(slots_at, mask, long_at, word, size)
                        if not remember(cache, base, word, size, ids, n):
                            state[0], state[1], state[2] = stretch, places[i], n_out
                            return False
                        for place in range(n):
                            out[n_out + place] = ids[place]
                n_out += n
        out_ends[stretch] = n_out
        stretch += 1
    state[2] = n_out
    return True


@compiled
def by_address(ranks):
    """Ranks -> Tables."""
    return Tables(
        address(ranks.byte_id),
        ranks.lacks_bytes,
        address(ranks.byte_pair_rank),
        address(ranks.pair_rank),
        len(ranks.pair_rank) - 1,
        address(ranks.merged_id),
        address(ranks.whole),
        len(ranks.whole) // SLOT - 1,
        address(ranks.whole_long),
    )


class Encoder:
    """Plain text to ids. Not thread-safe by itself; safe today only because the compiled loops hold the GIL."""

    def __init__(self, definition: Definition):
        self._definition = definition
        splits = definition.splits
        self._kind = kind_of(splits[-1]) if splits else WHOLE
        general = splits if self._kind == WHOLE else splits[:-1]  # scan.py cuts by a named pattern that comes last
        self._patterns = [regex.compile(pattern) for pattern in general]
        self._cache: Cache | None = None

    @cached_property
    @collector_paused()
    def _ranks(self) -> Ranks:
        left, right, merged_id = self._definition.merge_ids
        n_merges = len(merged_id)
        check_ids(self._definition.vocab)
        largest = max(self._definition.vocab)
        byte_of = np.full(largest + 1, -1)
        byte_id = np.full(256, -1, np.int32)
        for index, token in self._definition.vocab.items():
            if len(token) == 1:
                byte_of[index], byte_id[token[0]] = token[0], index
        pair_rank = np.zeros(max(1 << 10, 1 << (2 * n_merges).bit_length()), np.uint64)  # at most half full
        index_merges(pair_rank, left, right)
        of_bytes = np.flatnonzero((byte_of[left] >= 0) & (byte_of[right] >= 0))[::-1]  # backwards: the first counts
        byte_pairs = np.full(1 << 16, _NONE, np.int32)
        byte_pairs[byte_of[left[of_bytes]] << 8 | byte_of[right[of_bytes]]] = of_bytes
        whole, whole_long = (
            self._whole_words() if self._definition.ignore_merges else (aligned_zeros(0), np.zeros(PADDING, np.uint8))
        )
        return Ranks(byte_id, bool(byte_id.min() < 0), byte_pairs, pair_rank, merged_id, whole, whole_long)

    def _whole_words(self) -> tuple[np.ndarray, np.ndarray]:
        """The vocabulary as a table of words whose value is the id plus one."""
        tokens = list(self._definition.vocab.values())
        ids = np.array(list(self._definition.vocab), np.int64)
        sizes = np.array([len(token) for token in tokens], np.int64)
        ends = np.cumsum(sizes)
        slots = aligned_zeros(SLOT << (4 * len(tokens)).bit_length())
        long_bytes = np.zeros(int((sizes + 8).sum()) + 2 * PADDING, np.uint8)
        text = padded(b"".join(tokens))
        state = np.zeros(4, np.int64)
        done = count_words(text, ends - sizes, ends, ids + 1, WHOLE, unicode_classes(), slots, long_bytes, state)
        assert done, "the table was made large enough"
        return slots, long_bytes

    def _renew_cache(self) -> Cache:
        """The first cache, one of four times the size with the same words, or when that would pass 16 MB an empty one."""
        n_slots = min(4 * len(self._cache.slots) // SLOT, LAST_SLOTS) if self._cache else FIRST_SLOTS
        long_bytes = np.zeros(16 * n_slots, np.uint8)
        ids, used = np.zeros(4 * n_slots, np.int32), np.zeros(3, np.int64)
        new = Cache(aligned_zeros(SLOT * n_slots), long_bytes, ids, used)
        old = self._cache
        if old is not None and len(new.slots) > len(old.slots):
            used[:] = old.used
            long_bytes[: used[1]] = old.long_bytes[: used[1]]
            ids[: used[2]] = old.ids[: used[2]]
            move_words(old.slots, new.slots)
        self._cache = new
        return new

    @property
    def by_kind(self) -> bool:
        """Whether scan.py alone cuts the text, without the regex package."""
        return self._kind != WHOLE and not self._patterns

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of UTF-8 texts in a row (int32), and where each text's ids end (int64)."""
        if self._patterns:
            return self._encode_by_pattern(texts)
        ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        return self.encode_bytes(texts[0] if len(texts) == 1 else b"".join(texts), ends, self._kind)

    def encode_bytes(self, data: bytes, ends: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode stretches of UTF-8 that lie end to end."""
        check_bounds(np.concatenate([[0], ends[:-1]]) if len(ends) else ends, ends, len(data))
        text = padded(data)
        return self._encode_at(text.ctypes.data, len(data), ends, kind)

    def encode_text(self, text: str) -> np.ndarray:
        """The ids of one text without lone surrogates, int32, read from where CPython keeps its UTF-8."""
        if self._patterns:
            return self._encode_by_pattern([text.encode()])[0]
        start, n_bytes, _alive = utf8_address(text)
        return self._encode_at(start, n_bytes, np.array([n_bytes]), self._kind)[0]

    def _encode_at(self, start: int, n_bytes: int, ends: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray]:
        out = np.empty(n_bytes + 4, np.int32)  # memory that is never written costs nothing
        out_ends = np.empty(len(ends), np.int64)
        state = np.zeros(3, np.int64)
        cache = self._cache or self._renew_cache()
        while not encode_text(start, ends, kind, unicode_classes(), self._ranks, cache, out, out_ends, state):
            cache = self._renew_cache()
        out.resize(int(state[2]), refcheck=False)  # gives the rest back in place, where a copy would touch new memory
        return out, out_ends

    def _encode_by_pattern(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """For split patterns that scan.py doesn't know: the regex package cuts each text, then the pieces are encoded."""
        ends: list[np.ndarray] = [np.zeros(0, np.int64)]
        n_pieces: list[int] = []  # up to and with each text
        n_bytes = 0
        for data in texts:
            ends.append(cut(data.decode(), data, self._patterns) + n_bytes)
            n_bytes += len(data)
            n_pieces.append(len(ends[-1]) + (n_pieces[-1] if n_pieces else 0))
        data = texts[0] if len(texts) == 1 else b"".join(texts)
        ids, piece_ends = self.encode_bytes(data, np.concatenate(ends), self._kind)
        return ids, np.concatenate([[0], piece_ends])[n_pieces]
