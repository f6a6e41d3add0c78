"""How the hot loops are compiled: Numba, on first use, kept on disk, said aloud once."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core import event
from numba.core.runtime import rtsys

_log = logging.getLogger(__name__)


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection meanwhile: it would go over Numba's 300 modules each time that many objects are made."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def compiled(function: Callable[..., Any]) -> Any:
    """numba.njit with the on-disk cache; without a writable cache folder the loops are compiled in each process."""
    try:
        loop: Any = numba.njit(cache=True)(function)
    except RuntimeError:  # numba found no folder that it may write
        _Announcer.how_often = "in each process, for want of a cache folder (NUMBA_CACHE_DIR can name one)"
        return numba.njit(function)
    # Numba asks only whether the function's own file changed, but each loop holds parts of the files beside it.
    loop._cache._cache_file._source_stamp = _stamp()
    loop._cache.load_overload = partial(_load, loop._cache)
    loop._compilation_chain_init_hook = lambda: None
    return loop


def _load(cache: Any, signature: Any, context: Any) -> Any:
    """Take a compiled loop from disk without what only compiling needs, in a quarter of the time.

    Numba first imports its whole library of functions, and every installed package that extends it. The loops here call
    Numba's memory manager and nothing else; when a loop has to be compiled, Numba makes up for the imports.
    """
    with collector_paused(), cache._guard_against_spurious_io_errors():
        rtsys.initialize(context)
        return cache._load_overload(signature, context)


@cache
def _stamp() -> str:
    """Changes when any file of this folder does."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return " ".join(f"{file.name} {file.stat().st_mtime_ns} {file.stat().st_size}" for file in files)


def inlined(function: Callable[..., Any]) -> Any:
    """A part of a compiled loop. A call would pass each array as seven numbers: without this a scan takes twice as long."""
    return numba.njit(forceinline=True)(function)


class _Announcer(event.Listener):
    """Says once that compilation has begun. Numba sends no event when it finds the code on disk."""

    said = False
    how_often = "once per machine"

    def on_start(self, event: event.Event) -> None:
        details: Any = event.data
        if not self.said and details["dispatcher"].py_func.__module__.startswith(__package__ or "?"):
            self.said = True
            _log.warning("graft: compiling the tokenizer's loops, %s, about ten seconds ...", self.how_often)

    def on_end(self, event: event.Event) -> None:
        pass


event.register("numba:compile", _Announcer())

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
