"""What the screen shows of many jobs in training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def many_progress(
    jobs: Sequence[tuple[str, int]],  # name and steps
    *,
    shown: bool,
) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """One line a job on standard error: step, loss, validation loss. Yields the observer of each line of metrics."""
    if not shown:
        yield lambda name, line: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        tasks = {name: progress.add_task(escape(name), total=steps, figures="") for name, steps in jobs}
        val: dict[str, str] = {}

        def observe(name: str, line: dict[str, Any]) -> None:
            if "val_loss" in line:
                val[name] = f" val {line['val_loss']:.3f}"
            figures = f"loss {line['loss']:.3f}{val.get(name, '')}"
            progress.update(tasks[name], completed=line["step"], figures=figures)

        yield observe
