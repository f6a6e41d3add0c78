"""Several runs in one picture, from their metrics.jsonl: loss, learning rate, gradient norm, throughput, spikes."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plots import metrics_of, new_figure, number_of, running_mean

SPIKE_WINDOW = 50  # steps before one that say what is usual
SPIKE_DEVIATIONS = 5.0


def spikes(losses: Sequence[float]) -> list[bool]:
    """Which losses stand out: above the median of the 50 before by more than 5 standard deviations, told by the mean distance
    from it (sqrt(pi / 2) of it for a normal distribution), or no number. The first ten never do."""
    found = []
    for i, loss in enumerate(losses):
        before = [value for value in losses[max(0, i - SPIKE_WINDOW) : i] if not math.isnan(value)]
        if math.isnan(loss):
            found.append(True)
        elif len(before) < 10:
            found.append(False)
        else:
            middle = statistics.median(before)
            deviation = (math.pi / 2) ** 0.5 * statistics.fmean(abs(value - middle) for value in before)
            found.append(loss > middle + SPIKE_DEVIATIONS * deviation)
    return found


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' last parts, as many as tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-n:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("a run is given twice; give each once")


def plot_runs(folders: Sequence[Path | str], target: Path | str) -> Path:
    """Draw the runs over each other into `target`; returns it.

    Raises FileNotFoundError for a folder without metrics, ValueError for an empty log or a run that is given twice.
    """
    paths = [Path(folder) for folder in folders]
    names = names_of(paths)
    logs = [metrics_of(folder) for folder in paths]
    figure = new_figure(figsize=(10, 9), dpi=120, layout="constrained")
    axes = figure.subplot_mosaic([["loss", "loss"], ["rate", "norm"], ["speed", "spikes"]], height_ratios=(2, 1, 1))
    labels = {
        **{"loss": "loss (nats a token)", "rate": "learning rate", "norm": "gradient norm"},
        **{"speed": "tokens a second", "spikes": "spikes so far"},
    }
    for name, label in labels.items():
        axes[name].set_ylabel(label)
    for i, (name, folder, log) in enumerate(zip(names, paths, logs, strict=True)):
        _draw(axes, log, folder, label=name, color=f"C{i % 10}")
    axes["norm"].set_yscale("log")
    axes["loss"].legend(frameon=False)
    for name in ("speed", "spikes"):
        axes[name].set_xlabel("step")
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _draw(axes: Mapping[str, Any], log: Sequence[Mapping[str, Any]], folder: Path, *, label: str, color: str) -> None:
    columns = {key: [number_of(line, key, folder) for line in log] for key in ("step", "loss", "lr", "grad_norm")}
    steps = columns["step"]
    axes["loss"].plot(steps, columns["loss"], color=color, linewidth=0.5, alpha=0.3)
    axes["loss"].plot(steps, running_mean(columns["loss"]), color=color, label=label)
    held_out = [
        (number_of(line, "step", folder), number_of(line, "val_loss", folder)) for line in log if "val_loss" in line
    ]
    if held_out:
        axes["loss"].plot(*zip(*held_out, strict=True), color=color, marker="o", markersize=3, linestyle="--")
    axes["rate"].plot(steps, columns["lr"], color=color)
    axes["norm"].plot(steps, columns["grad_norm"], color=color, linewidth=0.7)
    axes["speed"].plot(steps, running_mean([number_of(line, "tokens_per_s", folder) for line in log]), color=color)
    counts, so_far = [], 0
    for line, spike in zip(log, spikes(columns["loss"]), strict=True):
        so_far += spike or bool(line.get("skipped"))
        counts.append(so_far)
    axes["spikes"].step(steps, counts, color=color, where="post")
