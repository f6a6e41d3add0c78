"""Training: from counted words to merges, with work only where the merged pair occurs (Sennrich et al. 2016, section 3.2).

All words lie end to end in flat arrays, a gap between two. A token is known at its first and at its last place:

    place   0    1    2    3    4    5            the words "the" and "an" once t h is merged to T
    first   T    -2   e    -1   a    n    -1      -2: inside a token, -1: a gap
    last    -2   T    e    -1   a    n    -1

so that the neighbours of a token are found from its length. A pair's places are listed once, in order, when the pair
comes into being: later merges can only take places away, so stale places are skipped when the list is read, and a
pair's count only falls. Hence the lazy heap: when the pair on top has a smaller count by now, it is put back with that.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ....kernels.numba_jit import compiled
from .pair_index import new_index, pair_slot, put_pairs
from .words import Words, check_words

GAP, INSIDE = -1, -2


class Corpus(NamedTuple):
    """The words in flat arrays, see above."""

    first: np.ndarray  # int32
    last: np.ndarray  # int32
    weight: np.ndarray  # int64, how often the word at a place occurs


class Tokens(NamedTuple):
    """The vocabulary so far."""

    length: np.ndarray  # int32, bytes of each token
    offset: np.ndarray  # int64, where they begin in
    spelling: np.ndarray  # uint8


class Pairs(NamedTuple):
    """Each pair that ever was."""

    left: np.ndarray  # int32
    right: np.ndarray  # int32
    total: np.ndarray  # int64
    start: np.ndarray  # int64, its places are places[start : start + size]
    size: np.ndarray  # int64
    places: np.ndarray  # int32


class Heap(NamedTuple):
    """Pairs with the count that they had when they were put in; the first comes before all others."""

    pair: np.ndarray  # int32
    total: np.ndarray  # int64


class Scratch(NamedTuple):
    """What one merge finds out about its neighbours: written as token on the left, as token + n_vocab on the right."""

    gain: np.ndarray  # int64 (2 n_vocab,), count of the neighbour's pair with the new token
    loss: np.ndarray  # int64, what its pair with the old token lost
    seen: np.ndarray  # int32, places of the pair with the new token
    cursor: np.ndarray  # int64, where the next of them is listed
    touched: np.ndarray  # int32, the neighbours
    found: np.ndarray  # int32, the places in order: which neighbour
    found_at: np.ndarray  # int32, and where its pair starts


@compiled
def lay_out(flat, sizes, counts, corpus):
    """Write the words into the flat arrays as bytes, each followed by a gap; place 0 is a gap too."""
    first, last, weight = corpus
    first[0] = last[0] = GAP
    source = 0
    at = 1
    for word in range(len(sizes)):
        for _ in range(sizes[word]):
            first[at] = last[at] = flat[source]
            weight[at] = counts[word]
            at += 1
            source += 1
        first[at] = last[at] = GAP
        at += 1


@compiled
def list_byte_pairs(corpus, pairs):
    """Count the pairs of bytes and list their places; returns how many pairs and how many places there are."""
    first, _, weight = corpus
    counts = np.zeros(1 << 16, np.int64)
    sizes = np.zeros(1 << 16, np.int64)
    for at in range(len(first) - 1):
        if first[at] >= 0 and first[at + 1] >= 0:
            pair = first[at] << 8 | first[at + 1]
            counts[pair] += weight[at]
            sizes[pair] += 1
    cursor = np.zeros(1 << 16, np.int64)
    n_pairs = 0
    used = 0
    for pair in range(1 << 16):
        if sizes[pair]:
            pairs.left[n_pairs], pairs.right[n_pairs] = pair >> 8, pair & 0xFF
            pairs.total[n_pairs] = counts[pair]
            pairs.start[n_pairs], pairs.size[n_pairs] = used, sizes[pair]
            cursor[pair] = used
            used += sizes[pair]
            n_pairs += 1
    for at in range(len(first) - 1):
        if first[at] >= 0 and first[at + 1] >= 0:
            pair = first[at] << 8 | first[at + 1]
            pairs.places[cursor[pair]] = at
            cursor[pair] += 1
    return n_pairs, used


@compiled
def compare_tokens(tokens, a, b):
    """Lexicographically: positive when token a's bytes are greater than b's, negative when less, 0 when equal."""
    for place in range(min(tokens.length[a], tokens.length[b])):
        of_a, of_b = tokens.spelling[tokens.offset[a] + place], tokens.spelling[tokens.offset[b] + place]
        if of_a != of_b:
            return np.int64(of_a) - np.int64(of_b)
    return np.int64(tokens.length[a]) - np.int64(tokens.length[b])


@compiled
def comes_before(count_a, a, count_b, b, pairs, tokens):
    """Whether pair a is merged before pair b: the greater count, then the greater bytes."""
    if count_a != count_b:
        return count_a > count_b
    if pairs.left[a] != pairs.left[b]:
        order = compare_tokens(tokens, pairs.left[a], pairs.left[b])
        if order != 0:
            return order > 0
    return compare_tokens(tokens, pairs.right[a], pairs.right[b]) > 0


@compiled
def sift_down(heap, n, at, pairs, tokens):
    """Restore the heap's order: move the entry at index `at` down."""
    pair, count = heap.pair[at], heap.total[at]
    while 2 * at + 1 < n:
        child = 2 * at + 1
        other = child + 1
        if other < n and comes_before(
            heap.total[other], heap.pair[other], heap.total[child], heap.pair[child], pairs, tokens
        ):
            child = other
        if not comes_before(heap.total[child], heap.pair[child], count, pair, pairs, tokens):
            break
        heap.pair[at], heap.total[at] = heap.pair[child], heap.total[child]
        at = child
    heap.pair[at], heap.total[at] = pair, count


@compiled
def sift_up(heap, at, pairs, tokens):
    """Restore the heap's order: move the entry at index `at` up."""
    pair, count = heap.pair[at], heap.total[at]
    while at > 0:
        parent = (at - 1) >> 1
        if not comes_before(count, pair, heap.total[parent], heap.pair[parent], pairs, tokens):
            break
        heap.pair[at], heap.total[at] = heap.pair[parent], heap.total[parent]
        at = parent
    heap.pair[at], heap.total[at] = pair, count


@compiled
def push_pairs(heap, n, pairs, tokens, start, stop):
    """Add pairs start to stop to a heap of n; returns its new size. A pair without a count is left out."""
    for pair in range(start, stop):
        if pairs.total[pair] > 0:
            heap.pair[n], heap.total[n] = pair, pairs.total[pair]
            sift_up(heap, n, pairs, tokens)
            n += 1
    return n


@compiled
def join(corpus, length, scratch, n_vocab, left, right, token, listed):
    """Join the pair wherever it still stands, from left to right, and note the neighbours in `scratch`.

    Returns how many neighbours were touched and how many places found.
    """
    first, last, weight = corpus
    gain, loss, seen, _, touched, found, found_at = scratch
    n_touched = n_found = 0
    for place in range(len(listed)):
        at = np.int64(listed[place])
        middle = at + length[left]
        if first[at] != left or first[middle] != right:
            continue
        after = middle + length[right]
        first[middle] = INSIDE
        last[middle - 1] = INSIDE
        first[at] = token
        last[after - 1] = token
        before = last[at - 1]
        behind = first[after]
        for side in range(2):
            neighbour = before if side == 0 else behind
            if neighbour < 0:
                continue
            start = at - length[neighbour] if side == 0 else at
            neighbour += side * n_vocab
            if seen[neighbour] == 0:
                touched[n_touched] = neighbour
                n_touched += 1
            seen[neighbour] += 1
            gain[neighbour] += weight[at]
            loss[neighbour] += weight[at]
            found[n_found] = neighbour
            found_at[n_found] = start
            n_found += 1
    return n_touched, n_found


@compiled
def add_pairs(pairs, scratch, n_vocab, token, n_touched, n_found, n_pairs, n_places):
    """Make the pairs of the new token with its neighbours and list their places; returns the new counts of both."""
    gain, _, seen, cursor, touched, found, found_at = scratch
    for place in range(n_touched):
        neighbour = touched[place]
        on_left = neighbour < n_vocab
        pairs.left[n_pairs] = neighbour if on_left else token
        pairs.right[n_pairs] = token if on_left else neighbour - n_vocab
        pairs.total[n_pairs] = gain[neighbour]
        pairs.start[n_pairs], pairs.size[n_pairs] = n_places, seen[neighbour]
        cursor[neighbour] = n_places
        n_places += seen[neighbour]
        n_pairs += 1
    for place in range(n_found):
        neighbour = found[place]
        pairs.places[cursor[neighbour]] = found_at[place]
        cursor[neighbour] += 1
    return n_pairs, n_places


@compiled
def take_losses(pairs, index, scratch, n_vocab, left, right, n_touched):
    """Lower the counts of the pairs that the neighbours formed with the old tokens, and clear `scratch`."""
    for place in range(n_touched):
        neighbour = scratch.touched[place]
        on_left = neighbour < n_vocab
        at = pair_slot(index, neighbour if on_left else right, left if on_left else neighbour - n_vocab)
        pairs.total[np.int64(index[at + 1])] -= scratch.loss[neighbour]
        scratch.gain[neighbour] = scratch.loss[neighbour] = 0
        scratch.seen[neighbour] = 0


@compiled
def merge_pairs(corpus, tokens, pairs, heap, scratch, index, state, merged, n_vocab, n_merges):
    """Merge until there are n_merges, or no pair is left, or the hash table must grow (returns false then).

    state: merges done, pairs, places, heap size, spelling's bytes. merged: (n, 2) the tokens that each merge joins.
    """
    done, n_pairs, n_places, n_heap, n_bytes = state[0], state[1], state[2], state[3], state[4]
    room = True
    while done < n_merges and n_heap > 0:
        pair = heap.pair[0]
        if heap.total[0] != pairs.total[pair]:
            heap.total[0] = pairs.total[pair]
            if pairs.total[pair] <= 0:
                n_heap -= 1
                heap.pair[0], heap.total[0] = heap.pair[n_heap], heap.total[n_heap]
            sift_down(heap, n_heap, 0, pairs, tokens)
            continue
        listed = pairs.places[pairs.start[pair] : pairs.start[pair] + pairs.size[pair]]
        if 4 * (n_pairs + min(2 * len(listed), 2 * n_vocab)) > len(index):
            room = False
            break
        left, right = pairs.left[pair], pairs.right[pair]
        token = np.int32(256 + done)
        merged[done, 0], merged[done, 1] = left, right
        tokens.offset[token] = n_bytes
        for part in (left, right):
            for place in range(tokens.length[part]):
                tokens.spelling[n_bytes] = tokens.spelling[tokens.offset[part] + place]
                n_bytes += 1
        tokens.length[token] = tokens.length[left] + tokens.length[right]
        n_touched, n_found = join(corpus, tokens.length, scratch, n_vocab, left, right, token, listed)
        old = n_pairs
        n_pairs, n_places = add_pairs(pairs, scratch, n_vocab, token, n_touched, n_found, n_pairs, n_places)
        put_pairs(index, pairs.left, pairs.right, old, n_pairs)
        take_losses(pairs, index, scratch, n_vocab, left, right, n_touched)
        pairs.total[pair] = 0
        n_heap = push_pairs(heap, n_heap, pairs, tokens, old, n_pairs)
        done += 1
    state[0], state[1], state[2], state[3], state[4] = done, n_pairs, n_places, n_heap, n_bytes
    return room


def train(
    words: Words,
    n_merges: int,
    on_merge: Callable[[int], None] | None = None,  # called now and then with how many merges are done
) -> list[tuple[bytes, bytes]]:
    """The first n_merges merges; fewer when no word has two tokens left. See reference.train for what is computed."""
    check_words(words)
    sizes = words[1]
    n_places = int(sizes.sum()) + len(sizes) + 1
    n_vocab = 256 + n_merges
    corpus = Corpus(np.empty(n_places, np.int32), np.empty(n_places, np.int32), np.zeros(n_places, np.int64))
    lay_out(*words, corpus)
    # Bounds: each merge at a place makes at most two pairs there and removes one token. Memory that is never written
    # costs nothing.
    most_pairs, most_places = (1 << 16) + 2 * n_places, 3 * n_places
    longest = int(sizes.max(initial=1))
    tokens = Tokens(
        np.ones(n_vocab, np.int32), np.arange(n_vocab), np.empty(256 + n_merges * min(longest, n_places), np.uint8)
    )
    tokens.spelling[:256] = np.arange(256)
    left, right = np.empty(most_pairs, np.int32), np.empty(most_pairs, np.int32)
    total, start, size = (np.empty(most_pairs, np.int64) for _ in range(3))
    pairs = Pairs(left, right, total, start, size, np.empty(most_places, np.int32))
    heap = Heap(np.empty(most_pairs, np.int32), np.empty(most_pairs, np.int64))
    scratch = Scratch(
        gain=np.zeros(2 * n_vocab, np.int64),
        loss=np.zeros(2 * n_vocab, np.int64),
        seen=np.zeros(2 * n_vocab, np.int32),
        cursor=np.zeros(2 * n_vocab, np.int64),
        touched=np.zeros(2 * n_vocab, np.int32),
        found=np.empty(2 * n_places, np.int32),
        found_at=np.empty(2 * n_places, np.int32),
    )
    state = np.zeros(5, np.int64)
    state[1], state[2] = list_byte_pairs(corpus, pairs)
    state[3] = push_pairs(heap, 0, pairs, tokens, 0, state[1])
    state[4] = 256
    merged = np.empty((n_merges, 2), np.int32)
    index = new_index(pairs.left, pairs.right, int(state[1]), 1 << 17)
    step = max(256, n_merges // 50) if on_merge else n_merges
    while state[0] < n_merges and state[3] > 0:
        target = min(n_merges, int(state[0]) + step)
        while not merge_pairs(corpus, tokens, pairs, heap, scratch, index, state, merged, n_vocab, target):
            index = new_index(pairs.left, pairs.right, int(state[1]), 2 * len(index))
        if on_merge:
            on_merge(int(state[0]))
    spelling = tokens.spelling[: int(state[4])].tobytes()
    spelt = [spelling[o : o + n] for o, n in zip(tokens.offset.tolist(), tokens.length.tolist(), strict=True)]
    return [(spelt[left], spelt[right]) for left, right in merged[: int(state[0])].tolist()]
