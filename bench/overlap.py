"""When gradients travel: the backward pass and the all-reduces of base/parallel/reference/ddp.py, from torch.profiler.

`python bench/overlap.py [--layers 8] [--width 768] [--out docs/ranks-overlap.png]`. Two gloo ranks on this machine train a stack of
linears; rank 0 is profiled for one step, with everything in one bucket and with a bucket a layer. Prints how much of the time
in all-reduces the backward pass was going on, and draws both steps. Needs the extra `plot`; quiet, each rank wants its own core.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from graft.base.parallel.reference.ddp import DDP

Span = tuple[float, float]  # ms
WARM_UP = 3  # steps


def step_spans(layers: int, width: int, bucket_mb: float) -> dict[str, list[Span]]:
    """The spans of one step's backward pass and of its all-reduces on this rank, in ms from the pass's start."""
    torch.manual_seed(0)
    model = DDP(nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))), bucket_mb=bucket_mb)
    x = torch.randn(256, width)

    def step() -> None:
        with torch.profiler.record_function("whole step"):
            loss = model(x).square().mean()
            with torch.profiler.record_function("backward pass"):
                loss.backward()
            model.finish_gradient_synchronization()
        model.zero_grad()

    for _ in range(WARM_UP):
        step()
    dist.barrier()
    with torch.profiler.profile() as profile:
        step()
    spans: dict[str, list[Span]] = {"backward pass": [], "gloo:all_reduce": [], "AddmmBackward0": []}
    for event in profile.events():
        if event.name in spans:
            spans[event.name].append((event.time_range.start / 1e3, event.time_range.end / 1e3))
    start = spans["backward pass"][0][0]
    return {name: [(a - start, b - start) for a, b in found] for name, found in spans.items()}


def hidden_share(spans: dict[str, list[Span]]) -> float:
    """The part of the time in all-reduces during which the backward pass was going on."""
    [(begin, end)] = spans["backward pass"]
    busy = merged(spans["gloo:all_reduce"])
    return sum(max(0.0, min(b, end) - max(a, begin)) for a, b in busy) / sum(b - a for a, b in busy)


def merged(spans: list[Span]) -> list[Span]:
    """The union of spans that may overlap, in order."""
    found: list[Span] = []
    for a, b in sorted(spans):
        if found and a <= found[-1][1]:
            found[-1] = found[-1][0], max(b, found[-1][1])
        else:
            found.append((a, b))
    return found


def work(rank: int, n: int, folder: str, layers: int, width: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    layer_mb = (width * width + width) * 4 / 2**20
    found = {
        "one bucket": step_spans(layers, width, layers * layer_mb + 1),
        "a bucket a layer": step_spans(layers, width, layer_mb),
    }
    if rank == 0:
        (Path(folder) / "spans.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def draw(found: dict[str, dict[str, list[Span]]], out: Path) -> None:
    """Two rows a step: the layers' backward passes, and the all-reduces."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(found), 1, sharex=True, figsize=(9, 3.6), constrained_layout=True)
    for axis, (name, spans) in zip(axes, found.items(), strict=True):
        rows: list[tuple[str, list[Span], Any]] = [
            ("all-reduce", spans["gloo:all_reduce"], "tab:orange"),
            ("backward", spans["AddmmBackward0"], "tab:blue"),
        ]
        for y, (_, parts, colour) in enumerate(rows):
            axis.broken_barh([(a, b - a) for a, b in sorted(parts)], (y - 0.35, 0.7), color=colour, edgecolor="white")
        axis.axvline(spans["backward pass"][0][1], color="0.4", linestyle=":")
        axis.set_yticks(range(len(rows)), [row[0] for row in rows])
        axis.set_title(
            f"{name}: {100 * hidden_share(spans):.0f}% of the all-reduce's time is within the backward pass",
            fontsize=10,
        )
    axes[-1].set_xlabel("ms since the backward pass began (dotted: its end)")
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--out", type=Path, default=Path("docs/ranks-overlap.png"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (2, folder, arguments.layers, arguments.width), 2)
        found = json.loads((Path(folder) / "spans.json").read_text())
    for name, spans in found.items():
        last = max(b for _, b in spans["gloo:all_reduce"])
        print(
            f"{name:18} backward pass {spans['backward pass'][0][1]:7.1f} ms, last all-reduce ends {last:7.1f} ms, "
            f"{100 * hidden_share(spans):3.0f}% of the all-reduces' time within the pass"
        )
    draw(found, arguments.out)


if __name__ == "__main__":
    main()
