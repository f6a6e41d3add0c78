"""`graft sft`: a base + records -> a fine-tuned base (full) or an adapter (LoRA, QLoRA). Same loop as pretraining."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..base.checkpoint import read_json, write_json
from ..base.device import explain_device, peak_bytes, reset_peak, resolve_device
from ..base.evaluate import mean_loss
from ..base.model.config import ModelConfig
from ..base.model.huggingface import fingerprint, load_config, save_model, weight_files
from ..base.model.transformer import Transformer
from ..base.pretrain import TOKENIZER_FILES
from ..base.progress import step_progress
from ..base.run import Input, Run, TrainConfig, check_same_inputs, resumed_settings
from ..base.runlog import RunFolder
from ..base.settings import check_settings, split_settings
from ..base.tokenizer.tokenizer import Tokenizer
from ..base.train import Result, check_evaluation, check_optimizer, make_optimizer, train
from ..quant.files import read_quantization_config
from ..quant.linear import quantize_linears_
from .adapters.files import GRAFT, save_adapter
from .adapters.lora import LoraConfig, attach_lora
from .data.chat import ChatTemplate, Encoded
from .data.dataset import DatasetOptions, encode_dataset
from .data.packing import SFTBatches, collate_padded, steps_for_epochs
from .data.records import Record, read_records
from .data.stop import write_endings
from .folders import carry_over
from .loading import load_model, weight_bytes
from .memory.report import print_prediction
from .optimizers import OPTIMIZERS, PAGED_OPTIMIZERS

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


def sft(
    *,
    base: Path | str,
    data: Path | str,
    out: Path | str,
    method: str = "full",
    eval_data: Path | str | None = None,
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
        resume=resume,
        force=force,
        device=device,
        progress=progress,
        settings=settings,
    )


def run_sft(
    *,
    base: Path | str,
    data: Path | str,
    out: Path | str,
    method: str = "full",
    lora: LoraConfig | None = None,  # instead of its keys in `settings`; the full method has none
    settings: Mapping[str, Any] | None = None,
    eval_data: Path | str | None = None,
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
    records = read_records(data)
    held_out = read_records(eval_data) if eval_data else []
    with RunFolder(out, stage=f"sft {method}", resume=resume, force=force) as run:
        requested = check_settings(settings or {}, *PARTS.values())
        if lora is not None and method != "full":
            requested = dataclasses.asdict(lora) | requested
        model_config = load_config(base)
        inputs = run_inputs(Path(base), Path(data), Path(eval_data) if eval_data else None)
        if run.previous:
            saved = run.previous["config"]
            check_same_inputs(saved, inputs)
            requested = resumed_settings(requested, saved)
        draft = resolve(requested, method=method, n_rows=len(records))  # the rows are counted once they are encoded
        limit = length_limit(draft.data.max_seq_len, model_config)
        tokenizer = Tokenizer.load(base)
        template = ChatTemplate.of(tokenizer)
        encoded, report = encode_dataset(records, tokenizer, template, limit, draft.records)
        encoded_eval = encode_dataset(held_out, tokenizer, template, limit, draft.records)[0] if held_out else []
        for line in report.lines(limit, draft.records):
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
        result = _train(model, config, encoded, encoded_eval, run, device, progress, label or f"sft {method}")
        metadata = made_with(records, made_for, method)
        with run.results() as folder:
            _save(model, config, folder, tokenizer, template, metadata)
        summary = {
            "method": method,
            **result.summary(),
            **report.figures(),
            "n_trained_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "weight_bytes": weight_bytes(model),
            "predicted_peak_bytes": predicted,
            **peak_bytes(device),
            "device": device,
        }
        run.finish(summary)
        return summary


def run_inputs(base: Path, data: Path, eval_data: Path | None) -> dict[str, Input]:
    """What the run reads, known by content: the base's config and weights, its tokenizer, the records."""
    tokenizer = [path for name in TOKENIZER_FILES if (path := base / name).exists()]
    inputs = {
        "base": Input.of(base, [base / "config.json", *weight_files(base)]),
        "tokenizer": Input.of(base, tokenizer),
        "data": Input.of(data),
    }
    return inputs | ({"eval_data": Input.of(eval_data)} if eval_data is not None else {})


def length_limit(asked: int | None, model: ModelConfig) -> int:
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
        attach_lora(model, config.lora, seed=config.train.seed)
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
    optimizer = make_optimizer(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad],
        loop,
        PAGED_OPTIMIZERS if config.quant.paged else OPTIMIZERS,
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


def made_with(records: list[Record], fingerprint: str, method: str) -> dict[str, Any]:
    """graft.json: how the records spoke to the model, and which base it was."""
    return {
        "prompt_format": "chat" if any(record.messages is not None for record in records) else "text",
        "base_fingerprint": fingerprint,
        "method": method,
    }


def _save(
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
