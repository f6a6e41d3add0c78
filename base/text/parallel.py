"""Work on blocks of text in processes of our own: `python -m graft.base.text.parallel` reads tasks from its standard
input and writes results to its standard output.

Not multiprocessing: its fork is unsafe once PyTorch has threads, its spawn runs the user's script again. A handler is an
object with `take(block) -> result`, called for each block, and `finish() -> result`, called once.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, Protocol

SMALL = 48 << 20  # bytes below which starting processes costs more than it saves


class Handler(Protocol):
    def take(self, block: Any) -> Any: ...

    def finish(self) -> Any: ...


def default_workers(n_bytes: int) -> int:
    """One process for little text, else one for each core that this process may use, up to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if n_bytes < SMALL else min(cores, 16)


def run_blocks(make: Callable[[], Handler], blocks: Iterable[Any], workers: int) -> Iterator[tuple[str, Any]]:
    """Yield ("block", result) for each block, in order, then ("finish", result) for each handler.

    `make` builds a handler (a functools.partial of something importable). At most two blocks a worker are held at a
    time. With one worker all happens in this process.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} is less than 1; give at least 1, or None to choose by size")
    if workers == 1:
        handler = make()
        for block in blocks:
            yield "block", handler.take(block)
        yield "finish", handler.finish()
        return
    processes = [_Process(make) for _ in range(workers)]
    try:
        idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in processes:
            idle.put(process)

        def work(block: Any) -> Any:
            process = idle.get()
            try:
                return process.ask("take", block)
            finally:
                idle.put(process)

        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[Any]] = deque()
            for block in blocks:
                waiting.append(pool.submit(work, block))
                if len(waiting) >= 2 * workers:
                    yield "block", waiting.popleft().result()
            while waiting:
                yield "block", waiting.popleft().result()
        for process in processes:
            yield "finish", process.ask("finish")
    finally:
        for process in processes:
            process.close()


class _Process:
    """One worker, seen from the parent."""

    def __init__(self, make: Callable[[], Handler]):
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        _send(self._to, make)

    def ask(self, what: str, *arguments: Any) -> Any:
        try:
            _send(self._to, (what, arguments))
            outcome, value = _receive(self._from)
        except (EOFError, OSError, pickle.UnpicklingError):
            code = self._process.wait()
            raise OSError(f"a worker process ended (exit code {code}); out of memory? Try with --workers 1") from None
        if outcome == "error":
            raise value
        return value

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._to.close()
        self._from.close()


def _send(stream: IO[bytes], value: Any) -> None:
    pickle.dump(value, stream, protocol=5)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    return pickle.load(stream)


def main() -> None:
    """The worker's loop: until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed by accident must not mix with the results
    handler = None
    while True:
        try:
            message = _receive(source)
        except EOFError:
            return
        if handler is None:
            handler = message()
            continue
        what, arguments = message
        try:
            reply = ("value", getattr(handler, what)(*arguments))
        except Exception as error:
            reply = ("error", error)
        _send(target, reply)


if __name__ == "__main__":
    main()
