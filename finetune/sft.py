"""`graft sft`: a base + records -> a fine-tuned base (full) or an adapter (LoRA, QLoRA). Same loop as pretraining."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..base.checkpoint import read_json
from ..base.device import peak_bytes, reset_peak, resolve_device
from ..base.evaluate import mean_loss
from ..base.model.config import ModelConfig
from ..base.model.huggingface import fingerprint, load_config, save_model
from ..base.model.transformer import Transformer
from ..base.pretrain import RESUMABLE, same_input
from ..base.progress import step_progress
from ..base.runlog import RunFolder
from ..base.settings import check_settings, split_settings
from ..base.tokenizer.tokenizer import Tokenizer
from ..base.train import Optimizer, Result, TrainConfig, make_optimizer, train
from ..quant.adamw8bit import AdamW8bit
from ..quant.files import read_quantization_config
from ..quant.linear import quantize_linears_
from .adapters.files import GRAFT, save_adapter
from .adapters.lora import LoraConfig, attach_lora
from .data.chat import ChatTemplate, Encoded, encode_record
from .data.packing import SFTBatches, collate_padded
from .data.records import read_records
from .loading import load_model, weight_bytes
from .memory.report import print_prediction

Method = Literal["full", "lora", "qlora"]
METHODS = ("full", "lora", "qlora")
# Peak rates where training starts well; a low-rank update wants about ten times the full one's ("LoRA Without Regret").
LEARNING_RATES = {"full": 5e-5, "lora": 5e-4, "qlora": 5e-4}


@dataclass(frozen=True)
class SFTOptions:
    """What fine-tuning adds to the loop's config."""

    epochs: float = 3.0  # passes over the records, when `steps` is not given
    max_seq_len: int | None = None  # tokens a record may have, longer ones are cut; None: the model's
    packing: bool = False  # records end to end in one row, each seeing only itself, instead of one a row, padded
    double_quant: bool = True  # QLoRA: quantize the quantization constants too
    paged: bool = False  # optimizer=adamw8bit: keep its moments in the host's memory, a GPU reads them in each step
    quant_backend: str = "graft"  # QLoRA: or bitsandbytes, whose layers give the same results, to compare


@dataclass(frozen=True)
class SFTConfig:
    """Everything that decides a fine-tuning run; saved as run.json's `config`."""

    base: Path
    data: Path
    method: Method
    lora: LoraConfig | None
    options: SFTOptions
    train: TrainConfig


def resolve(
    settings: Mapping[str, Any], *, base: Path, data: Path, method: str, n_records: int, lora: LoraConfig
) -> SFTConfig:
    """Settings -> one config. Raises ValueError for an unknown method or key."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose {', '.join(METHODS)}")
    checked = check_settings(settings, SFTOptions, TrainConfig)
    own, loop = split_settings(checked, SFTOptions, TrainConfig)
    options = SFTOptions(**own)
    defaults: dict[str, Any] = {"batch_size": 16, "learning_rate": LEARNING_RATES[method], "weight_decay": 0.0}
    loop = defaults | loop
    loop.setdefault("micro_batch", loop["batch_size"])
    loop.setdefault("steps", max(1, round(options.epochs * n_records / loop["batch_size"])))
    loop.setdefault("warmup_steps", min(20, loop["steps"] // 10))
    return SFTConfig(base, data, method, None if method == "full" else lora, options, TrainConfig(**loop))  # pyright: ignore[reportArgumentType]


def run_sft(
    *,
    base: Path | str,
    data: Path | str,
    out: Path | str,
    method: str = "full",
    lora: LoraConfig | None = None,
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
    device = resolve_device(device)
    if Path(out).resolve() == Path(base).resolve():
        raise ValueError(f"--out {out} is the base itself; choose another folder")
    records = read_records(data)
    held_out = read_records(eval_data) if eval_data else []
    with RunFolder(out, stage=f"sft {method}", resume=resume, force=force) as run:
        if run.previous:
            same_input(run.previous["config"], base=base, data=data)
        lora, settings = _resumed(run, lora, dict(settings or {}))
        config = resolve(settings, base=Path(base), data=Path(data), method=method, n_records=len(records), lora=lora)
        limit = _limit(config.options.max_seq_len, load_config(base))
        tokenizer = Tokenizer.load(base)
        template = ChatTemplate.of(tokenizer)
        encoded = [encode_record(record, tokenizer, template, limit) for record in records]
        encoded_eval = [encode_record(record, tokenizer, template, limit) for record in held_out]
        stored = _stored_in_4_bits(config)
        predicted = print_prediction(
            load_config(base),
            config.train,
            device,
            method="qlora" if stored else config.method,
            seq_len=max(len(record.ids) for record in encoded) - 1,
            lora=config.lora,
            double_quant=stored["double_quant"] if stored else config.options.double_quant,
        )
        reset_peak(device)
        model = prepare_model(config, device)
        made_for = fingerprint(model)
        result = _train(model, config, encoded, encoded_eval, run, device, progress, label or f"sft {method}")
        about = {
            "prompt_format": "chat" if any(record.messages is not None for record in records) else "text",
            "base_fingerprint": made_for,
            "method": method,
        }
        _save(model, config, Path(out), tokenizer, template, about)
        summary = {
            "method": method,
            "steps": result.steps,
            "train_loss": result.loss,
            "val_loss": result.val_loss,
            "n_records": len(records),
            "n_trained_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "weight_bytes": weight_bytes(model),
            "seconds": round(result.seconds, 2),
            "predicted_peak_bytes": predicted,
            **peak_bytes(device),
            "device": device,
        }
        run.finish(summary)
        return summary


def _resumed(run: RunFolder, lora: LoraConfig | None, settings: dict[str, Any]) -> tuple[LoraConfig, dict[str, Any]]:
    """On --resume the saved config, with what may change taken from the settings."""
    if not run.previous:
        return lora or LoraConfig(), settings
    saved = run.previous["config"]
    flat = {**saved["options"], **saved["train"]}
    for key, value in settings.items():
        if key in flat and flat[key] != value and key not in RESUMABLE:
            raise _another_run(key, flat[key], value)
        flat[key] = value
    if saved["lora"] is None:
        return LoraConfig(), flat
    before = LoraConfig(**saved["lora"] | {"targets": tuple(saved["lora"]["targets"])})
    for key in before.__dataclass_fields__:
        if lora is not None and getattr(lora, key) != getattr(before, key):
            raise _another_run(key, getattr(before, key), getattr(lora, key))
    return before, flat


def _another_run(key: str, saved: object, asked: object) -> ValueError:
    return ValueError(f"--resume goes on with {key}={saved!r}, asked was {asked!r}; leave it out, or --force a new run")


def _limit(asked: int | None, model: ModelConfig) -> int:
    """The longest record in tokens; one more than the model's positions, since the last token is only a target."""
    if asked is not None and not 2 <= asked <= model.max_seq_len + 1:
        raise ValueError(f"max_seq_len={asked} must lie in [2, {model.max_seq_len + 1}], the base's limit")
    return asked or model.max_seq_len + 1


def _stored_in_4_bits(config: SFTConfig) -> dict[str, Any] | None:
    """How the base's linears are quantized on disk, or None; refuses options that don't go together or with such a base."""
    stored = read_quantization_config(read_json(config.base / "config.json"))
    backend = config.options.quant_backend
    if stored and config.method == "full":
        raise ValueError(f"{config.base} is in 4 bits and can't be fully fine-tuned; use --qlora, or its full base")
    if backend != "graft" and config.method != "qlora":
        raise ValueError(f"quant_backend={backend} is about QLoRA; add --qlora, or leave it out")
    if config.options.paged and config.train.optimizer != "adamw8bit":
        raise ValueError("paged=true is about optimizer=adamw8bit; set that too, or leave it out")
    if stored and backend != "graft":
        raise ValueError(
            f"{config.base} is in 4 bits already, and bitsandbytes' layers are made from a full-precision base; "
            "leave --quant-backend out, or give that base"
        )
    return stored


def prepare_model(config: SFTConfig, device: str) -> Transformer:
    """Load the base as the method wants it: full in float32, LoRA's base frozen in the run's dtype, QLoRA's in NF4."""
    if config.method == "full":
        model = load_model(config.base, dtype="float32", device=device)
        model.requires_grad_(True)
    else:
        theirs = config.method == "qlora" and config.options.quant_backend != "graft"
        quantize = "nf4" if config.method == "qlora" and not theirs else None
        model = load_model(
            config.base,
            dtype=config.train.dtype,
            device=device,
            quantize=quantize,
            double_quant=config.options.double_quant,
        )
        if theirs:  # bitsandbytes quantizes whole layers, so the base is held in full precision first
            double_quant, backend = config.options.double_quant, config.options.quant_backend
            quantize_linears_(model, double_quant=double_quant, backend=backend)
        assert config.lora is not None
        attach_lora(model, config.lora, seed=config.train.seed)
    model.checkpointing = config.train.checkpointing
    return model


def _train(
    model: Transformer,
    config: SFTConfig,
    encoded: list[Encoded],
    held_out: list[Encoded],
    run: RunFolder,
    device: str,
    progress: bool,
    label: str,
) -> Result:
    loop = config.train
    batches = SFTBatches(
        encoded,
        batch_size=loop.batch_size,
        max_tokens=loop.micro_batch * max(len(record.ids) for record in encoded),
        packed=config.options.packing,
        seed=loop.seed,
    )
    val = [collate_padded(held_out[i : i + loop.micro_batch]) for i in range(0, len(held_out), loop.micro_batch)]
    optimizer = _optimizer(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad], loop, config.options.paged
    )
    # From here on nothing is refused any more: now a run that is started over may lose its log.
    run.start({field: getattr(config, field) for field in config.__dataclass_fields__}, seed=loop.seed)
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


def _optimizer(trained: list[tuple[str, Tensor]], loop: TrainConfig, paged: bool) -> Optimizer:
    if loop.optimizer != "adamw8bit":
        return make_optimizer(trained, loop)
    return AdamW8bit(
        trained,
        learning_rate=loop.learning_rate,
        betas=(loop.beta1, loop.beta2),
        eps=loop.eps,
        weight_decay=loop.weight_decay,
        paged=paged,
    )


def _save(
    model: Transformer,
    config: SFTConfig,
    out: Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    about: dict[str, Any],
) -> None:
    """The folder that other tools open; the chat template of training goes with it."""
    source = template.source if template is not None else None
    if config.lora is None:
        from ..base.checkpoint import write_json

        tokenizer.chat_template = source
        tokenizer.save(out)
        write_json(out / GRAFT, about)
        save_model(model.cpu(), out, dtype=None)
        return
    base = str(config.base.resolve()) if config.base.exists() else str(config.base)
    save_adapter(model, out, config.lora, base=base, graft=about, chat_template=source)
