"""Memory for the compiled loops: padded text that can be read eight bytes at a time, and aligned tables."""

import numpy as np

PADDING = 16  # bytes after a text, so that eight bytes can be read at its last place


def padded(data: bytes) -> np.ndarray:
    """A text as bytes, which may be read eight at a time up to its end: one load replaces eight."""
    return np.frombuffer(data + bytes(PADDING), np.uint8)


def aligned_zeros(n: int) -> np.ndarray:
    """n uint64 zeros that start on a 64-byte cache line."""
    raw = np.zeros(n + 8, np.uint64)
    skip = (-raw.ctypes.data % 64) // 8
    return raw[skip : skip + n]
