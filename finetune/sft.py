"""`graft sft`: a base + records -> a fine-tuned base (full) or an adapter (LoRA, QLoRA). Same loop as pretraining."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..base.callbacks import Callbacks, Watcher
from ..base.device import explain_device, peak_bytes, reset_peak, resolve_device
from ..base.evaluate import mean_loss
from ..base.follower import open_run
from ..base.hub import model_folder
from ..base.idle import refuse_idle
from ..base.loggers import loggers
from ..base.model.config import ModelConfig
from ..base.model.huggingface import fingerprint, load_config
from ..base.model.transformer import Transformer
from ..base.parallel.mesh import Mesh
from ..base.parallel.ranks import join, ranks
from ..base.parallel.same import check_same, facts_of
from ..base.progress import step_progress
from ..base.run import Run, check_same_inputs, resumed_settings
from ..base.runlog import RunFolder
from ..base.settings import check_settings
from ..base.tokenizer.tokenizer import Tokenizer
from ..base.train import train
from ..base.training.compiled import compile_layers
from ..base.training.history import check_evaluation
from ..base.training.result import Result
from .adapters.config import LoraConfig
from .adapters.files import Adapter, read_adapter
from .adapters.resume import continued_lora, load_weights_
from .data.chat import ChatTemplate
from .loading import check_token_ids, weight_bytes
from .memory.budget import within_budget
from .memory.report import print_prediction
from .optimizers import OPTIMIZERS, PAGED_OPTIMIZERS, finetuning_mesh, trained_optimizer
from .sft_config import METHODS, PARTS, DataOptions, QuantOptions, default_texts, refuse_unused, resolve
from .sft_data import Rows, Specs, as_list, encode_rows, made_with, make_batches, row_limit, run_inputs, template_for
from .sft_model import load_base, prepare_model, save_trained, stored_in_4_bits

__all__ = [
    "METHODS", "PARTS", "DataOptions", "QuantOptions", "default_texts", "load_base", "made_with", "make_batches",
    "prepare_model", "resolve", "row_limit", "run_inputs", "run_sft", "save_trained", "sft", "stored_in_4_bits",
    "template_for",
]  # fmt: skip


def sft(
    *,
    base: Path | str,
    data: Specs,
    out: Path | str,
    method: str = "full",
    eval_data: Specs | None = None,
    adapter: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: bool = False,
    log: Sequence[str] = (),  # tensorboard, wandb, beside metrics.jsonl
    callbacks: Sequence[Watcher] = (),  # see base/callbacks.py
    **settings: Any,  # keys of the parts, as `graft config sft` lists them: rank, learning_rate, epochs, ...
) -> dict[str, Any]:
    """`graft sft` from Python: fine-tunes `base` on the records in `data` into `out`; returns the summary's figures.

    Both are folders or files here, or Hugging Face ids (base/hub.py). Raises ValueError or OSError for bad input,
    Interrupted after a signal.
    """
    return run_sft(
        base=base,
        data=data,
        out=out,
        method=method,
        eval_data=eval_data,
        adapter=adapter,
        resume=resume,
        force=force,
        device=device,
        progress=progress,
        log=log,
        callbacks=callbacks,
        settings=settings,
    )


def run_sft(
    *,
    base: Path | str,
    data: Specs,
    out: Path | str,
    method: str = "full",
    lora: LoraConfig | None = None,  # instead of its keys in `settings`; the full method has none
    settings: Mapping[str, Any] | None = None,
    eval_data: Specs | None = None,
    adapter: Path | str | None = None,  # go on from this one; its rank, alpha and targets stay
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: bool = True,
    log: Sequence[str] = (),
    callbacks: Sequence[Watcher] = (),
    label: str = "",  # of the progress bar
) -> dict[str, Any]:
    """Fine-tune and leave a base folder (full) or a PEFT folder (lora, qlora) in `out`; returns the summary.

    Raises ValueError or OSError for bad input, Interrupted after a signal.
    """
    together, chosen_device = join(resolve_device(device))
    progress = progress and together.is_first
    base = model_folder(base)
    _check_folders(base, out, method, adapter)
    watchers = Callbacks([*loggers(log), *callbacks] if together.is_first else [])
    specs, eval_specs = as_list(data), as_list(eval_data) if eval_data else None
    requested = check_settings(settings or {}, *PARTS.values())
    if lora is not None and method != "full":
        requested = dataclasses.asdict(lora) | requested
    former = read_adapter(adapter) if adapter is not None else None
    try:
        with open_run(together, out, stage=f"sft {method}", resume=resume, force=force) as run:
            job = _prepare(base, specs, eval_specs, method, requested, former, run)
            with closing(job.rows):
                for line in job.rows.notes if together.is_first else ():
                    print(f"note: {line}", file=sys.stderr)
                if progress:
                    print(explain_device(device, chosen_device), file=sys.stderr)
                summary = _run(job, former, run, chosen_device, watchers, progress, label or f"sft {method}")
            watchers.call("on_end", summary)
            return summary
    finally:
        watchers.call("on_close")


@dataclass(frozen=True)
class _Job:
    """A run that has been checked and whose rows are encoded."""

    config: Run
    model_config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    rows: Rows


def _check_folders(base: Path, out: Path | str, method: str, adapter: Path | str | None) -> None:
    """Refuse to write over what is read."""
    if Path(out).resolve() == base.resolve():
        raise ValueError(f"--out {out} is the base itself; choose another folder")
    if adapter is not None and method == "full":
        raise ValueError(f"adapter {adapter} can be trained further with method lora or qlora, got full")
    if adapter is not None and Path(out).resolve() == Path(adapter).resolve():
        raise ValueError(f"--out {out} is the adapter itself; choose another folder")


def _prepare(
    base: Path,
    data: Sequence[str],
    eval_data: Sequence[str] | None,
    method: str,
    requested: Mapping[str, Any],
    former: Adapter | None,
    run: RunFolder,
) -> _Job:
    """Everything that can be refused, before anything is trained or touched."""
    model_config = load_config(base)
    inputs = run_inputs(base, data, eval_data, former)
    refuse_unused(requested, method=method, has_evaluation=eval_data is not None)
    asked = requested
    if run.previous:
        saved = run.previous["config"]
        check_same_inputs(saved, inputs)
        requested = resumed_settings(requested, saved)
    if former is not None:
        requested = _as_the_adapter(requested, former)
    draft = resolve(requested, method=method, n_rows=1)  # the rows are counted once they are encoded
    if not run.previous:
        refuse_idle(asked, draft)
    if draft.data.streaming and ranks().n > 1:
        raise ValueError(f"streaming=true keeps rows in --out, which {ranks().n} ranks can't share; leave it out")
    limit = row_limit(draft.data.max_seq_len, model_config)
    tokenizer = Tokenizer.load(base)
    check_token_ids(tokenizer, model_config, where=base)
    template = template_for(draft.data, tokenizer, former)
    check_evaluation(draft.train, has_evaluation=eval_data is not None)
    rows = encode_rows(data, eval_data, tokenizer, template, limit, draft, folder=run.folder)
    config = dataclasses.replace(resolve(requested, method=method, n_rows=len(rows.train)), inputs=inputs)
    return _Job(config, model_config, tokenizer, template, rows)


def _run(
    job: _Job,
    former: Adapter | None,
    run: RunFolder,
    device: str,
    watchers: Callbacks,
    progress: bool,
    label: str,
) -> dict[str, Any]:
    """Train a job and write its results; returns the summary."""
    config, rows = job.config, job.rows
    check_same(ranks(), facts_of(config))
    config = replace(config, train=within_budget(job.model_config, config.train, device, **_step_of(job)))
    job = replace(job, config=config)
    mesh = finetuning_mesh(config.train, ranks(), device, lora=config.lora)
    predicted = _predicted(job, device) if ranks().is_first else None
    reset_peak(device)
    model = prepare_model(config, device)
    made_for = fingerprint(model)
    if former is not None:
        load_weights_(model, former, base_fingerprint=made_for)
    metadata = made_with(rows.traits, made_for, config.method, job.template)

    def save(folder: Path) -> None:
        save_trained(model, config, folder, job.tokenizer, job.template, metadata)

    export = save if config.lora is not None else None  # each checkpoint of an adapter opens in PEFT
    result = _train(model, job, mesh, run, device, watchers, export, progress, label)
    if ranks().is_first:
        with run.results() as folder:
            save(folder)
    summary = {
        "method": config.method,
        **result.summary(),
        **rows.figures,
        "n_trained_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weight_bytes": weight_bytes(model),
        "predicted_peak_bytes": predicted,
        **peak_bytes(device),
        "device": device,
        **({"n_ranks": mesh.ranks.n} if mesh.ranks.n > 1 else {}),
    }
    run.finish(summary)
    return summary


def _predicted(job: _Job, device: str) -> int:
    """Print the memory that the run will need at its peak; returns it in bytes."""
    return print_prediction(job.model_config, job.config.train, device, **_step_of(job))


def _step_of(job: _Job) -> dict[str, Any]:
    """What predict_run wants to know of a step beside the model and the loop."""
    config, stored = job.config, stored_in_4_bits(job.config)
    return {
        "method": "qlora" if stored else config.method,
        "seq_len": job.rows.longest - 1,
        "lora": config.lora,
        "double_quant": stored["double_quant"] if stored else config.quant.double_quant,
    }


def _as_the_adapter(requested: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The settings with the rank, alpha and targets of the adapter to go on from. Raises ValueError for other ones."""
    settings = dict(requested)
    for name, value in continued_lora(adapter).items():
        if name in settings and settings[name] != value:
            shown = ", ".join(value) if isinstance(value, tuple) else value
            raise ValueError(
                f"{name}={settings[name]!r} can't change while going on from {adapter.where}, which has {shown}; "
                "leave it out, or train a new adapter"
            )
        settings[name] = value
    return settings


def _train(
    model: Transformer,
    job: _Job,
    mesh: Mesh,
    run: RunFolder,
    device: str,
    watchers: Callbacks,
    export: Callable[[Path], None] | None,
    progress: bool,
    label: str,
) -> Result:
    config, loop = job.config, job.config.train
    batches, val = make_batches(config, job.rows.train, job.rows.held_out)
    optimizer = trained_optimizer(
        model, loop, lora=config.lora, makers=PAGED_OPTIMIZERS if config.quant.paged else OPTIMIZERS, mesh=mesh
    )

    def evaluate() -> dict[str, float]:
        return {"val_loss": mean_loss(model, val, dtype=loop.dtype, device=device), **_scores(model, job, device)}

    if loop.compile:
        compile_layers(model, loop)
    # All validation is done: only now may --force touch what a former run left.
    run.start(config.saved(), seed=loop.seed)
    ranks().wait()  # --force sets a former run's checkpoints aside in there: no rank may take them for its own
    with step_progress(label, loop.steps, shown=progress) as observe:
        return train(
            model,
            optimizer,
            batches.batch_at,
            loop,
            run,
            evaluate=evaluate if val else None,
            on_step=observe,
            callbacks=watchers,
            export=export,
            device=device,
        )


SCORES = ("val_accuracy", "val_f1_macro")  # figures that cost the model's answers, so only best_by asks for them


def _scores(model: Transformer, job: _Job, device: str) -> dict[str, float]:
    """Share of right answers to the held-out records, and macro-F1 where their answers are few; if best_by names one."""
    if job.config.train.best_by not in SCORES:
        return {}
    from .evaluation.options import EvalOptions
    from .evaluation.records import evaluate_records

    options = EvalOptions(
        on_too_long="drop",
        on_empty="drop",
        special_tokens=job.config.records.special_tokens,
        batch_size=job.config.train.micro_batch,
    )
    found = evaluate_records(
        model, job.tokenizer, job.rows.held_out_records, job.template, device=device, options=options
    )
    return {name: found[key] for name in SCORES if (key := name.removeprefix("val_")) in found}
