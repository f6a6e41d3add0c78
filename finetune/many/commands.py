"""`graft sft` with --jobs or --sweep: flags that go together, what is printed at the end."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .jobs import read_jobs
from .run import fit_jobs, run_many
from .sweep import parse_grid, run_sweep, say_value, trial_jobs


def many_from_flags(
    *,
    jobs: Path | None,
    sweep: Sequence[str],
    halving: bool,
    at_once: int | None,
    fit: bool,
    base: Path | None,
    data: list[str],
    out: Path | None,
    eval_data: list[str],
    method: str | None,
    settings: Mapping[str, Any],
    resume: bool,
    force: bool,
    device: str,
) -> None:
    """Train, and print a table; or, with `fit`, print what it will need. Raises ValueError for flags that don't go together."""
    if jobs is not None and sweep:
        raise ValueError("--jobs and --sweep exclude each other: list the jobs, or give the grid")
    if fit and at_once is not None:
        raise ValueError(f"--fit finds out how many fit at once; leave --at-once {at_once} out")
    how: dict[str, Any] = {"resume": resume, "force": force, "device": device}
    how |= {"fit": True} if fit else {"at_once": at_once}
    if jobs is not None:
        for flag, value in (("--data", data), ("--out", out)):
            if value:
                shown = value if isinstance(value, Path) else value[0]
                raise ValueError(f"{flag} {shown} belongs to one run; with --jobs each job of the file names its own")
        if halving:
            raise ValueError("--halving chooses among the trials of a sweep; add --sweep, or leave it out")
        _run_jobs(jobs, base, eval_data, method, settings, how)
        return
    for flag, value in (("--base", base), ("--data", data), ("--out", out)):
        if not value:
            raise ValueError(f"{flag} is missing; a sweep needs --base, --data, --eval-data and --out")
    if not eval_data:
        raise ValueError("a sweep chooses by validation loss; give held-out records with --eval-data")
    assert base is not None
    assert out is not None
    grid = parse_grid(sweep)
    given: dict[str, Any] = {"data": data, "eval_data": eval_data, "out": out, "settings": settings}
    _run_sweep(base, method or "lora", grid, given, halving, how)


def _run_jobs(
    file: Path,
    base: Path | None,
    eval_data: list[str],
    method: str | None,
    settings: Mapping[str, Any],
    how: dict[str, Any],  # resume, force, device, and at_once or fit
) -> None:
    asked = [dict(settings) | ({"eval_data": eval_data} if eval_data else {}) | job for job in read_jobs(file)]
    named = base or asked[0].get("base")
    if named is None:
        raise ValueError(f"--base is missing, and {file} names no base")
    base = Path(str(named))
    method = method or str(asked[0].get("method", "lora"))
    if how.pop("fit", False):
        _print_plan(base, asked, method, how)
        return
    summaries = run_many(base=base, jobs=asked, method=method, **how)
    columns = ("out", "steps", "train_loss", "val_loss", "state")
    lines = [summary | {"state": summary.get("error", "finished")} for summary in summaries]
    print_table([{key: line.get(key) for key in columns} for line in lines])
    if failed := [summary for summary in summaries if "error" in summary]:
        raise ValueError(
            f"{len(failed)} of {len(summaries)} jobs failed; the first: {failed[0]['out']}: {failed[0]['error']}"
        )


def _run_sweep(
    base: Path, method: str, grid: dict[str, list[Any]], given: dict[str, Any], halving: bool, how: dict[str, Any]
) -> None:
    if how.pop("fit", False):
        _print_plan(base, trial_jobs(grid, **given)[0], method, how)
        return
    report = run_sweep(base=base, grid=grid, method=method, halving=halving, **given, **how)
    print_table(
        sorted(report["trials"], key=lambda line: (line["state"] != "finished", line["val_loss"] or float("inf")))
    )
    print(f"the best is {report['best']}; its adapter is {given['out']}", file=sys.stderr)


def _print_plan(base: Path | str, jobs: Sequence[Mapping[str, Any]], method: str, how: dict[str, Any]) -> None:
    for line in fit_jobs(base=base, jobs=jobs, method=method, **how).lines():
        print(line)


def print_table(lines: Sequence[Mapping[str, Any]]) -> None:
    """One row for each line, the first line's keys as columns."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in lines[0]:
        table.add_column(column, overflow="fold")
    for line in lines:
        cells = [f"{v:.4f}" if k.endswith("loss") and isinstance(v, float) else say_value(v) for k, v in line.items()]
        table.add_row(*map(escape, cells))
    Console().print(table)
