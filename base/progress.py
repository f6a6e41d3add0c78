"""One progress bar for every stage, on standard error: steps, loss, tokens/s, time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def step_progress(label: str, total: int, *, shown: bool = True) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields the observer that `train` calls with each line of metrics. `shown=False`: it does nothing."""
    if not shown:
        yield lambda line: None
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        task = progress.add_task(label, total=total, figures="")
        smooth: dict[str, float] = {}
        val = ""

        def observe(line: dict[str, Any]) -> None:
            nonlocal val
            for key in [key for key in ("loss", "tokens_per_s", "mfu") if key in line]:
                smooth[key] = line[key] if key not in smooth else 0.9 * smooth[key] + 0.1 * line[key]
            if "val_loss" in line:
                val = f" val {line['val_loss']:.3f}"
            figures = f"loss {smooth['loss']:.3f}{val}  {smooth['tokens_per_s']:,.0f} tokens/s{_slow(line)}"
            figures += f"  MFU {smooth['mfu']:.0%}" if "mfu" in smooth else ""
            progress.update(task, completed=line["step"], figures=figures)

        yield observe


def _slow(line: dict[str, Any]) -> str:
    """Which rank keeps the others waiting, if one does (base/parallel/stragglers.py)."""
    if "slow_rank" not in line:
        return ""
    return f"  rank {line['slow_rank']} takes {line['slow_rank_s'] / line['median_rank_s']:.1f}x the others' time"


@contextmanager
def counting(label: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yields observe(done, total), which draws a bar. `shown=False`: it does nothing."""
    if not shown:
        yield lambda done, total: None
        return
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
