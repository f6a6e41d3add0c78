"""Memory for the compiled loops: padded text that can be read eight bytes at a time, aligned tables, and the checks.

The loops read by address and check nothing. So whatever enters one passes a check here first, once for a whole array.
"""

import ctypes

import numpy as np

PADDING = 16  # bytes after a text, so that eight bytes can be read at its last place


def padded(data: bytes) -> np.ndarray:
    """A text as bytes, which may be read eight at a time up to its end: one load replaces eight."""
    return np.frombuffer(data + bytes(PADDING), np.uint8)


def utf8_address(text: str) -> tuple[int, int, object]:
    """A str's UTF-8 bytes as (address, how many, what keeps them alive), readable for 15 bytes beyond their end.

    CPython keeps the UTF-8 of a str inside it (of ASCII it is the str itself), so nothing is copied. The bytes end in a zero
    that CPython owns; memory is protected by pages of 4,096 bytes or a multiple, so what lies on the same page as that zero
    can be read. Where the page ends sooner, the text is copied. Raises UnicodeEncodeError for a lone surrogate.
    """
    n = ctypes.c_ssize_t()
    start = _as_utf8(text, ctypes.byref(n))
    if (start + n.value) % _PAGE <= _PAGE - PADDING:
        return start, n.value, text
    copied = padded(ctypes.string_at(start, n.value))
    return copied.ctypes.data, n.value, copied


_PAGE = 4096
_as_utf8 = ctypes.pythonapi.PyUnicode_AsUTF8AndSize
_as_utf8.restype = ctypes.c_void_p
_as_utf8.argtypes = [ctypes.py_object, ctypes.c_void_p]


def check_bounds(starts: np.ndarray, ends: np.ndarray, n_bytes: int) -> None:
    """Stretches of a text of n_bytes: int64, contiguous, in order, inside the text. Raises ValueError for others."""
    for name, bounds in (("starts", starts), ("ends", ends)):
        check_array(bounds, np.int64, name)
    if len(starts) != len(ends):
        raise ValueError(f"{len(starts)} starts and {len(ends)} ends; expected as many of each")
    if len(ends) and not (
        starts[0] >= 0 and ends[-1] <= n_bytes and (starts <= ends).all() and (ends[:-1] <= starts[1:]).all()
    ):
        raise ValueError(f"the stretches must lie in order inside the text of {n_bytes:,} bytes")


def check_array(array: np.ndarray, dtype: type, name: str) -> None:
    """One dimension, contiguous, of the dtype. Raises ValueError for another array."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
        got = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} is {got}; expected a contiguous array of {np.dtype(dtype)} with one dimension")


def aligned_zeros(n: int) -> np.ndarray:
    """n uint64 zeros that start on a 64-byte cache line."""
    raw = np.zeros(n + 8, np.uint64)
    skip = (-raw.ctypes.data % 64) // 8
    return raw[skip : skip + n]
