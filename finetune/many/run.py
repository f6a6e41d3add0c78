"""`graft.sft_many` and `graft sft --jobs`: many adapters trained at once on one base, each as its own run would train it."""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...base.device import explain_device, reset_peak, resolve_device
from ...base.model.huggingface import load_config
from ...base.tokenizer.tokenizer import Tokenizer
from ..loading import check_token_ids
from ..sft_model import load_base
from .jobs import Job, check_jobs
from .predict import Plan, plan_jobs
from .prepare import Preparer
from .trainer import Prune, Trainer


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
    With `resume` jobs that ended are left alone, the others go on from their checkpoints, and new ones join. Raises ValueError
    for what is wrong with the jobs as a whole, and when every job fails; OSError for a missing base; Interrupted after a
    signal, when each job has written a checkpoint.
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
    prune: Prune | None = None,  # asked before each step: which jobs leave, and why; with it all train at once
) -> list[dict[str, Any]]:
    """`sft_many`, with what the command line and a sweep need besides."""
    requested_device, device = device, resolve_device(device)
    _check_options(at_once, resume=resume, force=force)
    with ExitStack() as stack:
        ready, summaries = prepare_jobs(
            base, jobs, method, resume=resume, force=force, device=device, stack=stack, skip_left_out=prune is not None
        )
        if progress and ready:
            print(explain_device(requested_device, device), file=sys.stderr)
        if ready:
            plan = plan_jobs(load_config(base), ready, method=method, at_once=at_once, device=device)
            for line in plan.lines():
                print(line, file=sys.stderr)
            reset_peak(device)
            shared = ready[0].config
            model = load_base(shared, device).requires_grad_(False)
            model.checkpointing = shared.train.checkpointing
            trainer = Trainer(model, ready, device=device, progress=progress, prune=prune, figures=plan.figures())
            trainer.run(plan.at_once)
    if all("error" in summary for summary in summaries):
        raise ValueError(f"every job failed; the first: {summaries[0]['error']}")
    return summaries


def fit_jobs(
    *,
    base: Path | str,
    jobs: Sequence[Mapping[str, Any]],
    method: str = "lora",
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    budget: int | None = None,  # bytes; None: what is free on the device
) -> Plan:
    """What training them would need, and how many fit at a time; trains and writes nothing.

    What the jobs' folders hold plays no part, but with `resume`: then it is about what is left to train.
    """
    device = resolve_device(device)
    _check_options(None, resume=resume, force=force)
    with ExitStack() as stack:
        scratch = None if resume else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graft-fit-")))
        ready, summaries = prepare_jobs(
            base, jobs, method, resume=resume, force=force, device=device, stack=stack, scratch=scratch
        )
        if not ready:
            raise ValueError(f"no job to train: {summaries[0].get('error', 'all have ended')}")
        return plan_jobs(load_config(base), ready, method=method, at_once=None, device=device, fit=True, budget=budget)


def prepare_jobs(
    base: Path | str,
    jobs: Sequence[Mapping[str, Any]],
    method: str,
    *,
    resume: bool,
    force: bool,
    device: str,
    stack: ExitStack,  # closes the jobs' folders
    skip_left_out: bool = False,
    scratch: Path | None = None,
) -> tuple[list[Job], list[dict[str, Any]]]:
    """The jobs that are ready to train, and the summaries of all. Raises ValueError when every job's data is at fault."""
    checked = check_jobs(base, jobs, method)
    config, tokenizer = load_config(base), Tokenizer.load(base)
    check_token_ids(tokenizer, config, where=base)
    summaries: list[dict[str, Any]] = [{"out": str(job["out"])} for job in checked]
    prepare = Preparer(
        Path(base),
        config,
        tokenizer,
        method,
        resume=resume,
        force=force,
        stack=stack,
        device=device,
        skip_left_out=skip_left_out,
        scratch=scratch,
    )
    found = [prepare.job(asked, summary) for asked, summary in zip(checked, summaries, strict=True)]
    if all("error" in summary for summary in summaries):
        raise ValueError(f"every job failed; the first: {summaries[0]['error']}")
    return [job for job in found if job is not None], summaries


def _check_options(at_once: int | None, *, resume: bool, force: bool) -> None:
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once={at_once} must be >= 1")
    if resume and force:
        raise ValueError("--resume and --force exclude each other: go on with the runs, or start them over")
