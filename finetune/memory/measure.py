"""Memory after the fact: the same step on real tensors, read from the allocator."""

import gc
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ...base.device import resolve_device
from ...base.model.config import ModelConfig
from ..adapters.config import LoraConfig
from .predict import MemoryEstimate, estimate
from .settings import MemorySettings, read_model_config
from .step import Work, make_optimizer, place_, run_decoding, run_generation, run_training_step, shaped_model


@dataclass(frozen=True)
class MemoryMeasure:
    """A prediction beside what the device's allocator said."""

    predicted: MemoryEstimate
    measured_bytes: int  # the most tensor memory at a time during the step, everything alive before it included
    seconds: float  # of the step

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted.peak_bytes / self.measured_bytes - 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "predicted": self.predicted.to_dict(), "error": self.error}


def measure_memory(
    config_or_dir: ModelConfig | Path | str,  # sizes, a preset's name, a model folder or a config.json
    *,
    method: str = "full",
    batch_size: int = 1,
    seq_len: int = 512,
    dtype: str = "bfloat16",
    optimizer: str = "adamw",
    checkpointing: bool = True,
    micro_batch: int | None = None,
    rank: int = 16,
    targets: tuple[str, ...] = MemorySettings.targets,
    double_quant: bool = True,
    lora: LoraConfig | None = None,  # an adapter with more than a rank and targets, in place of both
    device: str = "auto",
) -> MemoryMeasure:
    """Predict, then run the very same step with random weights of the model's shapes and read the allocator's peak.

    CUDA: torch.cuda.max_memory_allocated after a reset. CPU: every allocation of PyTorch's CPU allocator, as its profiler
    records them, so what an operator takes within itself is measured too. Memory does not depend on the values of the weights,
    which is why a folder's own are not read. Raises ValueError for unknown names, torch.OutOfMemoryError if it does not fit.
    """
    settings = MemorySettings(
        method,
        batch_size,
        micro_batch,
        seq_len,
        dtype,
        optimizer,
        checkpointing,
        rank,
        tuple(targets),
        double_quant,
        lora,
    )
    return measure(read_model_config(config_or_dir), settings, device=device)


def measure(
    config: ModelConfig, settings: MemorySettings, *, device: str = "auto", work: Work | None = None
) -> MemoryMeasure:
    """`measure_memory` on a settings object. The prediction is made before anything is allocated."""
    device = resolve_device(device)
    predicted = estimate(config, settings, device=device, work=work)
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()  # an earlier step's would not be counted as this one's
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)  # another model of this process, not ours
        began = time.perf_counter()
        _whole_step(config, settings, device, work)
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        return MemoryMeasure(predicted, torch.cuda.max_memory_allocated(device) - before, seconds)
    began = time.perf_counter()
    with cpu_allocations() as peak:
        _whole_step(config, settings, device, work)
    return MemoryMeasure(predicted, peak[0], time.perf_counter() - began)


def _whole_step(config: ModelConfig, settings: MemorySettings, device: str, work: Work | None) -> None:
    """From nothing to one update. The model is placed tensor by tensor in its final form, which is never the peak."""
    model = shaped_model(config, settings, work)
    place_(model, device)
    if settings.method == "generate":
        run_generation(model, settings, device)
        return
    optimizer = make_optimizer(model, settings)
    if work is not None and (rows := work.rollout_rows(settings.batch_size)):
        run_decoding(model, settings, device, rows)
    run_training_step(model, optimizer, settings, device, work=work)


@contextmanager
def cpu_allocations() -> Iterator[list[int]]:
    """Yields a list that, after the block, holds the most bytes that PyTorch's CPU allocator had out at a time in it."""
    peak = [0]
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False)
    with _quiet_stderr():  # the profiler announces itself there
        profiler.__enter__()
    try:
        yield peak
    finally:
        with _quiet_stderr():
            profiler.__exit__(None, None, None)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak[0] = max(peak[0], total)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Messages that C++ writes to file descriptor 2 within the block are dropped, and Python's warnings."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch 2.11's profiler warns that it forgets its events, which it has not yet
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
