"""Ctrl-C and SIGTERM let a run finish its step and write a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(Exception):
    """Training stopped by a signal after writing a checkpoint; `exit_code` is 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Stop:
    """Which signal has asked the loop to stop, if any."""

    signal: int | None = None

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or 0)


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Within the block SIGINT and SIGTERM set a flag instead of killing; a second one acts at once.

    Outside the main thread, where Python allows no handlers, the flag never rises.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
