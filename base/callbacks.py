"""What may watch a run: callbacks from Python, and the loggers of loggers.py. None of them can change its numbers.

A callback is an object with any of Callback's methods, or a function that sees each line of metrics.jsonl:

    class Best:
        def on_evaluation(self, line):
            print(line["step"], line["val_loss"])

    graft.sft(base="runs/base", data="train.jsonl", out="runs/a", callbacks=[Best(), lambda line: None])
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint import random_state, set_random_state


class Callback:
    """Every method that a run calls; each does nothing here. An exception in one ends the run, as any other does."""

    def on_start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """Before the first step of this process. `step`: how many are done already, in a resumed run; their lines don't
        come again, but those after the checkpoint, which a killed process had reported, do."""

    def on_step(self, line: Mapping[str, Any]) -> None:
        """After each update: a line of metrics.jsonl, with `step` counted from 1."""

    def on_evaluation(self, line: Mapping[str, Any]) -> None:
        """After each evaluation: `step` and its figures, `val_loss` among them. on_step has seen them too."""

    def on_checkpoint(self, folder: Path, step: int) -> None:
        """After a checkpoint was written; of an adapter run it opens in PEFT. The newest and those of `keep` stay."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """After the results were written, with what summary.json holds. Not after an interruption or an error."""

    def on_close(self) -> None:
        """At the very end, whatever happened: close files and connections."""


Watcher = object  # a Callback, an object with some of its methods, or a function of a line


class Callbacks:
    """Several watchers called in turn. The random state is put back after each call, so that a run with them is bit for bit
    one without. Raises TypeError for what has none of the methods and is no function."""

    def __init__(self, watchers: Sequence[Watcher] = ()) -> None:
        names = [name for name in vars(Callback) if name.startswith("on_")]
        for watcher in watchers:
            if not callable(watcher) and not any(hasattr(watcher, name) for name in names):
                raise TypeError(f"callback {watcher!r:.60} has none of {', '.join(names)}, and is no function")
        self._watchers = list(watchers)

    def __len__(self) -> int:
        return len(self._watchers)

    def call(self, event: str, *arguments: object) -> None:
        """Call the method `event` of those that have it; a plain function gets on_step's lines.

        An exception ends the calls, but on_close reaches all, and the first exception is raised after the last.
        """
        errors: list[Exception] = []
        for watcher in self._watchers:
            method: Callable[..., object] | None = getattr(watcher, event, None)
            if method is None and event == "on_step" and callable(watcher):
                method = watcher
            if method is not None:
                try:
                    with _undisturbed():
                        method(*arguments)
                except Exception as error:
                    if event != "on_close":
                        raise
                    errors.append(error)
        if errors:
            raise errors[0]


@contextmanager
def _undisturbed() -> Iterator[None]:
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
