"""`graft sft`: a base + records -> a fine-tuned base (full) or an adapter (LoRA, QLoRA). Same loop as pretraining."""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..base.checkpoint import write_json
from ..base.device import explain_device, peak_bytes, reset_peak, resolve_device
from ..base.evaluate import mean_loss
from ..base.json_fields import read_json
from ..base.model.config import ModelConfig
from ..base.model.huggingface import fingerprint, load_config, save_model, weight_files
from ..base.model.transformer import Transformer
from ..base.pretrain import TOKENIZER_FILES
from ..base.progress import step_progress
from ..base.run import Input, Run, TrainConfig, check_same_inputs, resumed_settings
from ..base.runlog import RunFolder
from ..base.settings import check_settings, split_settings
from ..base.tokenizer.tokenizer import Tokenizer
from ..base.train import Result, check_evaluation, check_optimizer, train
from ..quant.files import read_quantization_config
from ..quant.linear import quantize_linears_
from .adapters.attach import attach_adapter
from .adapters.config import LoraConfig
from .adapters.files import CONFIG, GRAFT, WEIGHTS, Adapter, read_adapter, save_adapter
from .adapters.resume import continued_lora, load_weights_
from .data.chat import ChatTemplate, Encoded
from .data.dataset import DatasetOptions, encode_dataset
from .data.packing import SFTBatches, collate_padded, steps_for_epochs
from .data.records import Record, named_files, read_all
from .data.shape import prompt_shape
from .data.stop import write_endings
from .data.templates import template_source
from .folders import carry_over
from .loading import check_token_ids, load_model, weight_bytes
from .memory.report import print_prediction
from .optimizers import OPTIMIZERS, PAGED_OPTIMIZERS, trained_optimizer

Method = Literal["full", "lora", "qlora"]
METHODS = ("full", "lora", "qlora")
# Peak rates where training starts well; a low-rank update wants about ten times the full one's ("LoRA Without Regret").
LEARNING_RATES = {"full": 5e-5, "lora": 5e-4, "qlora": 5e-4}
# Fine-tuning's own defaults for keys of the loop; those that depend on the method or the data are in `resolve`.
DEFAULTS: dict[str, Any] = {"batch_size": 16, "weight_decay": 0.0}


@dataclass(frozen=True)
class DataOptions:
    """How records become batches."""

    epochs: float = 3.0  # passes over the records, when `steps` is not given
    max_seq_len: int | None = None  # tokens a record may have, longer ones are cut; none: the model's
    packing: bool = False  # records end to end in one row, each seeing only itself, instead of one a row, padded
    fields: dict | None = None  # other field names of the rows, such as {prompt = "question"}
    chat_template: str | None = None  # name or file of a template; none: the base's own
    template_args: dict | None = None  # what the template gets beside the messages, such as {enable_thinking = false}

    def __post_init__(self) -> None:
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ValueError(f"epochs={self.epochs} must be > 0 and finite")


@dataclass(frozen=True)
class QuantOptions:
    """What is held in few bits, and how."""

    double_quant: bool = True  # QLoRA: quantize the quantization constants too
    quant_backend: str = "graft"  # QLoRA: or bitsandbytes, whose layers give the same results, to compare
    paged: bool = False  # optimizer=adamw8bit: keep its moments in the host's memory, a GPU reads them in each step


PARTS = {  # whose keys `graft sft` takes
    "data": DataOptions,
    "records": DatasetOptions,
    "train": TrainConfig,
    "lora": LoraConfig,
    "quant": QuantOptions,
}


def resolve(settings: Mapping[str, Any], *, method: str, n_rows: int) -> Run:
    """Settings (from TOML, --set, flags) -> one config. Raises ValueError for an unknown method or key."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose {', '.join(METHODS)}")
    checked = check_settings(settings, *PARTS.values())
    data, records, loop, lora, quant = split_settings(checked, *PARTS.values())
    if method == "full" and lora:
        key = next(iter(lora))
        raise ValueError(f"{key}={lora[key]!r} is about an adapter; use method lora or qlora, or leave it out")
    options = DataOptions(**data)
    loop: dict[str, Any] = DEFAULTS | {"learning_rate": LEARNING_RATES[method]} | loop
    loop.setdefault("micro_batch", loop["batch_size"])
    loop.setdefault("steps", steps_for_epochs(n_rows, loop["batch_size"], options.epochs))
    loop.setdefault("warmup_steps", min(20, loop["steps"] // 10))
    train = TrainConfig(**loop)
    check_optimizer(train.optimizer, OPTIMIZERS)
    return Run(
        train=train,
        method=method,
        data=options,
        records=DatasetOptions(**records),
        lora=None if method == "full" else LoraConfig(**lora),
        quant=QuantOptions(**quant),
    )


def default_texts() -> dict[str, object]:
    """Defaults of fine-tuning's own, for `graft config`; the other keys have their dataclass's."""
    rates = ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items())
    return {
        **DEFAULTS,
        "learning_rate": rates,
        "micro_batch": "batch_size",
        "steps": "epochs * rows / batch_size",
        "warmup_steps": "steps / 10, at most 20",
    }


Specs = Path | str | Sequence[Path | str]  # files, folders and globs of records; each may end in =WEIGHT


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
    **settings: Any,  # keys of the parts, as `graft config sft` lists them: rank, learning_rate, epochs, ...
) -> dict[str, Any]:
    """`graft sft` from Python: fine-tunes `base` on the records in `data` into `out`; returns the summary's figures.

    Raises ValueError or OSError for bad input, Interrupted after a signal.
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
    label: str = "",  # of the progress bar
) -> dict[str, Any]:
    """Fine-tune and leave a base folder (full) or a PEFT folder (lora, qlora) in `out`; returns the summary.

    Raises ValueError or OSError for bad input, Interrupted after a signal.
    """
    requested_device, device = device, resolve_device(device)
    if Path(out).resolve() == Path(base).resolve():
        raise ValueError(f"--out {out} is the base itself; choose another folder")
    if adapter is not None and method == "full":
        raise ValueError(f"adapter {adapter} can be trained further with method lora or qlora, got full")
    if adapter is not None and Path(out).resolve() == Path(adapter).resolve():
        raise ValueError(f"--out {out} is the adapter itself; choose another folder")
    data, eval_data = _specs(data), _specs(eval_data) if eval_data else None
    former = read_adapter(adapter) if adapter is not None else None
    with RunFolder(out, stage=f"sft {method}", resume=resume, force=force) as run:
        requested = check_settings(settings or {}, *PARTS.values())
        if lora is not None and method != "full":
            requested = dataclasses.asdict(lora) | requested
        model_config = load_config(base)
        inputs = run_inputs(base, data, eval_data, former)
        if run.previous:
            saved = run.previous["config"]
            check_same_inputs(saved, inputs)
            requested = resumed_settings(requested, saved)
        if former is not None:
            requested = _as_the_adapter(requested, former)
        draft = resolve(requested, method=method, n_rows=1)  # the rows are counted once they are encoded
        limit = row_limit(draft.data.max_seq_len, model_config)
        tokenizer = Tokenizer.load(base)
        check_token_ids(tokenizer, model_config, where=base)
        template = template_for(draft.data, tokenizer, former)
        records = read_all(data, draft.data.fields)
        held_out = read_all(eval_data, draft.data.fields) if eval_data else []
        encoded, report = encode_dataset(records, tokenizer, template, limit, draft.records)
        encoded_eval, eval_figures = [], {}
        notes = report.lines(limit, draft.records)
        if held_out:
            encoded_eval, eval_report = encode_dataset(held_out, tokenizer, template, limit, draft.records)
            n_seen = len(_contents(held_out) & _contents(records))
            eval_figures = {f"eval_{name}": count for name, count in eval_report.figures().items() if count}
            eval_figures |= {"eval_n_in_training": n_seen} if n_seen else {}
            notes += [f"eval data: {line}" for line in eval_report.lines(limit, draft.records)]
            if n_seen:
                notes.append(f"eval data: {n_seen:,} distinct records are among the training records as well")
        for line in notes:
            print(f"note: {line}", file=sys.stderr)
        config = dataclasses.replace(resolve(requested, method=method, n_rows=len(encoded)), inputs=inputs)
        stored = stored_in_4_bits(config)
        check_evaluation(config.train, has_evaluation=bool(encoded_eval))
        if progress:
            print(explain_device(requested_device, device), file=sys.stderr)
        predicted = print_prediction(
            model_config,
            config.train,
            device,
            method="qlora" if stored else config.method,
            seq_len=max(len(record.ids) for record in encoded) - 1,
            lora=config.lora,
            double_quant=stored["double_quant"] if stored else config.quant.double_quant,
        )
        reset_peak(device)
        model = prepare_model(config, device)
        made_for = fingerprint(model)
        if former is not None:
            load_weights_(model, former, base_fingerprint=made_for)
        result = _train(model, config, encoded, encoded_eval, run, device, progress, label or f"sft {method}")
        metadata = made_with(records, made_for, method, template)
        with run.results() as folder:
            save_trained(model, config, folder, tokenizer, template, metadata)
        summary = {
            "method": method,
            **result.summary(),
            **report.figures(),
            **eval_figures,
            "n_trained_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "weight_bytes": weight_bytes(model),
            "predicted_peak_bytes": predicted,
            **peak_bytes(device),
            "device": device,
        }
        run.finish(summary)
        return summary


def _specs(given: Specs) -> list[str]:
    return [str(given)] if isinstance(given, Path | str) else [str(one) for one in given]


def run_inputs(
    base: Path | str, data: Specs, eval_data: Specs | None = None, adapter: Adapter | None = None
) -> dict[str, Input]:
    """What a run reads, known by content: the base's config and weights, its tokenizer, all files of records."""
    base = Path(base)
    tokenizer = [path for name in TOKENIZER_FILES if (path := base / name).exists()]
    inputs = {
        "base": Input.of(base, [base / "config.json", *weight_files(base)]),
        "tokenizer": Input.of(base, tokenizer),
        "data": _data_input(_specs(data)),
    }
    if eval_data is not None:
        inputs["eval_data"] = _data_input(_specs(eval_data))
    if adapter is not None:
        folder = Path(adapter.where)
        inputs["adapter"] = Input.of(folder, [folder / CONFIG, folder / WEIGHTS])
    return inputs


def _data_input(specs: Sequence[str]) -> Input:
    """The bytes of every file that the specs name, in their order, and their weights if they have any."""
    named = named_files(specs)
    found = Input.of(", ".join(specs), [file for files, _ in named for file in files])
    weights = [(len(files), weight) for files, weight in named if weight is not None]
    if not weights:
        return found
    return Input(found.path, hashlib.sha256(f"{found.sha256} {weights}".encode()).hexdigest())


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


def template_for(options: DataOptions, tokenizer: Tokenizer, former: Adapter | None) -> ChatTemplate:
    """The template asked for, else that of the adapter to go on from, else the base's."""
    source = template_source(options.chat_template) if options.chat_template else former and former.chat_template
    args = options.template_args if options.template_args is not None else former and former.template_args
    return ChatTemplate.of(tokenizer, source, args=args)


def _contents(records: Sequence[Record]) -> set[tuple[object, ...]]:
    """What the records say, those that say something."""
    full = [record for record in records if record.empty is None]
    return {(record.text, record.prompt, record.completion, repr(record.messages)) for record in full}


def row_limit(asked: int | None, model: ModelConfig) -> int:
    """The longest record in tokens; one more than the model's positions, since the last token is only a target."""
    if asked is not None and not 2 <= asked <= model.max_seq_len + 1:
        raise ValueError(f"max_seq_len={asked} must lie in [2, {model.max_seq_len + 1}], the base's limit")
    return asked or model.max_seq_len + 1


def stored_in_4_bits(config: Run) -> dict[str, Any] | None:
    """How the base's linears are quantized on disk, or None; refuses options that don't go together or with such a base."""
    base = config.inputs["base"].path
    stored = read_quantization_config(read_json(base / "config.json"))
    backend = config.quant.quant_backend
    if stored and config.method == "full":
        raise ValueError(f"{base} is in 4 bits and can't be fully fine-tuned; use --qlora, or its full base")
    if backend != "graft" and config.method != "qlora":
        raise ValueError(f"quant_backend={backend} is about QLoRA; add --qlora, or leave it out")
    if config.quant.paged and config.train.optimizer != "adamw8bit":
        raise ValueError("paged=true is about optimizer=adamw8bit; set that too, or leave it out")
    if stored and backend != "graft":
        raise ValueError(
            f"{base} is in 4 bits already, and bitsandbytes' layers are made from a full-precision base; "
            "leave --quant-backend out, or give that base"
        )
    return stored


def prepare_model(config: Run, device: str) -> Transformer:
    """Load the base as the method wants it: full in float32, LoRA's base frozen in the run's dtype, QLoRA's in NF4."""
    model = load_base(config, device)
    if config.method == "full":
        model.requires_grad_(True)
    else:
        assert config.lora is not None
        attach_adapter(model, config.lora, seed=config.train.seed)
    return model


def load_base(config: Run, device: str) -> Transformer:
    """The base as the method holds it, before anything is attached or trained."""
    base = config.inputs["base"].path
    if config.method == "full":
        model = load_model(base, dtype="float32", device=device)
    else:
        is_peer = config.method == "qlora" and config.quant.quant_backend != "graft"
        quantize = "nf4" if config.method == "qlora" and not is_peer else None
        model = load_model(
            base,
            dtype=config.train.dtype,
            device=device,
            quantize=quantize,
            double_quant=config.quant.double_quant,
        )
        if is_peer:  # bitsandbytes quantizes whole layers, so the base is held in full precision first
            double_quant, backend = config.quant.double_quant, config.quant.quant_backend
            quantize_linears_(model, double_quant=double_quant, backend=backend)
    model.checkpointing = config.train.checkpointing
    return model


def _train(
    model: Transformer,
    config: Run,
    encoded: list[Encoded],
    held_out: list[Encoded],
    run: RunFolder,
    device: str,
    progress: bool,
    label: str,
) -> Result:
    loop = config.train
    batches, val = make_batches(config, encoded, held_out)
    optimizer = trained_optimizer(
        model, loop, lora=config.lora, makers=PAGED_OPTIMIZERS if config.quant.paged else OPTIMIZERS
    )
    # All validation is done: only now may --force touch what a former run left.
    run.start(config.saved(), seed=loop.seed)
    with step_progress(label, loop.steps, shown=progress) as observe:
        return train(
            model,
            optimizer,
            batches.batch_at,
            loop,
            run,
            evaluate=(lambda: {"val_loss": mean_loss(model, val, dtype=loop.dtype, device=device)}) if val else None,
            on_step=observe,
            device=device,
        )


def make_batches(
    config: Run, encoded: list[Encoded], held_out: list[Encoded]
) -> tuple[SFTBatches, list[dict[str, Tensor]]]:
    """The batches to train on, and those to validate on."""
    loop = config.train
    batches = SFTBatches(
        encoded,
        batch_size=loop.batch_size,
        max_tokens=loop.micro_batch * max(len(record.ids) for record in encoded),
        packed=config.data.packing,
        seed=loop.seed,
    )
    val = [collate_padded(held_out[i : i + loop.micro_batch]) for i in range(0, len(held_out), loop.micro_batch)]
    return batches, val


def made_with(
    records: Sequence[Record], fingerprint: str, method: str, template: ChatTemplate | None = None
) -> dict[str, Any]:
    """graft.json: how the records spoke to the model, and which base it was."""
    return {
        "prompt_format": "chat" if any(record.messages is not None for record in records) else "text",
        "base_fingerprint": fingerprint,
        "method": method,
        **({"template_args": dict(template.args)} if template is not None and template.args else {}),
        **({"prompt_shape": shape} if (shape := prompt_shape(records)) else {}),
    }


def save_trained(
    model: Transformer,
    config: Run,
    folder: Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    metadata: dict[str, Any],
) -> None:
    """The folder that other tools open; the chat template of training goes with it."""
    source = template.source if template is not None else None
    if config.lora is None:
        tokenizer.chat_template = source
        write_endings(model, tokenizer, template if metadata["prompt_format"] == "chat" else None)
        tokenizer.save(folder)
        write_json(folder / GRAFT, metadata)
        save_model(model.cpu(), folder, dtype=None)
        carry_over(config.inputs["base"].path, folder)
        return
    base = config.inputs["base"].path
    save_adapter(
        model, folder, config.lora, base=str(base.resolve()) if base.exists() else str(base), graft=metadata,
        chat_template=source,
    )  # fmt: skip
