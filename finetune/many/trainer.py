"""The common step of many adapters: one forward and one backward pass carry the rows of all jobs, and base/train.py's update,
log, evaluation and checkpoints then act on each job apart. What a job leaves in its folder is a solo run's, so that a solo run
can go on from it.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.checkpoint import random_state, set_random_state, write_json
from ...base.device import peak_bytes
from ...base.evaluate import mean_loss
from ...base.hub import name_of
from ...base.loss import n_labels
from ...base.model.huggingface import fingerprint
from ...base.model.transformer import Transformer
from ...base.precision import LossScaler, autocast
from ...base.runlog import SUMMARY_FILE
from ...base.training.draws import seed_at
from ...base.training.history import History
from ...base.training.result import is_out_of_patience
from ...base.training.signals import Interrupted, Stop, stop_on_signal
from ...base.training.step import NotFiniteError, update
from ..adapters.files import save_adapter
from ..adapters.lora import DEFAULT, attach_lora, remove_adapter
from ..adapters.selection import registry_of, use_adapters
from ..adapters.stacked import AdapterStack, StackRow
from ..loading import weight_bytes
from ..sft_data import made_with
from .batch import together, weighted_loss, worth_packing
from .commit import Clock, drop_unfinished
from .jobs import Job
from .progress import many_progress

Observer = Callable[[str, dict[str, Any]], None]
# Asked before each step: which jobs leave because others do better, and why.
Prune = Callable[[Sequence[Job], Callable[[Job], float]], list[tuple[Job, str]]]


class LeftOut(Exception):
    """A job that ends before its last step because others did better."""


class Trainer:
    """The jobs in training on one model: who takes part, and the step that they take together."""

    def __init__(
        self,
        model: Transformer,
        jobs: Sequence[Job],
        *,
        device: str,
        progress: bool = False,
        prune: Prune | None = None,
        figures: Mapping[str, Any] | None = None,  # of the whole run, for each job's summary
    ) -> None:
        self.model, self.device = model, device
        self.waiting, self.active = list(jobs), list[Job]()
        self.stack: AdapterStack | None = None
        self.made_for = fingerprint(model)
        self.base_bytes = weight_bytes(model)
        self.progress, self.prune, self.n_jobs = progress, prune, len(jobs)
        self.figures = dict(figures or {}) | {"n_jobs": len(jobs)}
        self.clock = Clock(drop_unfinished(jobs))

    def run(self, at_once: int) -> None:
        """Train all jobs to their ends, at most `at_once` at a time. Raises Interrupted after a signal."""
        bars = [(job.name, job.config.train.steps) for job in self.waiting]
        with many_progress(bars, shown=self.progress) as observe, stop_on_signal() as stop:
            while self.waiting or self.active:
                self._join(at_once)
                self._leave_worse()
                if not self.active:
                    continue
                self.step(stop, observe)
                if stop.signal and self.active:
                    for job in self.active:
                        job.run.close_metrics()
                    n_left = len(self.active) + len(self.waiting)
                    raise Interrupted(
                        f"stopped with {n_left} of {self.n_jobs} jobs unfinished; to go on, run the same command with --resume",
                        stop.exit_code,
                    )

    # --- who takes part ---

    def _join(self, at_once: int) -> None:
        """Let waiting jobs in while there is room."""
        while self.waiting and len(self.active) < at_once:
            joined = []
            while self.waiting and len(self.active) + len(joined) < at_once:
                job = self.waiting.pop(0)
                try:
                    attach_lora(self.model, job.config.lora, seed=job.config.train.seed, name=job.name)
                except ValueError as error:
                    self._fail(job, error)
                    continue
                joined.append(job)
            self._set_active([*self.active, *joined])
            for job in joined:
                self._begin(job)
            for job in [job for job in joined if job in self.active]:
                assert job.history is not None
                evals, loop = job.history.result.evals, job.config.train
                if job.step >= loop.steps or is_out_of_patience(evals, loop.patience, loop.best_by):
                    self._finish(job)

    def _begin(self, job: Job) -> None:
        """Start or resume a job's run: its folder, optimizer and random state."""
        assert self.stack is not None
        loop = job.config.train
        job.row = StackRow(
            self.stack, job.name, DEFAULT, betas=(loop.beta1, loop.beta2), eps=loop.eps, weight_decay=loop.weight_decay
        )
        job.scaler = LossScaler(loop.dtype)
        job.began = time.perf_counter()
        try:
            job.run.start(job.config.saved(), seed=loop.seed)
            with own_random_state(job):
                job.history = History(
                    job.row,
                    loop,
                    job.run,
                    job.scaler,
                    evaluate=(lambda: {"val_loss": self.val_loss(job)}) if job.val else None,
                    extra=self.clock,
                    export=lambda folder: self._save(job, folder),
                )
        except (ValueError, OSError) as error:
            self._fail(job, error)

    def _set_active(self, jobs: list[Job]) -> None:
        self.active = jobs
        self.clock.names = [job.name for job in jobs]
        if not jobs:
            self.stack = None
            return
        names, generators = [job.name for job in jobs], [job.generator for job in jobs]
        if self.stack is None:
            self.stack = AdapterStack(self.model, names, generators)
            for job in jobs:
                if job.row is not None:
                    job.row.stack = self.stack
        else:
            self.stack.set_jobs(names, generators)
        registry_of(self.model).default = None

    def _leave(self, job: Job) -> None:
        """Take a job's adapter out of the model and the stack."""
        if job in self.active:
            remaining = [other for other in self.active if other is not job]
            remove_adapter(self.model, job.name)
            self._set_active(remaining)

    def _fail(self, job: Job, error: Exception) -> None:
        """A job that can't go on leaves; its folder says why."""
        job.summary["error"] = str(error)
        job.run.__exit__(type(error), error, None)
        print(f"job {job.name} left: {error}", file=sys.stderr)
        self._leave(job)

    def _leave_worse(self) -> None:
        """Let those go that `prune` names, after a checkpoint of all."""
        if self.prune is None or not self.active:
            return
        leaving = self.prune(self.active, self.val_loss)
        if leaving:
            self._save_all(self.active)
        for job, reason in leaving:
            if job not in self.active:
                continue
            job.summary |= {"stopped": reason, "steps": job.step}
            write_json(job.run.folder / SUMMARY_FILE, {key: v for key, v in job.summary.items() if key != "out"})
            job.run.__exit__(LeftOut, LeftOut(reason), None)
            self._leave(job)

    def _finish(self, job: Job) -> None:
        """Write what a solo run leaves, and let the job go."""
        assert job.history is not None
        try:
            job.run.close_metrics()
            job.history.take_result()
            result = job.history.result
            result.seconds = time.perf_counter() - job.began
            with job.run.results() as folder:
                self._save(job, folder)
            assert job.row is not None
            trained = [tensor for _, tensor in job.row.named]
            job.summary |= {
                "method": job.config.method,
                **result.summary(),
                **job.report.figures(),
                "n_trained_params": sum(tensor.numel() for tensor in trained),
                "weight_bytes": self.base_bytes + sum(tensor.numel() * tensor.element_size() for tensor in trained),
                **self.figures,
                **peak_bytes(self.device),
                "device": self.device,
            }
            job.run.finish({key: value for key, value in job.summary.items() if key != "out"})
        except (ValueError, OSError) as error:
            self._fail(job, error)
            return
        self._leave(job)

    def _save(self, job: Job, folder: Path) -> None:
        """Write a job's adapter as a solo run does, with its weights as they are now."""
        assert job.config.lora is not None
        base = job.config.inputs["base"].path
        save_adapter(
            self.model,
            folder,
            job.config.lora,
            base=name_of(base) or str(base.resolve()),
            name=job.name,
            graft=made_with(job.records, self.made_for, job.config.method, job.template),
            chat_template=job.template.source if job.template is not None else None,
        )

    # --- a step ---

    def step(self, stop: Stop, observe: Observer | None = None) -> None:
        """One update of every active job; those that fail or end leave."""
        began = time.perf_counter()
        batches: dict[str, list[dict[str, Tensor]]] = {}
        totals: dict[str, int] = {}
        for job in list(self.active):
            batches[job.name] = job.batches.batch_at(job.step)
            totals[job.name] = sum(n_labels(batch) for batch in batches[job.name])
            if totals[job.name] == 0:
                error = f"step {job.step + 1}: no token of the batch carries loss; check the data's completions"
                self._fail(job, ValueError(error))
        jobs = list(self.active)
        if not jobs:
            return
        self.clock.step += 1
        losses, norms = self._gradients(jobs, batches, totals)
        lines, failed = self._updates(jobs, losses, norms)
        self.clock.names = list(lines)
        seconds = time.perf_counter() - began
        ended: list[Job] = []
        for job in [job for job in jobs if job.name in lines]:
            read = sum(batch["ids"].numel() for batch in batches[job.name])
            more = {"n_labels": totals[job.name], "n_tokens": read}
            more |= {"tokens_per_s": round(read / seconds, 1), "step_s": round(seconds, 5)}
            try:
                if self._record(job, lines[job.name] | more, stop, observe):
                    ended.append(job)
            except (ValueError, OSError) as error:
                failed[job.name] = error
        if any(job.history is not None and job.history.saved == job.step for job in jobs if job.name not in failed):
            failed |= self._save_all([job for job in jobs if job.name not in failed])
        for job in jobs:  # only now: leaving changes the stack, and drops the gradients of those after it
            if job.name in failed:
                self._fail(job, failed[job.name])
            elif job in ended:
                self._finish(job)

    def _updates(
        self, jobs: Sequence[Job], losses: Sequence[float], norms: Sequence[float]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Exception]]:
        """The optimizers' steps, one fused call for each learning rate; the first figures of each job's line, or its error."""
        assert self.stack is not None
        lines: dict[str, dict[str, Any]] = {}
        failed: dict[str, Exception] = {}
        with self.stack.updating():
            for job, loss, norm in zip(jobs, losses, norms, strict=True):
                assert job.history is not None
                assert job.row is not None
                assert job.scaler is not None
                try:
                    lines[job.name] = update(job.row, job.config.train, job.scaler, job.step, loss=loss, norm=norm)
                except NotFiniteError as error:
                    failed[job.name] = ValueError(f"{error}; {job.history.way_back()}")
        return lines, failed

    def _record(self, job: Job, line: dict[str, Any], stop: Stop, observe: Observer | None) -> bool:
        """Evaluate, log and save as the job's config says; returns whether this was its last step."""
        assert job.history is not None
        figures = job.history.evaluate() if job.history.is_due(job.step) else None
        on_step = (lambda shown: observe(job.name, shown)) if observe else None
        with own_random_state(job):
            return job.history.record(line, figures, stop=stop, on_step=on_step, clear=False)

    def _save_all(self, jobs: Sequence[Job]) -> dict[str, Exception]:
        """A checkpoint of every job at this step of the run, then the older ones go: so that all are resumed from one step."""
        failed: dict[str, Exception] = {}
        for job in jobs:
            assert job.history is not None
            try:
                with own_random_state(job):
                    job.history.save()
            except (ValueError, OSError) as error:
                failed[job.name] = error
        for job in jobs:
            if job.name not in failed:
                assert job.history is not None
                job.history.clear()
        return failed

    def _gradients(
        self, jobs: Sequence[Job], batches: Mapping[str, Sequence[Mapping[str, Tensor]]], totals: Mapping[str, int]
    ) -> tuple[list[float], list[float]]:
        """Each job's loss in nats a label and its gradient's norm before clipping; the stack then holds clipped gradients."""
        assert self.stack is not None
        loop = jobs[0].config.train
        summed = torch.zeros(len(jobs), device=self.device)
        scales = [job.scaler.scale if job.scaler else 1.0 for job in jobs]
        self.model.train()
        for i in range(max(len(batches[job.name]) for job in jobs)):
            for job in jobs:  # dropout's numbers are those that a run of this job alone draws
                job.generator.manual_seed(seed_at(job.config.train.seed, job.step, i))
            parts = [batches[job.name][i] if i < len(batches[job.name]) else None for job in jobs]
            batch, counts = together(parts, packed=worth_packing(parts, self.device))
            moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            factors = [scale / totals[job.name] for job, scale in zip(jobs, scales, strict=True)]
            job_of = torch.repeat_interleave(torch.arange(len(jobs)), torch.tensor(counts)).to(self.device)
            weights = torch.tensor(factors, device=self.device)[job_of]  # (N,)
            with self.stack.training(counts):
                with autocast(loop.dtype, self.device):
                    total, losses = weighted_loss(self.model, moved, weights)
                total.backward()
            summed.index_add_(0, job_of, losses.to(summed.dtype))
        if any(scale != 1.0 for scale in scales):
            self.stack.buffers["gradients"] /= torch.tensor(scales, device=self.device)[:, None]
        norms = self.stack.clip_([job.config.train.grad_clip or math.inf for job in jobs])
        counts_of = torch.tensor([totals[job.name] for job in jobs], device=self.device)
        return (summed / counts_of).tolist(), norms

    def val_loss(self, job: Job) -> float:
        """A job's validation loss now, nats a label."""
        self.model.eval()
        with use_adapters(self.model, job.name):
            return mean_loss(self.model, job.val, dtype=job.config.train.dtype, device=self.device)


@contextmanager
def own_random_state(job: Job) -> Iterator[None]:
    """Within the block torch's global random state is the job's, and what becomes of it is kept for the job.

    Checkpoints save and restore the global state: so a job's checkpoint holds its own, as a solo run's does.
    """
    device = job.generator.device
    kept = random_state()
    key = "cpu" if device.type == "cpu" else f"cuda.{device.index or 0}"
    set_random_state(kept | {key: job.generator.get_state()})
    try:
        yield
    finally:
        job.generator.set_state(random_state()[key])
        set_random_state(kept)
