"""Text to words without a regular expression engine: UTF-8 bytes and a table of Unicode classes.

`cut_words` finds where the words of patterns.py begin; the tests compare it with `regex` on every code point. For GPT-2's
pattern whether a word begins at a character depends on its neighbours alone, so the loops look at each byte by itself,
without branches, and the compiler turns them into vector instructions. The other patterns count digits and look for
the last line break of a run, so they go word by word.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import carray

from ....kernels.numba_jit import compiled, inlined
from ....kernels.numba_memory import address, byte_at, eight_at, pointer
from ..patterns import KIND_GPT2, KIND_GPT4, KIND_QWEN2, WHOLE
from .memory import padded

OTHER, LETTER, NUMBER, BLANK, SPACE, NEWLINE = range(6)  # BLANK is U+0020, SPACE other white space, NEWLINE CR and LF
_LAST_SPACE = 6  # a white space character of several bytes that something visible follows
BLOCK = 4096  # bytes looked at in one go
_ASSIGNED = 0x40000  # no code point above is a letter, a number or white space
_QUOTE = ord("'")
_HIGH = np.uint64(0x8080808080808080)


@cache
def unicode_classes() -> np.ndarray:
    """The class of each code point, as the `regex` package sees it (5 ms on first use)."""
    import regex

    text = np.arange(_ASSIGNED, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    classes = np.zeros(0x200000, np.uint8)  # all that four bytes can spell, so that no bytes lead outside
    for match in regex.finditer(r"(\p{L}+)|(\p{N}+)|([\r\n]+)|( )|\s+?", text):
        kind = (SPACE, LETTER, NUMBER, NEWLINE, BLANK)[match.lastindex or 0]
        classes[match.start() : match.end()] = kind
    return classes


@inlined
def char_size(first):
    """How many bytes a UTF-8 character has, from its first one."""
    if first < 0x80:
        return 1
    if first < 0xE0:
        return 2
    return 3 if first < 0xF0 else 4


@inlined
def class_at(text, classes, at):
    """The class of the character that starts at a place."""
    first = byte_at(text + at)
    if first < 0x80:
        return byte_at(classes + first)
    second = byte_at(text + at + 1) & 0x3F
    if first < 0xE0:
        return byte_at(classes + ((first & 0x1F) << 6 | second))
    third = byte_at(text + at + 2) & 0x3F
    if first < 0xF0:
        return byte_at(classes + ((first & 0x0F) << 12 | second << 6 | third))
    fourth = byte_at(text + at + 3) & 0x3F
    return byte_at(classes + ((first & 0x07) << 18 | second << 12 | third << 6 | fourth))


@inlined
def skip_class(text, classes, at, end, kind):
    """The end of a run of characters of one class."""
    while at < end and class_at(text, classes, at) == kind:
        at += char_size(byte_at(text + at))
    return at


@inlined
def space_end(text, classes, at, end, kind):
    r"""The end of a word of white space: `\s+(?!\S)|\s+`, and before it, in all patterns but GPT-2's, `\s*[\r\n]+`.

    A run that meets a visible character leaves its last character to the next word.
    """
    last = at
    after_newline = 0
    stop = at
    while stop < end:
        this = class_at(text, classes, stop)
        if this < BLANK:
            break
        last = stop
        stop += char_size(byte_at(text + stop))
        if this == NEWLINE:
            after_newline = stop
    if kind != KIND_GPT2 and after_newline and not (kind == KIND_GPT4 and stop == end):
        return after_newline
    return stop if stop == end or last == at else last


# ------------------------------------------------------------------------------------------------- GPT-2, by neighbours


# Slices, not `array[at + place]`: an index that might be negative keeps the compiler from using vectors (30 times slower).


@inlined
def classify_ascii(chunk, kinds):
    """The class of each byte, right for ASCII; uint8 throughout, so that below zero wraps around to above 200."""
    for place in range(len(chunk)):
        byte = chunk[place]
        letter = np.uint8((byte | np.uint8(32)) - np.uint8(97)) < np.uint8(26)
        number = np.uint8(byte - np.uint8(48)) < np.uint8(10)
        space = np.uint8(byte - np.uint8(9)) < np.uint8(5)
        kinds[place] = letter * LETTER + number * NUMBER + (byte == 32) * BLANK + space * SPACE


@inlined
def classify(text, classes, at, stop, end, kinds):
    """kinds[1 + i] is the class of the character that text[at + i] belongs to, for the bytes up to `stop`."""
    kinds[0] = OTHER
    classify_ascii(carray(pointer(text + at), stop - at, np.uint8), kinds[1:])
    place = at
    while place < stop:
        if not eight_at(text + place) & _HIGH:
            place += 8
        elif byte_at(text + place) < 0x80:
            place += 1
        else:
            kind = class_at(text, classes, place)
            size = char_size(byte_at(text + place))
            for more in range(size):
                kinds[1 + place - at + more] = kind
            if kind == SPACE and place + size < end and class_at(text, classes, place + size) < BLANK:
                kinds[1 + place - at] = _LAST_SPACE
            place += size
    kinds[1 + stop - at] = class_at(text, classes, stop) if stop < end else SPACE


@inlined
def mark_starts(chunk, kinds, starts):
    """starts[i] is 1 where a word begins at chunk[i], contractions apart.

    A visible character begins a word unless it goes on with the class before it or a blank stands before it. White
    space begins one after something visible, and when something visible follows.
    """
    n = len(chunk)
    kinds_before, kinds_here, kinds_after = kinds[:n], kinds[1 : n + 1], kinds[2 : n + 2]
    for place in range(n):
        before, this, after = kinds_before[place], kinds_here[place], kinds_after[place]
        goes_on = (before == this) | (before == BLANK)
        inside = (before >= BLANK) & (after >= BLANK)
        start = ((this < BLANK) & (not goes_on)) | ((this >= BLANK) & (not inside)) | (this == _LAST_SPACE)
        starts[place] = start & ((chunk[place] & 0xC0) != 0x80)
    starts[0] = 1


@inlined
def mark_contractions(chunk, second, third, at_end, starts, lengths):
    """Join 's 't 'm 'd 'll 've 're, where a word begins at the quote, and begin a word behind them.

    `second` and `third` are the bytes one and two further on. lengths[3 + i] is the size of the contraction at chunk[i],
    and 0 where there is none.
    """
    n = len(chunk)
    here = lengths[3 : n + 3]
    for place in range(n):
        one, two = second[place], third[place]
        quote = (chunk[place] == _QUOTE) & (starts[place] != 0)
        short = (one == ord("s")) | (one == ord("t")) | (one == ord("m")) | (one == ord("d"))
        long = ((one == ord("l")) & (two == ord("l"))) | ((two == ord("e")) & ((one == ord("v")) | (one == ord("r"))))
        here[place] = quote * (short * 2 + long * 3)
    if at_end:  # what follows is another text
        lengths[n + 2] = 0
        lengths[n + 1] = 2 if lengths[n + 1] == 2 else 0
    one_back, two_back, three_back = lengths[2 : n + 2], lengths[1 : n + 1], lengths[:n]
    for place in range(n):
        joined = one_back[place] != 0
        behind = (two_back[place] == 2) | (three_back[place] == 3)
        starts[place] = ((starts[place] != 0) & (not joined)) | behind


@inlined
def cut_gpt2(text, classes, at, end, buffers):
    """See cut_words."""
    kinds, starts, lengths, places = buffers
    stop = min(end, at + BLOCK)
    while stop < end and byte_at(text + stop) & 0xC0 == 0x80:
        stop -= 1
    n = stop - at
    classify(text, classes, at, stop, end, kinds)
    chunk = carray(pointer(text + at), n + 2, np.uint8)
    mark_starts(chunk[:n], kinds, starts)
    mark_contractions(chunk[:n], chunk[1 : n + 1], chunk[2 : n + 2], stop == end, starts, lengths)
    count = 0
    for place in range(n if stop == end else n - 3):  # the last ones may still be part of a contraction
        places[count] = at + place
        count += np.int64(starts[place])
    if stop == end:
        return count, end
    if count > 1:
        return count - 1, places[count - 1]
    first = at + 1 if byte_at(text + at) == 32 else at  # a word of more than a block: one run of one class
    kind = class_at(text, classes, first)
    if kind >= BLANK:
        return 1, space_end(text, classes, at, end, KIND_GPT2)
    return 1, skip_class(text, classes, first, end, kind)


# ------------------------------------------------------------------------------------------- the others, word by word

_ONES = np.uint64(0x0101010101010101)
_LOW7 = np.uint64(0x7F7F7F7F7F7F7F7F)
_CASE = np.uint64(0x2020202020202020)
_FROM_A = np.uint64(0x1F1F1F1F1F1F1F1F)  # carries into the high bit from "a" on
_PAST_Z = np.uint64(0x0505050505050505)  # carries into the high bit after "z"


@inlined
def skip_letters(text, classes, at, end):
    """The end of a run of letters.

    Eight bytes at a time: the high bit of each byte of `other` says that the byte is no ASCII letter; the lowest such
    bit, moved down and less one, is a mask of the letters before it, and the mask's bytes are counted by multiplying.
    """
    while at < end:
        chunk = eight_at(text + at)
        folded = (chunk | _CASE) & _LOW7
        other = ~((folded + _FROM_A) & ~(folded + _PAST_Z) & ~chunk) & _HIGH
        if other == np.uint64(0):
            at += 8
            continue
        before = ((other & (~other + np.uint64(1))) >> np.uint64(7)) - np.uint64(1)
        at += np.int64(((before & _ONES) * _ONES) >> np.uint64(56))
        if at >= end or byte_at(text + at) < 0x80:
            break
        while at < end and byte_at(text + at) >= 0x80:
            if class_at(text, classes, at) != LETTER:
                return at
            at += char_size(byte_at(text + at))
    return min(at, end)


@inlined
def contraction(text, at, end):
    """How many bytes of 's 't 'm 'd 'll 've 're in any case start at a quote; 0 for none. The long s counts as an s."""
    if at + 1 >= end:
        return 0
    one = byte_at(text + at + 1)
    if one == 0xC5 and at + 2 < end and byte_at(text + at + 2) == 0xBF:
        return 3
    one |= 0x20
    if one == ord("s") or one == ord("t") or one == ord("m") or one == ord("d"):
        return 2
    if at + 2 >= end:
        return 0
    two = byte_at(text + at + 2) | 0x20
    ll = one == ord("l") and two == ord("l")
    return 3 if ll or (two == ord("e") and (one == ord("v") or one == ord("r"))) else 0


@inlined
def word_end(text, classes, at, end, kind):
    """The end of the word that starts at a place, for LLAMA3, QWEN2 and GPT4."""
    first = byte_at(text + at)
    if first == _QUOTE:
        size = contraction(text, at, end)
        if size:
            return at + size
    this = class_at(text, classes, at)
    if this == LETTER:
        return skip_letters(text, classes, at, end)
    after = at + char_size(first)
    if this == NUMBER:
        most = 1 if kind == KIND_QWEN2 else 3
        for _ in range(most - 1):
            if after < end and class_at(text, classes, after) == NUMBER:
                after += char_size(byte_at(text + after))
        return after
    following = class_at(text, classes, after) if after < end else NEWLINE
    if following == LETTER and this != NEWLINE:
        return skip_letters(text, classes, after, end)
    if this == OTHER or (this == BLANK and following == OTHER):
        stop = skip_class(text, classes, after, end, OTHER)
        return skip_class(text, classes, stop, end, NEWLINE)
    return space_end(text, classes, at, end, kind)


# -------------------------------------------------------------------------------------------------------- any pattern


class Buffers(NamedTuple):
    """Room for one block."""

    kinds: np.ndarray  # uint8
    starts: np.ndarray  # uint8
    lengths: np.ndarray  # uint8
    places: np.ndarray  # int64, where the words begin


@inlined
def new_buffers():
    """Buffers for cut_words."""
    return Buffers(
        np.empty(BLOCK + 16, np.uint8),
        np.empty(BLOCK + 16, np.uint8),
        np.zeros(BLOCK + 16, np.uint8),
        np.empty(BLOCK + 16, np.int64),
    )


@inlined
def cut_words(kind, text, classes, at, end, buffers):
    """Cut some words off a text: word i of the n is places[i] to places[i + 1]. Returns n and where to go on.

    Of the text and the classes the address is given. `at` is where a word begins, `end` a character's edge and the end of
    the text. With kind WHOLE the text is a word.
    """
    n = 0
    if kind == KIND_GPT2:
        n, at = cut_gpt2(text, classes, at, end, buffers)
    elif kind == WHOLE:
        buffers.places[0] = at
        n, at = 1, end
    else:
        while at < end and n < BLOCK:
            buffers.places[n] = at
            at = word_end(text, classes, at, end, kind)
            n += 1
    buffers.places[n] = at
    return n, at


def word_starts(data: bytes, kind: int) -> np.ndarray:
    """Where each pretoken of a UTF-8 text begins, int64. For tests and for looking at pretokens."""
    out = np.empty(len(data) + 1, np.int64)
    return out[: _word_starts(kind, padded(data), unicode_classes(), len(data), out)]


@compiled
def _word_starts(kind, text, classes, end, out):
    buffers = new_buffers()
    text_at, classes_at = address(text), address(classes)
    n_out = at = 0
    while at < end:
        n, at = cut_words(kind, text_at, classes_at, at, end, buffers)
        out[n_out : n_out + n] = buffers.places[:n]
        n_out += n
    return n_out
