"""Cuts text by any regular expressions, one after the other, without a Python object for each pretoken.

The four named patterns don't come here: compiled/scan.py cuts by them much faster. The tests hold this to reference.py.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import regex


def cut(text: str, data: bytes, patterns: Sequence[regex.Pattern[str]]) -> np.ndarray:
    """Where the pretokens of a text end, as byte offsets in `data`, its UTF-8: int64, in order, the last is len(data).

    The first pattern cuts the text, each later one cuts the pieces that the one before left; what lies between two matches is a
    piece too. A piece is a text of its own: neither lookahead nor lookbehind sees beyond it.
    """
    ends = np.array([len(text)] if text else [], np.int64)  # in code points
    for pattern in patterns:
        bounds = np.fromiter(_bounds(text, ends, pattern), np.int64)
        ends = bounds[np.diff(bounds, prepend=0) > 0]
    if len(data) == len(text):  # all ASCII
        return ends
    starts = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)  # the byte offset of each code point
    return np.append(starts, len(data))[ends]


def _bounds(text: str, ends: np.ndarray, pattern: regex.Pattern[str]) -> Iterator[int]:
    """Start and end of each match, and the end of each piece: in order, some of them several times."""
    start = 0
    for end in ends.tolist():
        if end - start > 1:  # one character can't be cut
            for match in pattern.finditer(text[start:end]):
                first, last = match.span()
                yield start + first
                yield start + last
        yield end
        start = end
