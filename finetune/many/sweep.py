"""`graft sft --sweep`: a grid of settings trained as jobs of one run, compared by validation loss, the best one exported."""

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.checkpoint import write_json
from ...base.runlog import CHECKPOINTS, METRICS_FILE, read_metrics
from ...base.settings import check_settings, parse_assignments
from ..folders import replaced_folder
from ..sft_config import PARTS
from ..sft_data import Specs
from .jobs import SHARED_KEYS, Job
from .run import run_many

TRIALS, SWEEP_FILE, PICTURE = "trials", "sweep.json", "sweep.png"
LEAVE_OUT = (CHECKPOINTS, METRICS_FILE, "run.json", "summary.json", "replaced")  # of the best trial, which stays itself


def parse_grid(assignments: Sequence[str]) -> dict[str, list[Any]]:
    """['learning_rate=1e-4,3e-4', 'rank=4,16'] -> key -> its values.

    Raises ValueError for unknown keys, wrong values, a key given twice, equal values and a key of the base.
    """
    grid: dict[str, list[Any]] = {}
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        words = [word.strip() for word in text.split(",") if word.strip()]
        if not equals or not key or not words:
            raise ValueError(
                f"--sweep {assignment!r} is not key=value,value; write for example learning_rate=1e-4,3e-4"
            )
        if key in grid:
            raise ValueError(f"--sweep {key} is given twice; write its values behind one")
        if key in SHARED_KEYS:
            raise ValueError(
                f"--sweep {key}: the adapters of a sweep train on one base, which has one {key}; run one sweep for each"
            )
        values = [check_settings(parse_assignments([f"{key}={word}"]), *PARTS.values())[key] for word in words]
        if repeated := [value for i, value in enumerate(values) if value in values[:i]]:
            raise ValueError(f"--sweep {key} has {repeated[0]} twice; give each value once")
        grid[key] = values
    if not grid:
        raise ValueError("a sweep needs at least one key=value,value")
    return grid


def trials_of(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the grid's values, the last key changing fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


class Halving:
    """Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): at each rung the better half goes on.

    Of 16 trials 8 are left after an eighth of the steps, 4 after a quarter, 2 after a half: 5 / 16 of all steps.
    """

    def __init__(self, n_trials: int) -> None:
        n_rungs = max(0, (n_trials - 1).bit_length() - 1)
        self.rungs = [
            (0.5 ** (n_rungs - i), -(-n_trials // 2 ** (i + 1))) for i in range(n_rungs)
        ]  # share, how many stay

    def __call__(self, active: Sequence[Job], val_loss: Callable[[Job], float]) -> list[tuple[Job, str]]:
        """Those that leave now, and why."""
        reached = [n for share, n in self.rungs if all(job.step >= share * job.config.train.steps for job in active)]
        n_kept = min(reached, default=len(active))
        if len(active) <= n_kept:
            return []
        found = sorted((loss if (loss := val_loss(job)) == loss else float("inf"), i) for i, job in enumerate(active))
        for loss, i in found:
            active[i].summary["val_loss"] = loss
        return [
            (active[i], f"left after step {active[i].step}: validation loss {loss:.4f} was not among the best {n_kept}")
            for loss, i in found[n_kept:]
        ]


def run_sweep(
    *,
    base: Path | str,
    data: Specs,
    out: Path | str,
    grid: Mapping[str, Sequence[Any]],  # key -> values, as `graft config sft` lists keys
    eval_data: Specs,
    method: str = "lora",
    settings: Mapping[str, Any] | None = None,  # of all trials
    halving: bool = False,
    at_once: int | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Train every combination at once; `out` gets the best one's adapter, sweep.json, a picture, and trials/ with all runs.

    Returns what sweep.json holds. Raises ValueError or OSError as `sft_many` does.
    """
    out = Path(out)
    jobs, names = trial_jobs(grid, data=data, eval_data=eval_data, out=out, settings=settings)
    if halving and at_once is not None and at_once < len(jobs):
        raise ValueError(f"--halving compares all {len(jobs)} trials on the way; leave --at-once {at_once} out")
    summaries = run_many(
        base=base,
        jobs=jobs,
        method=method,
        at_once=at_once,
        resume=resume,
        force=force,
        device=device,
        progress=progress,
        prune=Halving(len(jobs)) if halving else None,
    )
    lines = [
        _line(name, trial, summary) for name, trial, summary in zip(names, trials_of(grid), summaries, strict=True)
    ]
    finished = [line for line in lines if line["state"] == "finished" and line["val_loss"] == line["val_loss"]]
    if not finished:
        raise ValueError("no trial of the sweep came to its end with a validation loss; see the trials' run.json")
    best = min(finished, key=lambda line: line["val_loss"])
    report = {"best": best["trial"], "method": method, "trials": lines}
    with replaced_folder(out) as folder:
        source = out / TRIALS / best["trial"]
        for path in source.iterdir():
            if path.name not in LEAVE_OUT and path.is_file():
                shutil.copy2(path, folder / path.name)
        write_json(folder / SWEEP_FILE, report)
        draw(out / TRIALS, names, best["trial"], folder / PICTURE)
    return report


def trial_jobs(
    grid: Mapping[str, Sequence[Any]],
    *,
    data: Specs,
    eval_data: Specs,
    out: Path,
    settings: Mapping[str, Any] | None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The grid's trials as jobs, and their names. Raises ValueError for a key that is set as well."""
    if both := grid.keys() & (settings or {}).keys():
        raise ValueError(f"{sorted(both)[0]} is set and swept; keep one of them")
    names = [",".join(f"{key}={say_value(value)}" for key, value in trial.items()) for trial in trials_of(grid)]
    shared = {**(settings or {}), "data": data, "eval_data": eval_data}
    return [
        {**shared, **trial, "out": out / TRIALS / name} for trial, name in zip(trials_of(grid), names, strict=True)
    ], names


def _line(name: str, trial: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's row of the table."""
    state = "failed" if "error" in summary else "stopped" if "stopped" in summary else "finished"
    val_loss = summary.get("best_val_loss", summary.get("val_loss"))
    return {"trial": name, **_plain(trial), "val_loss": val_loss, "steps": summary.get("steps"), "state": state}


def say_value(value: Any) -> str:
    """A value as it stands in a trial's name and in the table."""
    if isinstance(value, tuple | list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(trial: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in trial.items()}


def draw(trials: Path, names: Sequence[str], best: str, target: Path) -> None:
    """A picture of all trials' validation losses over their steps, the best one dark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in sorted(names, key=best.__eq__):
        metrics = trials / name / METRICS_FILE
        evals = [
            (line["step"], line["val_loss"])
            for line in (read_metrics(metrics) if metrics.exists() else [])
            if line.get("val_loss") is not None
        ]
        if evals:
            [line] = axes.plot(*zip(*evals, strict=True), marker="o", markersize=3, label=name, linewidth=1)
            if name == best:
                line.set(color="#08519c", linewidth=2.5)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats a label)")
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(target, format="png")
