"""What every kernel's bench.py shares: interleaved timing, memory high-water marks, copy bandwidth, one table."""

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dispatch import Backend, triton_problem

Row = dict[str, Any]  # name, value, unit, bar, ok; ok is None where there is no bar or no GPU to hold it


def bench_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def our_backend() -> Backend:
    """Triton on a GPU and in the interpreter, else PyTorch's operators."""
    if torch.cuda.is_available():
        return "triton"
    return "torch" if triton_problem([torch.empty(0)]) else "triton"


def row(name: str, value: float, unit: str, bar: float | None = None, *, least: bool = False) -> Row:
    """One line of the table. `bar` is the most that `value` may be, or the least; it is judged on a GPU only."""
    judged = bar is not None and torch.cuda.is_available()
    shown = "" if bar is None else f"{'>=' if least else '<='} {bar:g}"
    ok = (value >= bar if least else value <= bar) if judged and bar is not None else None
    return {"name": name, "value": value, "unit": unit, "bar": shown, "ok": ok}


def interleaved_ms(runs: dict[str, Callable[[], Any]], *, repeats: int = 30) -> dict[str, tuple[float, float, float]]:
    """(median, p10, p90) in ms of each run, taken in turns so that a drifting clock hits all alike.

    On a GPU every run starts with a cold L2 cache and is timed by events; on a CPU by the wall clock.
    """
    cuda = torch.cuda.is_available()
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda") if cuda else None  # 256 MB
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-2, repeats):  # two rounds to compile and warm up
        for name, run in runs.items():
            if flush is not None:
                flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                torch.cuda.synchronize()
                took = start.elapsed_time(end)
            else:
                began = time.perf_counter()
                run()
                took = (time.perf_counter() - began) * 1e3
            if repeat >= 0:
                times[name].append(took)
    return {name: spread(values) for name, values in times.items()}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The run as a CUDA graph's replay, without launch overhead; the run itself on a CPU."""
    if not torch.cuda.is_available():
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_bytes(run: Callable[[], Any]) -> int:
    """How far memory rises above its level before the run: the allocator's count on a GPU, resident memory on Linux."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; memory without a GPU is measured on Linux only")


@lru_cache
def copy_bandwidth(quick: bool) -> float:
    """Bytes a second, read plus written, of a device-to-device copy."""
    source = torch.randn((16 << 20) if quick else (512 << 20), device=bench_device())
    target = torch.empty_like(source)
    ms = interleaved_ms({"copy": lambda: target.copy_(source)}, repeats=10)["copy"][0]
    return 2 * source.numel() * source.element_size() / ms * 1e3


def bandwidth_rows(
    name: str, runs: dict[str, Callable[[], Any]], n_bytes: int, *, quick: bool, bar: float
) -> list[Row]:
    """`ours` against the copy bandwidth, and each run's time. n_bytes is the least that must move."""
    times = interleaved_ms(runs, repeats=3 if quick else 30)
    rate = n_bytes / times["ours"][0] * 1e3
    rows = [row(f"{name}: GB/s over copy's", rate / copy_bandwidth(quick), "", bar, least=True)]
    return rows + time_rows(name, times, n_bytes)


def time_rows(name: str, times: dict[str, tuple[float, float, float]], n_bytes: int | None = None) -> list[Row]:
    """Median, p10-p90 and GB/s of each run, for information."""
    rows = []
    for run, (median, low, high) in times.items():
        rate = "" if n_bytes is None else f", {n_bytes / median / 1e6:.0f} GB/s"
        rows.append(row(f"{name}: {run} ({low:.3f}-{high:.3f}{rate})", median, "ms"))
    return rows


def forward_backward(run: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Callable[[], Any]:
    """A closure that runs forward and backward; `grads` are the outputs' gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def both() -> Any:
        outputs = run(*leaves)
        return torch.autograd.grad(outputs, leaves, list(grads) if isinstance(outputs, tuple) else grads[0])

    return both


def header() -> str:
    """The device, the versions and the commit that a table belongs to."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return f"{device} | torch {torch.__version__}, triton {version} | commit {commit.stdout.strip() or 'unknown'}"


def print_table(rows: Sequence[Row]) -> None:
    print(header())
    for r in rows:
        verdict = {True: "ok", False: "MISSED", None: ""}[r["ok"]]
        print(f"{r['name']:<72} {r['value']:>10.4g} {r['unit']:<5} {r['bar']:<9} {verdict}")
