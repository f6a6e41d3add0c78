"""How the CPU loops are compiled: by Numba on first use, cached on disk, with one log line when compilation starts."""

import gc
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numba
from numba.core import event
from numba.core.runtime import rtsys

_log = logging.getLogger(__name__)
_PACKAGE = __name__.partition(".")[0] + "."


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses garbage collection: each time many objects are made it would traverse Numba's 300 modules."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def compiled(
    function: Callable[..., Any] | None = None,
    *,
    nogil: bool = False,
    fastmath: Collection[str] = (),  # LLVM's flags; "reassoc" is what lets a sum be vectorized
    error_model: Literal[
        "python", "numpy"
    ] = "python",  # numpy: x / 0 is infinity, without a check that stops vectorizing
) -> Any:
    """numba.njit with the on-disk cache; without a writable cache folder the loops are compiled in each process."""
    options: dict[str, Any] = {"nogil": nogil, "fastmath": set(fastmath), "error_model": error_model}
    if function is None:
        return partial(compiled, **options)
    try:
        loop: Any = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder that it may write
        _CompilationLogger.how_often = "in each process, for want of a cache folder (NUMBA_CACHE_DIR can name one)"
        return numba.njit(**options)(function)
    # Numba recompiles only when the function's own file changed, but a loop also contains inlined code from the files beside it.
    loop._cache._cache_file._source_stamp = _stamp(Path(function.__code__.co_filename).parent)
    loop._cache.load_overload = partial(_load, loop._cache)
    loop._compilation_chain_init_hook = lambda: None
    return loop


def _load(cache: Any, signature: Any, context: Any) -> Any:
    """Take a compiled loop from disk without what only compiling needs, in a quarter of the time.

    Numba first imports its whole library of functions, and every installed package that extends it. The loops here call
    Numba's memory manager and nothing else; when a loop has to be compiled, Numba does these imports then.
    """
    with collector_paused(), cache._guard_against_spurious_io_errors():
        rtsys.initialize(context)
        return cache._load_overload(signature, context)


@cache
def _stamp(folder: Path) -> str:
    """Changes when any file of the folder does, or one of those beside this one that all loops are made with."""
    files = [*sorted(Path(__file__).parent.glob("numba_*.py")), *sorted(folder.glob("*.py"))]
    return " ".join(f"{file.name} {file.stat().st_mtime_ns} {file.stat().st_size}" for file in files)


def inlined(function: Callable[..., Any]) -> Any:
    """A part of a compiled loop. A call would pass each array as seven numbers: without this a scan takes twice as long."""
    return numba.njit(forceinline=True)(function)


class _CompilationLogger(event.Listener):
    """Logs one line for each kind of loop when its compilation starts. Numba sends no event for a loop loaded from disk."""

    logged: ClassVar[set[str]] = set()
    how_often = "once per machine"
    names: ClassVar = {
        "compiled": "the tokenizer's loops",
        "nf4": "the 4-bit loops",
        "decode": "the decoding loops",
        **dict.fromkeys(("swiglu", "rms_norm", "rope", "cross_entropy", "kernels"), "the training loops"),
    }

    def on_start(self, event: event.Event) -> None:
        details: Any = event.data
        package, _, module = details["dispatcher"].py_func.__module__.rpartition(".")
        folder = package.rpartition(".")[2]
        name: str = self.names.get(folder) or folder
        if name not in self.logged and module and package.startswith(_PACKAGE):
            self.logged.add(name)
            _log.warning("graft: compiling %s, %s, about ten seconds ...", name, self.how_often)

    def on_end(self, event: event.Event) -> None:
        pass


event.register("numba:compile", _CompilationLogger())
