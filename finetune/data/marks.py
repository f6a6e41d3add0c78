"""Invisible marks in text: Unicode noncharacters that say which part carries loss and which is literal.

    LEARN_ON ... LEARN_OFF        what the assistant says, its end-of-turn token included: carries loss
    LITERAL_ON ... LITERAL_OFF    a special token's spelling that came from the data: encoded as plain text
    OWNER digits                  a character beside it belongs to a message: number and side in `digits` (masks.py)

Marks that the data itself holds are hidden first (`hide`), and shown again where text is encoded (`show`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ...base.tokenizer.tokenizer import Tokenizer

LEARN_ON, LEARN_OFF, LITERAL_ON, LITERAL_OFF, ESCAPE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
OWNER = "\ufdd5"
_DIGITS = "".join(chr(0xFDE0 + value) for value in range(16))
_N_DIGITS = 5
_MARKS = "\ufdd0-\ufdef"
_OWNER = re.compile(f"{OWNER}([{_DIGITS[0]}-{_DIGITS[-1]}]{{{_N_DIGITS}}})")


def hide(text: str) -> str:
    """Spell the marks that the data itself holds as ESCAPE and two hexadecimal digits; `show` takes it back."""
    return re.sub(f"[{_MARKS}]", lambda match: f"{ESCAPE}{ord(match.group()) - 0xFDD0:02x}", text)


def show(text: str) -> str:
    """The text with hidden marks as they were."""
    return re.sub(f"{ESCAPE}([01][0-9a-f])", lambda match: chr(0xFDD0 + int(match.group(1), 16)), text)


def guard(text: str, specials: tuple[str, ...]) -> str:
    """`hide`, and mark every special token that the text spells as literal."""
    return special_pattern(specials).sub(rf"{LITERAL_ON}\g<0>{LITERAL_OFF}", hide(text))


@lru_cache(maxsize=16)
def special_pattern(specials: tuple[str, ...]) -> re.Pattern[str]:
    """Matches any of the spellings, the longest first."""
    longest_first = sorted(specials, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


def own(text: str, index: int, *, tags: bool) -> str:
    """Put owner marks for message `index` into each word: after its first character, and before its last.

    Inside a word and not around it, so that a template's strip, split and comparisons at word borders work as without.
    A word that holds < or [ gets the first mark alone, or none with tags=False: templates look for such words.
    """
    first, last = (OWNER + _digits(2 * index + kind) for kind in (0, 1))

    def mark(match: re.Match[str]) -> str:
        word = match.group()
        if re.search(r"[<>\[\]]", word):
            return f"{word[0]}{first}{word[1:]}" if tags else word
        return f"{word[0]}{first}" if len(word) == 1 else f"{word[0]}{first}{word[1:-1]}{last}{word[-1]}"

    return re.sub(r"\S+", mark, text)


def _digits(value: int) -> str:
    return "".join(_DIGITS[value >> shift & 15] for shift in range(4 * (_N_DIGITS - 1), -1, -4))


def read_owners(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without owner marks, and for each mark (where its character ends in that text, message index)."""
    found, removed = [], 0
    for match in _OWNER.finditer(text):
        value = 0
        for digit in match.group(1):
            value = value * 16 + ord(digit) - ord(_DIGITS[0])
        found.append((match.start() - removed + value % 2, value // 2))
        removed += match.end() - match.start()
    return _OWNER.sub("", text), found


def without_learn(text: str) -> str:
    """The text without the marks of what is learned."""
    return re.sub(f"[{LEARN_ON}{LEARN_OFF}]", "", text)


def template_specials(text: str, specials: tuple[str, ...], start: int = 0) -> Iterator[re.Match[str]]:
    """The special tokens that the template itself wrote, from `start` on: literal spellings are passed over.

    group("special") is the token with the marks around it left out.
    """
    pattern = special_pattern(specials).pattern
    for match in re.compile(f"{LITERAL_ON}.*?{LITERAL_OFF}|(?P<special>{pattern})", re.DOTALL).finditer(text, start):
        if match.group("special"):
            yield match


def encode_marked(marked: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32, loss mask bool) of marked text, encoded piece by piece between the marks."""
    specials = special_pattern(tuple(tokenizer.special_tokens)).pattern
    pattern = re.compile(f"{LITERAL_ON}({specials}){LITERAL_OFF}|([{LEARN_ON}-{LITERAL_OFF}])")
    ids, mask, learn, done = [], [], False, 0

    def add(piece: np.ndarray) -> None:
        ids.append(piece)
        mask.append(np.full(len(piece), learn))

    for match in pattern.finditer(marked):
        add(tokenizer.encode(show(marked[done : match.start()]), allowed_special="all"))
        literal, mark = match.groups()
        if literal:
            add(tokenizer.encode(literal))
        learn = mark == LEARN_ON if mark in (LEARN_ON, LEARN_OFF) else learn
        done = match.end()
    add(tokenizer.encode(show(marked[done:]), allowed_special="all"))
    return np.concatenate(ids).astype(np.int32), np.concatenate(mask)


def map_strings(value: object, change: Callable[[str], str]) -> Any:
    """`change` applied to every string in nested lists and dicts, keys left alone."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value
