"""What many adapters trained at once will need: the bytes of their real step on tensors without memory, and its seconds."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...base.model.config import ModelConfig
from ...base.model.transformer import Transformer
from ...base.precision import autocast
from ...base.training.checkpoints import checkpoints_in
from ...kernels.dispatch import predicting
from ..adapters.lora import LoraConfig, attach_lora
from ..adapters.selection import registry_of
from ..adapters.stacked import AdapterStack, StackRow
from ..memory.fit import largest
from ..memory.predict import Counted, add_workspace, device_kind, free_bytes, new_counter, over_layers, with_groups
from ..memory.settings import MemorySettings
from ..memory.step import place_, shaped_model, watched
from ..memory.units import say_bytes
from ..sft_model import stored_in_4_bits
from .batch import together, weighted_loss, worth_packing
from .jobs import Job

PROBES = 3  # steps that are timed; the fastest counts


@dataclass(frozen=True)
class Load:
    """What one job brings to a step."""

    lora: LoraConfig
    rows: int  # of a micro-batch
    length: int  # positions of a row


@dataclass(frozen=True)
class Shared:
    """What all jobs have in common, as far as memory and time depend on it."""

    method: str  # lora or qlora
    dtype: str = "float32"
    checkpointing: bool = False
    double_quant: bool = True

    def settings(self) -> MemorySettings:
        return MemorySettings(
            self.method, dtype=self.dtype, checkpointing=self.checkpointing, double_quant=self.double_quant
        )


@dataclass(frozen=True)
class Plan:
    """What a run of many jobs will need, as far as can be said before it."""

    n_jobs: int
    at_once: int
    device: str
    peak_bytes: int
    seconds: float  # of all steps and evaluations; checkpoints and loading not included
    step_s: float  # of one step of the jobs that train at once
    budget: int  # bytes: what is free, or what was given
    n_fit: int | None = None  # jobs that fit at a time; None: not asked for

    def lines(self) -> list[str]:
        """For the screen."""
        found = [
            f"predicted peak memory of tensors: {say_bytes(self.peak_bytes)} on {self.device}, {self.at_once} jobs at once",
            f"predicted time: about {say_seconds(self.seconds)}, {self.step_s:.3g} s a step of {self.at_once} jobs",
        ]
        if self.n_fit is not None:
            how = "all of them" if self.n_fit >= self.n_jobs else f"--at-once {self.n_fit}" if self.n_fit else "none"
            found.append(f"{self.n_fit} of {self.n_jobs} jobs fit into {say_bytes(self.budget)} at a time: {how}")
        if self.peak_bytes > self.budget:
            found.append(
                f"warning: predicted peak {self.peak_bytes / 2**30:.2f} GiB is more than the {self.budget / 2**30:.2f} GiB free "
                f"on {self.device}; train fewer at once (--at-once, --fit says how many), lower micro_batch or max_seq_len, or "
                "set checkpointing=true"
            )
        return found

    def figures(self) -> dict[str, Any]:
        """For each job's summary."""
        return {"predicted_peak_bytes": self.peak_bytes, "predicted_seconds": round(self.seconds, 2)}


def say_seconds(seconds: float) -> str:
    """8.2 s, 3 min 20 s or 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds % 60:.0f} s"


def plan_jobs(
    config: ModelConfig,
    jobs: Sequence[Job],
    *,
    method: str,
    at_once: int | None,
    device: str,
    fit: bool = False,  # also look for how many fit
    budget: int | None = None,  # bytes; None: what is free on the device
) -> Plan:
    """Predict the memory and time of jobs that are ready to train."""
    first = jobs[0].config
    stored = stored_in_4_bits(first)
    double_quant = stored["double_quant"] if stored else first.quant.double_quant
    shared = Shared("qlora" if stored else method, first.train.dtype, first.train.checkpointing, double_quant)
    n_at_once = len(jobs) if at_once is None else min(at_once, len(jobs))
    budget = free_bytes(device) if budget is None else budget
    worst = sorted((_load(job, job.longest) for job in jobs), key=lambda load: -load.rows * load.length)

    @cache
    def peak(n: int) -> int:
        return predict_bytes(config, worst[:n], shared, device=device, joins_later=n < len(jobs))

    n_fit = largest(peak, budget, most=len(jobs)) if fit else None
    if n_fit is not None and at_once is None:
        n_at_once = max(n_fit, 1)
    usual = [_load(job, max(1, round(job.mean_length))) for job in jobs[:n_at_once]]
    micro_s = step_seconds(config, usual, shared, device=device)
    token_s = micro_s / sum(load.rows * load.length for load in usual)
    seconds = sum(_job_tokens(job) for job in jobs) * token_s
    step_s = token_s * sum(job.config.train.batch_size * job.mean_length for job in jobs[:n_at_once])
    return Plan(len(jobs), n_at_once, device, peak(n_at_once), seconds, step_s, budget, n_fit)


def _load(job: Job, length: int) -> Load:
    loop = job.config.train
    assert job.config.lora is not None
    return Load(job.config.lora, min(loop.micro_batch, loop.batch_size), length)


def _job_tokens(job: Job) -> float:
    """Positions that the job still trains on; evaluations count a third, as they have no backward pass."""
    loop = job.config.train
    done = checkpoints_in(job.run.checkpoints)[-1:]
    n_steps = max(0, loop.steps - (int(done[0].name.removeprefix("step-")) if done else 0))
    n_val = sum(batch["ids"].numel() for batch in job.val)
    n_evals = (n_steps // loop.eval_every if loop.eval_every else 0) + 1
    return n_steps * loop.batch_size * job.mean_length + n_evals * n_val / 3


# --- bytes ---------------------------------------------------------------------------------------------------------


def predict_bytes(
    config: ModelConfig,
    loads: Sequence[Load],  # of the jobs that train at once
    shared: Shared,
    *,
    device: str = "auto",
    joins_later: bool = False,  # whether another job takes the place of one that ends
    whole: bool = False,  # run all layers however many there are
) -> int:
    """Peak bytes of a step of these jobs, each with its longest rows: the real step on tensors without memory, as
    memory/predict.py counts it."""
    kind = device_kind(device)
    by_path = any("." in target for load in loads for target in load.lora.targets)  # such targets make layers differ
    run = over_layers(config, lambda fewer: _count(fewer, loads, shared, kind, joins_later), whole=whole or by_path)
    return max(peak.n_bytes for peak in run.peaks.values())


def _count(config: ModelConfig, loads: Sequence[Load], shared: Shared, kind: str, joins_later: bool) -> Counted:
    counter = new_counter(kind)
    names = [str(i) for i in range(len(loads))]
    parts = [micro_batch_of(load) for load in loads]
    batch, counts = together(parts, packed=worth_packing(parts, kind))
    with predicting("cuda" if kind == "cuda" else "cpu"):
        model = shaped_model(config, shared.settings(), bare=True)
        model.checkpointing = shared.checkpointing
        counter.add([*model.parameters(), *model.buffers()], "weights")
        if kind == "cuda":
            workspace = add_workspace(counter, backward=True)  # noqa: F841 (it lives to the end)
        with counter:
            counter.enter("joining", "", "adapters")
            stack, rows = attach_all(model, loads, names)
            if joins_later:
                stack.set_jobs(names, stack.generators)
            for buffer, of_kind in (
                ("gradients", "gradients"),
                ("exp_avgs", "optimizer"),
                ("exp_avg_sqs", "optimizer"),
            ):
                counter.add([stack.buffers[buffer]], of_kind)
            sizes = Counter({name: counter.kinds[name] for name in ("weights", "adapters", "gradients", "optimizer")})
            with watched(model, counter), stack.training(counts):
                counter.enter("forward", "embedding", "activations")
                with autocast(shared.dtype, "cpu"):
                    total, losses = weighted_loss(model, batch, torch.ones(sum(counts)))
                counter.enter("backward", "loss", "temporaries")
                total.backward()
            del total, losses
            counter.enter("update", "", "temporaries")
            update_all(stack, rows)
    kept = [counter.kept[i] for i in range(config.n_layers)]
    return Counted(config.n_layers, sizes, kept, counter.peaks)


def micro_batch_of(load: Load) -> dict[str, Tensor]:
    """A micro-batch of one job in which every position carries loss."""
    return {name: torch.zeros(load.rows, load.length, dtype=torch.int64) for name in ("ids", "targets")}


def attach_all(model: Transformer, loads: Sequence[Load], names: Sequence[str]) -> tuple[AdapterStack, list[StackRow]]:
    """The jobs' adapters on the model, as Trainer puts them there."""
    for name, load in zip(names, loads, strict=True):
        attach_lora(model, load.lora, name=name)
    model.requires_grad_(False).train()
    registry_of(model).default = None
    stack = AdapterStack(model, names, [torch.Generator() for _ in names])
    rows = [StackRow(stack, name, "default", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0) for name in names]
    return stack, rows


def update_all(stack: AdapterStack, rows: Sequence[StackRow]) -> None:
    stack.clip_([1.0] * len(rows))
    with stack.updating():
        for row in rows:
            row.step(1e-4)
            row.zero_grad()


# --- seconds -------------------------------------------------------------------------------------------------------


def step_seconds(config: ModelConfig, loads: Sequence[Load], shared: Shared, *, device: str) -> float:
    """Wall seconds of one step of these jobs on this machine: steps of 1 and 2 layers with random weights are timed, and
    what the second layer adds is added for the rest."""
    fewer = [with_groups(config, 0, 1, config.n_layers, keep=min(n, config.n_layers)) for n in (1, 2)]
    one, two = (_timed(few, loads, shared, device) for few in fewer)
    return one + (config.n_layers - 1) * max(two - one, 0.0)


def _timed(config: ModelConfig, loads: Sequence[Load], shared: Shared, device: str) -> float:
    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[torch.device(device)] if on_gpu else []):
        model = shaped_model(config, shared.settings(), bare=True)
        place_(model, device)
    model.checkpointing = shared.checkpointing
    loads = [replace(load, lora=replace(load.lora, targets=_short(load.lora.targets))) for load in loads]
    stack, rows = attach_all(model, loads, [str(i) for i in range(len(loads))])
    parts = [micro_batch_of(load) for load in loads]
    taken = []
    for _ in range(1 + PROBES):  # the first warms up
        began = time.perf_counter()
        batch, counts = together(parts, packed=worth_packing(parts, device))
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        with stack.training(counts):
            with autocast(shared.dtype, device):
                total, _ = weighted_loss(model, moved, torch.full((sum(counts),), 1e-3, device=device))
            total.backward()
        update_all(stack, rows)
        if on_gpu:
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def _short(targets: Sequence[str]) -> tuple[str, ...]:
    """Whole paths as the last parts of paths, which a model of fewer layers has too."""
    return tuple(dict.fromkeys(target.rpartition(".")[2] for target in targets))
