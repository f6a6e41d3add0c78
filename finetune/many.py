"""`graft sft --jobs`: many adapters trained at once on one base, each as its own `graft sft` run would have trained it.

One forward and one backward pass carry the rows of all jobs; base/train.py's update, log, evaluation and checkpoints then act on
each job apart. What a job leaves in its folder is a solo run's, so that a solo run can go on from it.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.checkpoint import random_state, set_random_state
from ..base.device import explain_device, peak_bytes, reset_peak, resolve_device
from ..base.evaluate import mean_loss
from ..base.loss import n_labels
from ..base.model.config import ModelConfig
from ..base.model.huggingface import empty_model, fingerprint, load_config
from ..base.model.transformer import IGNORE, Transformer
from ..base.precision import LossScaler, autocast
from ..base.run import Input, Run, check_same_inputs, resumed_settings
from ..base.runlog import RunFolder
from ..base.settings import check_settings, read_toml
from ..base.tokenizer.tokenizer import Tokenizer
from ..base.train import (
    History,
    Interrupted,
    NotFiniteError,
    Stop,
    check_evaluation,
    is_out_of_patience,
    stop_on_signal,
    update,
)
from ..kernels.cross_entropy import weighted_linear_cross_entropy
from .adapters.files import save_adapter
from .adapters.lora import DEFAULT, attach_lora, linears, matching, remove_adapter, width
from .adapters.selection import registry_of, use_adapters
from .adapters.stacked import AdapterStack, StackRow
from .data.chat import ChatTemplate, Encoded
from .data.dataset import DatasetReport, encode_dataset
from .data.packing import SFTBatches
from .data.records import Record, read_records
from .loading import weight_bytes
from .memory.jobs import predict_jobs
from .memory.predict import fits
from .memory.units import say_bytes
from .sft import PARTS, load_base, made_with, make_batches, resolve, row_limit, run_inputs, stored_in_4_bits

OWN_KEYS = ("data", "out", "eval_data", "base", "method")  # of a job, beside the keys of a config
# What the base or the pass over it has only one of.
SHARED_KEYS = ("base", "method", "dtype", "checkpointing", "double_quant", "quant_backend", "optimizer", "paged")


@dataclass
class Job:
    """One adapter in training."""

    out: Path
    name: str  # the adapter's in the model, and what messages call the job
    config: Run
    run: RunFolder
    records: list[Record]
    report: DatasetReport
    encoded: list[Encoded]
    batches: SFTBatches
    val: list[dict[str, Tensor]]
    template: ChatTemplate | None
    generator: torch.Generator
    summary: dict[str, Any] = field(default_factory=dict)
    # from the moment that it joins
    row: StackRow | None = None
    scaler: LossScaler | None = None
    history: History | None = None
    began: float = 0.0

    @property
    def step(self) -> int:
        """Updates done."""
        assert self.history is not None
        return self.history.result.steps

    @property
    def longest(self) -> int:
        """Positions of its longest row."""
        return max(len(record.ids) for record in self.encoded) - 1


# --- what is asked for ---------------------------------------------------------------------------------------------


def read_jobs(path: Path | str) -> list[dict[str, Any]]:
    """A jobs.toml: [defaults] and one [[jobs]] table each -> the jobs' keys. Paths are as on the command line.

    Raises OSError for what is no file, ValueError for what is not such TOML.
    """
    raw = read_toml(path)
    if unknown := sorted(raw.keys() - {"defaults", "jobs"}):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; a jobs file has [defaults] and [[jobs]] tables")
    defaults, jobs = raw.get("defaults", {}), raw.get("jobs", [])
    if not isinstance(defaults, dict):
        raise ValueError(f"{path}: defaults is {defaults!r}; expected a table [defaults]")
    if not isinstance(jobs, list) or not jobs or not all(isinstance(job, dict) for job in jobs):
        raise ValueError(f"{path} has no [[jobs]]; write one such table for each adapter, with data and out")
    return [defaults | job for job in jobs]


def sft_many(
    *,
    base: Path | str,
    jobs: Sequence[Mapping[str, Any]],  # data, out, perhaps eval_data, and keys as `graft config sft` lists them
    method: str = "lora",  # or qlora: one for all, as they share the base
    at_once: int | None = None,  # jobs in training at a time, a waiting one joins when another ends; None: all
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train K adapters at once on one base, each as its own `graft.sft` run would; returns their summaries in order.

    A job whose data can't be read, or whose loss is no longer finite, leaves: its summary has `error`, the others go on.
    Raises ValueError for what is wrong with the jobs as a whole, and when every job fails; OSError for a missing base;
    Interrupted after a signal, when each job has written a checkpoint.
    """
    return run_many(
        base=base,
        jobs=jobs,
        method=method,
        at_once=at_once,
        resume=resume,
        force=force,
        device=device,
        progress=progress,
    )


def check_jobs(base: Path | str, jobs: Sequence[Mapping[str, Any]], method: str) -> list[dict[str, Any]]:
    """The jobs' keys, checked as far as that needs no file. Raises ValueError that names the job."""
    if method not in ("lora", "qlora"):
        raise ValueError(f"method={method!r}: jobs share a frozen base; choose lora or qlora")
    if not jobs:
        raise ValueError("no job to train; give at least one with data and out")
    outs: dict[Path, int] = {}
    checked = []
    for number, job in enumerate(jobs, 1):
        where = f"job {number} ({job['out']})" if "out" in job else f"job {number}"
        for key in ("data", "out"):
            if not isinstance(job.get(key), str | Path):
                raise ValueError(f"{where} has no {key}; every job needs data and out")
        out = Path(job["out"]).resolve()
        if out in outs:
            raise ValueError(f"jobs {outs[out]} and {number} have one output, {job['out']}; give each its own")
        outs[out] = number
        if out == Path(base).resolve():
            raise ValueError(f"{where}: out is the base itself; choose another folder")
        if "base" in job and Path(job["base"]).resolve() != Path(base).resolve():
            raise ValueError(
                f"{where} is for base {job['base']}, the run's is {base}; jobs that train together share one base"
            )
        if job.get("method", method) != method:
            raise ValueError(
                f"{where} has method={job['method']!r}, the run's is {method!r}; jobs that train together share the base "
                "as it is held"
            )
        settings = {key: value for key, value in job.items() if key not in OWN_KEYS}
        try:
            settings = check_settings(settings, *PARTS.values())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        checked.append({key: job[key] for key in ("data", "out", "eval_data") if job.get(key)} | {"settings": settings})
    for job in checked[1:]:
        for key in SHARED_KEYS:
            first, other = (one["settings"].get(key) for one in (checked[0], job))
            if first != other:
                raise ValueError(
                    f"{key} differs between jobs {checked[0]['out']} ({first}) and {job['out']} ({other}), but jobs that "
                    "train together share it; run them apart"
                )
    return checked


def _check_config(config: Run) -> None:
    """Raise ValueError for what one adapter may do alone and not among others."""
    if config.train.optimizer != "adamw":
        raise ValueError(f"optimizer={config.train.optimizer} does not train many adapters at once; use adamw")
    if config.lora.beyond_lora is not None:
        raise ValueError(f"{config.lora.beyond_lora} is not covered for jobs that train together; run that job alone")
    if config.train.checkpointing and config.lora.dropout:
        raise ValueError(
            f"dropout={config.lora.dropout} with checkpointing=true is not covered for jobs that train together, whose "
            "dropout would be drawn anew; leave one of them out"
        )


# --- running -------------------------------------------------------------------------------------------------------


class LeftOut(Exception):
    """A job that ends before its last step because others did better."""


Prune = Callable[[Sequence[Job], Callable[[Job], float]], list[tuple[Job, str]]]


def run_many(
    *,
    base: Path | str,
    jobs: Sequence[Mapping[str, Any]],
    method: str = "lora",
    at_once: int | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: bool = True,
    prune: Prune | None = None,  # asked after each step: which jobs leave, and why; with it all train at once
) -> list[dict[str, Any]]:
    """`sft_many`, with what the command line and a sweep need besides."""
    requested_device, device = device, resolve_device(device)
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once={at_once} must be >= 1")
    if resume and force:
        raise ValueError("--resume and --force exclude each other: go on with the runs, or start them over")
    checked = check_jobs(base, jobs, method)
    model_config, tokenizer = load_config(base), Tokenizer.load(base)
    summaries: list[dict[str, Any]] = [{"out": str(job["out"])} for job in checked]
    with ExitStack() as stack:
        ready: list[Job] = []
        prepare = _Preparer(
            Path(base), model_config, tokenizer, method, resume=resume, force=force, stack=stack, device=device
        )
        for asked, summary in zip(checked, summaries, strict=True):
            job = prepare.job(asked, summary)
            if job is not None:
                ready.append(job)
        if not ready:
            raise ValueError(f"every job failed; the first: {summaries[0]['error']}")
        shared = ready[0].config
        if progress:
            print(explain_device(requested_device, device), file=sys.stderr)
        stored = stored_in_4_bits(shared)
        n_at_once = len(ready) if at_once is None else min(at_once, len(ready))
        predicted = predict_jobs(
            model_config,
            [(job.config.train, job.config.lora, job.longest) for job in ready],
            at_once=n_at_once,
            method="qlora" if stored else method,
            double_quant=stored["double_quant"] if stored else shared.quant.double_quant,
            device=device,
        )
        print(f"predicted peak memory of tensors: {say_bytes(predicted)} on {device}", file=sys.stderr)
        if warning := fits(device, predicted):
            print(f"warning: {warning}", file=sys.stderr)
        reset_peak(device)
        model = load_base(shared, device)
        model.requires_grad_(False)
        model.checkpointing = shared.train.checkpointing
        trainer = Trainer(model, tokenizer, ready, device=device, progress=progress, prune=prune, predicted=predicted)
        trainer.run(n_at_once)
    if all("error" in summary for summary in summaries):
        raise ValueError(f"every job failed; the first: {summaries[0]['error']}")
    return summaries


class _Preparer:
    """Opens the jobs' folders and reads their data, the same data once."""

    def __init__(
        self,
        base: Path,
        model: ModelConfig,
        tokenizer: Tokenizer,
        method: str,
        *,
        resume: bool,
        force: bool,
        stack: ExitStack,
        device: str,
    ) -> None:
        self.base, self.model, self.tokenizer, self.method = base, model, tokenizer, method
        self.device = device
        self.resume, self.force, self.stack = resume, force, stack
        self.template = ChatTemplate.of(tokenizer)
        self.base_inputs: dict[str, Input] | None = None
        self.sides = {
            path: min(width(linear, "in_features"), width(linear, "out_features"))
            for path, linear in linears(empty_model(model))
        }
        self._records: dict[Path, list[Record]] = {}
        self._encoded: dict[Any, tuple[list[Encoded], DatasetReport]] = {}

    def job(self, asked: Mapping[str, Any], summary: dict[str, Any]) -> Job | None:
        """A job ready to train, or None with the reason in its summary when its data is at fault.

        Raises ValueError or OSError, naming the job, for settings or a folder that can't work: nothing has been trained yet.
        """
        out = Path(asked["out"])
        run = None
        try:
            resume = self.resume and out.exists()  # the signal may have come before the job's first step
            run = RunFolder(out, stage=f"sft {self.method}", resume=resume, force=self.force)
            self.stack.enter_context(run)
            job = self._prepare(asked, run, summary)
        except (ValueError, OSError) as error:
            if run is not None:
                run.close()
            raise type(error)(f"job {out}: {error}") from None
        if job is None:
            run.close()
            print(f"job {out} is left out: {summary['error']}", file=sys.stderr)
        return job

    def _prepare(self, asked: Mapping[str, Any], run: RunFolder, summary: dict[str, Any]) -> Job | None:
        data, eval_data = Path(asked["data"]), Path(asked["eval_data"]) if "eval_data" in asked else None
        requested: Mapping[str, Any] = asked["settings"]
        draft = resolve(requested, method=self.method, n_rows=1)
        _check_config(draft)
        smallest = min(self.sides[path] for path in matching(list(self.sides), draft.lora.targets))
        if draft.lora.rank > smallest:
            raise ValueError(
                f"rank={draft.lora.rank} is more than a layer's smaller side {smallest}; use rank <= {smallest}"
            )
        try:
            records = self._read(data)
            held_out = self._read(eval_data) if eval_data else []
        except (ValueError, OSError) as error:
            summary["error"] = str(error)
            return None
        if self.base_inputs is None:
            both = run_inputs(self.base, data, None)
            self.base_inputs = {name: both[name] for name in ("base", "tokenizer")}
        inputs = self.base_inputs | {"data": Input.of(data)}
        if eval_data is not None:
            inputs |= {"eval_data": Input.of(eval_data)}
        if run.previous:
            saved = run.previous["config"]
            check_same_inputs(saved, inputs)
            requested = resumed_settings(requested, saved)
            draft = resolve(requested, method=self.method, n_rows=len(records))
        limit = row_limit(draft.data.max_seq_len, self.model)
        try:
            encoded, report = self._encode(data, records, limit, draft)
            encoded_eval = self._encode(eval_data, held_out, limit, draft)[0] if held_out else []
        except ValueError as error:
            summary["error"] = str(error)
            return None
        for line in report.lines(limit, draft.records):
            print(f"note: {asked['out']}: {line}", file=sys.stderr)
        config = dataclasses.replace(resolve(requested, method=self.method, n_rows=len(encoded)), inputs=inputs)
        stored_in_4_bits(config)
        check_evaluation(config.train, has_evaluation=bool(encoded_eval))
        batches, val = make_batches(config, encoded, encoded_eval)
        generator = torch.Generator(self.device).manual_seed(config.train.seed)
        return Job(
            out=Path(asked["out"]),
            name=str(asked["out"]),
            config=config,
            run=run,
            records=records,
            report=report,
            encoded=encoded,
            batches=batches,
            val=val,
            template=self.template,
            generator=generator,
            summary=summary,
        )

    def _read(self, path: Path) -> list[Record]:
        key = path.resolve()
        if key not in self._records:
            self._records[key] = read_records(path)
        return self._records[key]

    def _encode(
        self, path: Path | None, records: list[Record], limit: int, draft: Run
    ) -> tuple[list[Encoded], DatasetReport]:
        assert path is not None
        key = (path.resolve(), limit, draft.records)
        if key not in self._encoded:
            self._encoded[key] = encode_dataset(records, self.tokenizer, self.template, limit, draft.records)
        return self._encoded[key]


class Trainer:
    """The jobs in training on one model: who takes part, and the step that they take together."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        jobs: Sequence[Job],
        *,
        device: str,
        progress: bool = False,
        prune: Prune | None = None,
        predicted: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.waiting, self.active = list(jobs), list[Job]()
        self.stack: AdapterStack | None = None
        self.made_for = fingerprint(model)
        self.base_bytes = weight_bytes(model)
        self.progress, self.prune, self.predicted, self.n_jobs = progress, prune, predicted, len(jobs)

    def run(self, at_once: int) -> None:
        """Train all jobs to their ends, at most `at_once` at a time. Raises Interrupted after a signal."""
        bars = [(job.name, job.config.train.steps) for job in self.waiting]
        with many_progress(bars, shown=self.progress) as observe, stop_on_signal() as stop:
            while self.waiting or self.active:
                self._join(at_once)
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
        joined = []
        while self.waiting and len(self.active) + len(joined) < at_once:
            job = self.waiting.pop(0)
            config = job.config
            try:
                attach_lora(self.model, config.lora, seed=config.train.seed, name=job.name)
            except ValueError as error:
                self._fail(job, error)
                continue
            joined.append(job)
        if not joined:
            return
        self._set_active([*self.active, *joined])
        assert self.stack is not None
        for job in joined:
            self._begin(job)
        for job in [job for job in joined if job in self.active]:
            result = job.history.result if job.history else None
            if result and (
                job.step >= job.config.train.steps or is_out_of_patience(result.evals, job.config.train.patience)
            ):
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
                )
        except (ValueError, OSError) as error:
            self._fail(job, error)

    def _set_active(self, jobs: list[Job]) -> None:
        self.active = jobs
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

    def _finish(self, job: Job) -> None:
        """Write what a solo run leaves, and let the job go."""
        assert job.history is not None
        assert job.row is not None
        try:
            job.run.close_metrics()
            job.history.take_best()
            result = job.history.result
            result.seconds = time.perf_counter() - job.began
            base = job.config.inputs["base"].path
            with job.run.results() as folder:
                save_adapter(
                    self.model,
                    folder,
                    job.config.lora,
                    base=str(base.resolve()),
                    name=job.name,
                    graft=made_with(job.records, self.made_for, job.config.method),
                    chat_template=job.template.source if job.template is not None else None,
                )
            trained = [tensor for _, tensor in job.row.named]
            job.summary |= {
                "method": job.config.method,
                **result.summary(),
                **job.report.figures(),
                "n_trained_params": sum(tensor.numel() for tensor in trained),
                "weight_bytes": self.base_bytes + sum(tensor.numel() * tensor.element_size() for tensor in trained),
                "predicted_peak_bytes": self.predicted,
                **peak_bytes(self.device),
                "n_jobs": self.n_jobs,
                "device": self.device,
            }
            job.run.finish({key: value for key, value in job.summary.items() if key != "out"})
        except (ValueError, OSError) as error:
            self._fail(job, error)
            return
        self._leave(job)

    # --- a step ---

    def step(self, stop: Stop, observe: Callable[[str, dict[str, Any]], None] | None = None) -> None:
        """One update of every active job; those that fail or end leave."""
        began = time.perf_counter()
        batches: dict[str, list[dict[str, Tensor]]] = {}
        totals: dict[str, int] = {}
        for job in list(self.active):
            batches[job.name] = job.batches.batch_at(job.step)
            totals[job.name] = sum(n_labels(batch) for batch in batches[job.name])
            if totals[job.name] == 0:
                error = ValueError(
                    f"step {job.step + 1}: no token of the batch carries loss; check the data's completions"
                )
                self._fail(job, error)
        jobs = list(self.active)
        if not jobs:
            return
        losses, norms = self._gradients(jobs, batches, totals)
        n_tokens = {name: sum(batch["ids"].numel() for batch in own) for name, own in batches.items()}
        ended: list[tuple[Job, Exception | None]] = []
        for job, loss, norm in zip(jobs, losses, norms, strict=True):
            assert job.history is not None
            assert job.row is not None
            assert job.scaler is not None
            try:
                line = update(job.row, job.config.train, job.scaler, job.step, loss=loss, norm=norm)
                seconds = time.perf_counter() - began
                read = n_tokens[job.name]
                line |= {
                    "n_labels": totals[job.name],
                    "n_tokens": read,
                    "tokens_per_s": round(read / seconds, 1),
                    "step_s": round(seconds, 5),
                }
                figures = job.history.evaluate() if job.history.is_due(job.step) else None
                with own_random_state(job):
                    last = job.history.record(
                        line,
                        figures,
                        stop=stop,
                        on_step=(lambda line, job=job: observe(job.name, line)) if observe else None,
                    )
                if last:
                    ended.append((job, None))
            except NotFiniteError as error:
                ended.append((job, ValueError(f"{error}; {job.history.way_back()}")))
            except (ValueError, OSError) as error:
                ended.append((job, error))
        for job, error in ended:  # only now: leaving changes the stack, and drops the gradients of those after it
            if error is None:
                self._finish(job)
            else:
                self._fail(job, error)
        if self.prune is not None:
            for job, reason in self.prune(self.active, self.val_loss):
                job.summary |= {"stopped": reason, "steps": job.step}
                job.run.__exit__(LeftOut, LeftOut(reason), None)
                self._leave(job)

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
            parts = [batches[job.name][i] if i < len(batches[job.name]) else None for job in jobs]
            batch, counts = together(parts, packed=self.device == "cpu")
            moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            factors = [scale / totals[job.name] for job, scale in zip(jobs, scales, strict=True)]
            job_of = torch.repeat_interleave(torch.arange(len(jobs)), torch.tensor(counts)).to(self.device)
            weights = torch.tensor(factors, device=self.device)[job_of]  # (N,)
            with self.stack.training(counts):
                with autocast(loop.dtype, self.device):
                    total, losses = weighted_loss(self.model, moved, weights)
                total.backward()
            summed.index_add_(0, job_of, losses.to(summed.dtype))
        gradients = self.stack.buffers["gradients"]
        if any(scale != 1.0 for scale in scales):
            gradients /= torch.tensor(scales, device=self.device)[:, None]
        norms = self.stack.norms()
        limits = torch.tensor([job.config.train.grad_clip or math.inf for job in jobs], device=self.device)
        factors = (limits / (norms + 1e-6)).clamp(max=1.0)  # as base/optim/clip.py, for each job apart
        clipped = ((factors < 1) & norms.isfinite()).nonzero().flatten().tolist()
        for row in clipped:
            gradients[row] *= factors[row]
        counts_of = torch.tensor([totals[job.name] for job in jobs], device=self.device)
        return (summed / counts_of).tolist(), norms.tolist()

    def val_loss(self, job: Job) -> float:
        """A job's validation loss now, nats a label."""
        self.model.eval()
        with use_adapters(self.model, job.name):
            return mean_loss(self.model, job.val, dtype=job.config.train.dtype, device=self.device)


def together(
    parts: Sequence[Mapping[str, Tensor] | None],  # a micro-batch of each job, or None for a job that has no more
    *,
    packed: bool,  # whether rows of different lengths may be put end to end in one row
) -> tuple[dict[str, Tensor], list[int]]:
    """One batch of all jobs' rows, grouped by job, and how many of its tokens, padding included, are each job's.

    Rows of one length stay rows. Else they are put end to end without their padding, each seeing only itself, so that no job
    waits for another's longest row; or, where that is not wanted, all are padded to the longest.
    """
    present = [part for part in parts if part is not None]
    has_borders = any("cu_seqlens" in part for part in present)
    widths = {part["ids"].shape[1] for part in present}
    if has_borders or (packed and len(widths) > 1):
        return _end_to_end(parts)
    width = max(widths)
    batch = {
        name: torch.cat([F.pad(part[name], (0, width - part[name].shape[1]), value=fill) for part in present])
        for name, fill in (("ids", 0), ("targets", IGNORE))
    }
    return batch, [0 if part is None else part["ids"].shape[0] * width for part in parts]


def _end_to_end(parts: Sequence[Mapping[str, Tensor] | None]) -> tuple[dict[str, Tensor], list[int]]:
    ids, targets, lengths, counts = [], [], [], []
    for part in parts:
        counts.append(0)
        if part is None:
            continue
        if "cu_seqlens" in part:
            sizes = part["cu_seqlens"].diff().tolist()
            rows = list(zip(part["ids"][0].split(sizes), part["targets"][0].split(sizes), strict=True))
        else:
            rows = [_without_padding(*row) for row in zip(part["ids"], part["targets"], strict=True)]
        for row_ids, row_targets in rows:
            ids.append(row_ids)
            targets.append(row_targets)
            lengths.append(len(row_ids))
            counts[-1] += len(row_ids)
    return {
        "ids": torch.cat(ids)[None],
        "targets": torch.cat(targets)[None],
        "positions": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    }, counts


def _without_padding(ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A row up to its last label: what follows is padding, or text that no label needs."""
    labels = (targets != IGNORE).nonzero()
    end = int(labels[-1]) + 1 if len(labels) else 1
    return ids[:end], targets[:end]


def weighted_loss(model: Transformer, batch: Mapping[str, Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of weights (N,) times each token's loss, to be differentiated, and the losses (N,) in nats, detached."""
    hidden = model.hidden_states(
        batch["ids"], positions=batch.get("positions"), cu_seqlens=batch.get("cu_seqlens")
    ).flatten(0, 1)
    targets = batch["targets"].flatten()
    if type(model.lm_head) is nn.Linear:
        return weighted_linear_cross_entropy(hidden, model.lm_head.weight, targets, weights, ignore_index=IGNORE)
    logits = model.lm_head(hidden).float()  # an adapted or quantized head is a function, not a matrix
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    return (losses * weights).sum(), losses.detach()


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


@contextmanager
def many_progress(
    jobs: Sequence[tuple[str, int]],  # name and steps
    *,
    shown: bool,
) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """One line a job on standard error: step, loss, validation loss. Yields the observer of each line of metrics."""
    if not shown:
        yield lambda name, line: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        tasks = {name: progress.add_task(name, total=steps, figures="") for name, steps in jobs}
        val: dict[str, str] = {}

        def observe(name: str, line: dict[str, Any]) -> None:
            if "val_loss" in line:
                val[name] = f" val {line['val_loss']:.3f}"
            figures = f"loss {line['loss']:.3f}{val.get(name, '')}"
            progress.update(tasks[name], completed=line["step"], figures=figures)

        yield observe
