"""Pictures of a run, drawn from its metrics.jsonl. Uses matplotlib's file backend only: no window is opened."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .extras import needs
from .json_fields import field
from .runlog import METRICS_FILE, read_metrics

LARGEST = 1e30  # that an axis shows: matplotlib's ticks overflow above


def new_figure(**options: Any) -> Any:
    """A matplotlib Figure that can be saved. Raises ValueError where matplotlib is not installed."""
    with needs("plot", "a picture"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def number_of(line: Mapping[str, Any], key: str, where: Path) -> float:
    """A line's number; NaN for null, a missing key and what no axis can show. Raises ValueError for another kind."""
    value = field(line, key, float, where, default=math.nan)
    return float(value) if abs(value) < LARGEST else math.nan


def running_mean(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean with the start's bias removed, as Adam does it (arXiv:1412.6980, section 3).

    NaN (a loss that overflowed) is left out: the mean stays as it was.
    """
    smooth, n, means = 0.0, 0, []
    for value in values:
        if not math.isnan(value):
            n += 1
            smooth = weight * smooth + (1 - weight) * value
        means.append(smooth / (1 - weight**n) if n else math.nan)
    return means


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """A run's lines. Raises FileNotFoundError without a log, ValueError for an empty one."""
    if not (folder / METRICS_FILE).exists():
        raise FileNotFoundError(f"{folder} holds no {METRICS_FILE}; give the folder of a training run")
    metrics = read_metrics(folder / METRICS_FILE)
    if not metrics:
        raise ValueError(f"{folder / METRICS_FILE} is empty; the run has made no step yet")
    return metrics


def plot_run(folder: Path | str, *, lines: Mapping[str, float] | None = None, title: str | None = None) -> Path:
    """Draw FOLDER/loss.png: training loss, its running mean, validation loss, learning rate and gradient norm.

    lines: horizontal references in nats by name, such as a bigram model's loss. Raises FileNotFoundError without metrics.
    """
    folder = Path(folder)
    metrics = metrics_of(folder)
    where = folder / METRICS_FILE
    steps, losses, rates, grad_norms = (
        [number_of(line, key, where) for line in metrics] for key in ("step", "loss", "lr", "grad_norm")
    )
    figure = new_figure(figsize=(8, 6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training")
    upper.plot(steps, running_mean(losses), color="#08519c", label="training, running mean")
    evals = [
        (number_of(line, "step", where), number_of(line, "val_loss", where)) for line in metrics if "val_loss" in line
    ]
    if evals:
        upper.plot(*zip(*evals, strict=True), color="#d94801", marker="o", markersize=3, label="validation")
    for name, value in (lines or {}).items():
        upper.axhline(value, color="#636363", linestyle="--", linewidth=1, label=f"{name} {value:.2f}")
    upper.set_ylabel("loss (nats a token)")
    upper.legend(frameon=False)
    upper.set_title(title or folder.name)
    lower.plot(steps, rates, color="#31a354", label="learning rate")
    lower.set_ylabel("learning rate", color="#31a354")
    norms = lower.twinx()
    norms.plot(steps, grad_norms, color="#756bb1", linewidth=0.8)
    norms.set_ylabel("gradient norm", color="#756bb1")
    lower.set_xlabel("step")
    target = folder / "loss.png"
    figure.savefig(target)
    return target
