"""Text to words without a regular expression engine: UTF-8 bytes and a table of Unicode classes.

`word_end` finds where the word that starts at a place ends, for the four patterns of patterns.py; the tests compare it
with `regex` on every code point. Each function reads a padded text (jit.py) up to `end`, which is a character's edge.
"""

from functools import cache

import numpy as np

from .jit import compiled
from .patterns import KIND_GPT2, KIND_GPT4, KIND_QWEN2, WHOLE

OTHER, LETTER, NUMBER, SPACE, NEWLINE = 0, 1, 2, 3, 4
_BLANK, _QUOTE = ord(" "), ord("'")
_ONES = np.uint64(0x0101010101010101)
_HIGH = np.uint64(0x8080808080808080)
_LOW7 = np.uint64(0x7F7F7F7F7F7F7F7F)
_CASE = np.uint64(0x2020202020202020)
_FROM_A = np.uint64(0x1F1F1F1F1F1F1F1F)  # carries into the high bit from "a" on
_PAST_Z = np.uint64(0x0505050505050505)  # carries into the high bit after "z"


@cache
def unicode_classes() -> np.ndarray:
    """The class of each code point, as the `regex` package sees it (25 ms on first use)."""
    import regex

    text = np.arange(0x110000, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    classes = np.zeros(0x110000, np.uint8)
    for match in regex.finditer(r"(\p{L}+)|(\p{N}+)|([\r\n]+)|\s+?", text):
        kind = {1: LETTER, 2: NUMBER, 3: NEWLINE}.get(match.lastindex, SPACE)
        classes[match.start() : match.end()] = kind
    return classes


@compiled
def char_size(first):
    """How many bytes a UTF-8 character has, from its first one."""
    if first < 0x80:
        return 1
    if first < 0xE0:
        return 2
    return 3 if first < 0xF0 else 4


@compiled
def class_at(text, classes, at):
    """The class of the character that starts at a place."""
    first = np.int64(text[at])
    if first < 0x80:
        return classes[first]
    second = np.int64(text[at + 1]) & 0x3F
    if first < 0xE0:
        return classes[(first & 0x1F) << 6 | second]
    third = np.int64(text[at + 2]) & 0x3F
    if first < 0xF0:
        return classes[(first & 0x0F) << 12 | second << 6 | third]
    return classes[(first & 0x07) << 18 | second << 12 | third << 6 | (np.int64(text[at + 3]) & 0x3F)]


@compiled
def skip_letters(text, eight, classes, at, end):
    """The end of a run of letters.

    Eight bytes at a time: the high bit of each byte of `other` says that the byte is no ASCII letter; the lowest such
    bit, moved down and less one, is a mask of the letters before it, and the mask's bytes are counted by multiplying.
    """
    while at < end:
        chunk = eight[at]
        folded = (chunk | _CASE) & _LOW7
        other = ~((folded + _FROM_A) & ~(folded + _PAST_Z) & ~chunk) & _HIGH
        if other == np.uint64(0):
            at += 8
            continue
        before = ((other & (~other + np.uint64(1))) >> np.uint64(7)) - np.uint64(1)
        at += np.int64(((before & _ONES) * _ONES) >> np.uint64(56))
        if at >= end or text[at] < 0x80:
            break
        while at < end and text[at] >= 0x80:
            if class_at(text, classes, at) != LETTER:
                return at
            at += char_size(text[at])
    return min(at, end)


@compiled
def skip_class(text, classes, at, end, kind):
    """The end of a run of characters of one class."""
    while at < end and class_at(text, classes, at) == kind:
        at += char_size(text[at])
    return at


@compiled
def contraction(text, at, end, any_case):
    """How many bytes of 's 't 'm 'd 'll 've 're start at a quote; 0 for none. The long s counts as an s of any case."""
    if at + 1 >= end:
        return 0
    one = text[at + 1]
    if any_case:
        if one == 0xC5 and at + 2 < end and text[at + 2] == 0xBF:
            return 3
        if one < 0x80:
            one |= 0x20
    if one == ord("s") or one == ord("t") or one == ord("m") or one == ord("d"):
        return 2
    if at + 2 >= end:
        return 0
    two = text[at + 2]
    if any_case and two < 0x80:
        two |= 0x20
    ll = one == ord("l") and two == ord("l")
    return 3 if ll or (two == ord("e") and (one == ord("v") or one == ord("r"))) else 0


@compiled
def space_end(text, classes, at, end, kind):
    r"""The end of a word of white space: `\s+(?!\S)|\s+`, and before it, in all patterns but GPT-2's, `\s*[\r\n]+`.

    A run that meets a visible character leaves its last character to the next word.
    """
    last = at
    after_newline = 0
    stop = at
    while stop < end:
        this = class_at(text, classes, stop)
        if this < SPACE:
            break
        last = stop
        stop += char_size(text[stop])
        if this == NEWLINE:
            after_newline = stop
    if kind != KIND_GPT2 and after_newline and not (kind == KIND_GPT4 and stop == end):
        return after_newline
    return stop if stop == end or last == at else last


@compiled
def gpt2_end(text, eight, classes, at, end):
    """The end of the word that starts at a place, for patterns.GPT2."""
    start = at
    first = text[at]
    if first == _BLANK and at + 1 < end:
        at += 1
    elif first == _QUOTE:
        size = contraction(text, at, end, False)
        if size:
            return at + size
    kind = class_at(text, classes, at)
    if kind == LETTER:
        return skip_letters(text, eight, classes, at, end)
    if kind >= SPACE:
        return space_end(text, classes, start, end, KIND_GPT2)
    return skip_class(text, classes, at, end, kind)


@compiled
def llama_end(text, eight, classes, at, end, kind):
    """The end of the word that starts at a place, for LLAMA3, QWEN2 and GPT4."""
    first = text[at]
    if first == _QUOTE:
        size = contraction(text, at, end, True)
        if size:
            return at + size
    this = class_at(text, classes, at)
    if this == LETTER:
        return skip_letters(text, eight, classes, at, end)
    after = at + char_size(first)
    if this == NUMBER:
        most = 1 if kind == KIND_QWEN2 else 3
        for _ in range(most - 1):
            if after < end and class_at(text, classes, after) == NUMBER:
                after += char_size(text[after])
        return after
    following = class_at(text, classes, after) if after < end else NEWLINE
    if following == LETTER and this != NEWLINE:
        return skip_letters(text, eight, classes, after, end)
    if this == OTHER or (first == _BLANK and following == OTHER):
        stop = skip_class(text, classes, after, end, OTHER)
        return skip_class(text, classes, stop, end, NEWLINE)
    return space_end(text, classes, at, end, kind)


@compiled
def word_end(kind, text, eight, classes, at, end):
    """The end of the word that starts at a place; with kind WHOLE the text is one word."""
    if kind == KIND_GPT2:
        return gpt2_end(text, eight, classes, at, end)
    if kind == WHOLE:
        return end
    return llama_end(text, eight, classes, at, end, kind)
