"""Memory for the compiled loops: padded text that can be read eight bytes at a time, and aligned tables."""

import numpy as np

PADDING = 16  # bytes after a text, so that eight bytes can be read at its last place


def padded(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A text as bytes, and the same memory as `eight`: eight[p] is the bytes p to p+7 as one little-endian number.

    `eight` is a uint64 array whose stride is one byte; one load replaces eight, and comparing or hashing a word takes
    one or two of them.
    """
    text = np.frombuffer(data + bytes(PADDING), np.uint8)
    return text, eight_view(text)


def eight_view(text: np.ndarray) -> np.ndarray:
    """The overlapping 8-byte numbers of a padded array."""
    return np.ndarray((len(text) - 8,), np.uint64, text, 0, (1,))


def aligned_zeros(n: int) -> np.ndarray:
    """n uint64 zeros that start on a 64-byte cache line."""
    raw = np.zeros(n + 8, np.uint64)
    skip = (-raw.ctypes.data % 64) // 8
    return raw[skip : skip + n]
