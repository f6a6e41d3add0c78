"""The memory picture: what is alive at the peak, a bar for each method."""

from collections.abc import Mapping
from pathlib import Path

from ...base.plots import new_figure
from .predict import MemoryEstimate

# kind -> color, in the order of the stack
COLORS = {
    "weights": "#33597a",
    "adapters": "#4f9d9d",
    "gradients": "#d98b3a",
    "optimizer": "#b04a4a",
    "casts": "#8a8fbf",
    "activations": "#7aa657",
    "cache": "#9ac0d9",
    "loss": "#d9b93a",
    "temporaries": "#a9a39b",
    "workspace": "#d8d4cc",
}


def memory_picture(
    estimates: Mapping[str, MemoryEstimate],  # label -> prediction, in the order of the bars
    path: Path | str,
    *,
    measured: Mapping[str, int] | None = None,  # label -> bytes; drawn as a line across its bar
    title: str = "",
) -> Path:
    """Write stacked bars of the predicted peaks, and the measured ones where there are any, as a PNG; returns its path."""
    if not estimates:
        raise ValueError("no estimate to draw; give at least one")
    highest = max([e.peak_bytes for e in estimates.values()] + list((measured or {}).values()))
    unit, name = (2**30, "GiB") if highest >= 2**30 else (2**20, "MiB")
    figure = new_figure(figsize=(1.6 + 1.3 * len(estimates), 4.2), layout="constrained")
    axes = figure.add_subplot()
    bottom = [0.0] * len(estimates)
    known = {kind for estimate in estimates.values() for kind in estimate.at_peak}
    for kind in [*COLORS, *sorted(known - COLORS.keys())]:
        heights = [estimate.at_peak.get(kind, 0) / unit for estimate in estimates.values()]
        if not any(heights):
            continue
        axes.bar(list(estimates), heights, bottom=bottom, width=0.62, label=kind, color=COLORS.get(kind, "#555555"))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for i, (label, estimate) in enumerate(estimates.items()):
        text = f"{estimate.peak_bytes / unit:.1f}"
        if measured and label in measured:
            line = measured[label] / unit
            axes.hlines(line, i - 0.38, i + 0.38, color="black", linewidth=1.4, label="" if i else "measured")
            text += f"\nmeasured {line:.1f}"
        axes.annotate(text, (i, bottom[i]), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8)
    axes.set_ylabel(f"peak of one step, {name}")
    axes.set_ylim(0, 1.16 * highest / unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
