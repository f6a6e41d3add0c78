"""`graft pretrain`: token shards -> a base folder that transformers opens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .data.batches import WindowBatches, evaluation_batches
from .data.shards import TokenShards, open_tokens
from .device import peak_bytes, reset_peak, resolve_device
from .evaluate import bits_per_byte, mean_loss
from .model.config import ModelConfig, preset, with_sizes
from .model.huggingface import config_to_dict, save_model
from .model.transformer import Transformer, initialize_
from .progress import step_progress
from .runlog import RunFolder
from .settings import check_settings, split_settings
from .tokenizer.tokenizer import Tokenizer
from .train import NOT_FOR_PRETRAINING, TrainConfig, make_optimizer, train

# What may change between a run and its resumption (`steps` moves the rest of the cosine: that is asked for).
RESUMABLE = {"checkpoint_every", "eval_every", "eval_batches", "steps"}


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides a pretraining run; saved as run.json's `config`."""

    data: Path  # folder of token shards, from graft data prepare
    tokenizer: Path  # folder of tokenizer.json
    out: Path
    model: ModelConfig
    train: TrainConfig


def resolve(
    settings: Mapping[str, Any], *, data: Path, tokenizer: Path, out: Path, preset_name: str | None, vocab_size: int
) -> PretrainConfig:
    """Preset + settings (from TOML and --set) -> one config. Raises ValueError for unknown keys and sizes that don't fit."""
    checked = check_settings(settings, ModelConfig, TrainConfig)
    if checked.get("optimizer") == "adamw8bit":
        raise ValueError(NOT_FOR_PRETRAINING)
    sizes, loop = split_settings(checked, ModelConfig, TrainConfig)
    if sizes.pop("vocab_size", vocab_size) != vocab_size:
        raise ValueError(f"vocab_size={checked['vocab_size']} differs from the tokenizer's {vocab_size}; leave it out")
    config = with_sizes(replace(preset(preset_name or "micro"), vocab_size=vocab_size), **sizes)
    config_to_dict(config, dtype=torch.float32)  # raises for switches that no architecture has together
    return PretrainConfig(data, tokenizer, out, config, TrainConfig(**loop))


def run_pretrain(
    *,
    data: Path | str,
    tokenizer: Path | str,
    out: Path | str,
    preset_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: bool = True,
    predict: Callable[[ModelConfig, TrainConfig, str], int] | None = None,  # says the peak memory in bytes beforehand
) -> dict[str, Any]:
    """Pretrain a Transformer on shards and leave a base folder in `out`; returns the summary.

    The result depends on the config and the seed only: a run that was killed and resumed ends with the same weights.
    Raises ValueError or OSError for bad input, Interrupted after a signal.
    """
    device = resolve_device(device)
    tok = Tokenizer.load(tokenizer)
    train_tokens, val_tokens = open_tokens(data, "train"), open_tokens(data, "val")
    if train_tokens.meta["tokenizer"] != tok.fingerprint():
        raise ValueError(f"{data} was prepared with another tokenizer than {tokenizer}; run graft data prepare again")
    with RunFolder(out, stage="pretrain", resume=resume, force=force) as run:
        settings = dict(settings or {})
        if run.previous:
            saved = run.previous["config"]
            same_input(saved, data=data, tokenizer=tokenizer)
            if preset_name is not None:
                raise ValueError(
                    f"--resume goes on with the run's own model, asked was preset {preset_name}; leave it out"
                )
            settings = resumed_settings(settings, saved)
        config = resolve(
            settings,
            data=Path(data),
            tokenizer=Path(tokenizer),
            out=Path(out),
            preset_name=preset_name,
            vocab_size=tok.vocab_size,
        )
        config = replace(config, model=with_special_ids(config.model, tok))
        loop = config.train
        batches = WindowBatches(
            train_tokens,
            seq_len=config.model.max_seq_len,
            batch_size=loop.batch_size,
            micro_batch=loop.micro_batch,
            seed=loop.seed,
        )
        predicted = predict(config.model, loop, device) if predict else None
        model = Transformer(config.model).to(device)
        initialize_(model, seed=loop.seed)
        model.checkpointing = loop.checkpointing
        reset_peak(device)
        result = _train(model, config, batches, val_tokens, run, device, progress)
        save_model(model.cpu(), config.out)
        tok.save(config.out)
        summary = {
            "n_params": config.model.n_params,
            "steps": result.steps,
            "train_loss": result.loss,
            **(result.evals[-1] if result.evals else {}),
            "n_train_tokens": len(train_tokens),
            "tokens_read": loop.steps * loop.batch_size * config.model.max_seq_len,
            "seconds": round(result.seconds, 2),
            "tokens_per_s": round(result.n_tokens / result.seconds, 1) if result.seconds else None,
            "predicted_peak_bytes": predicted,
            **peak_bytes(device),
            "device": device,
        }
        run.finish(summary)
        return summary


def _train(
    model: Transformer,
    config: PretrainConfig,
    batches: WindowBatches,
    val_tokens: TokenShards,
    run: RunFolder,
    device: str,
    progress: bool,
) -> Any:
    loop, seq_len = config.train, config.model.max_seq_len
    held_out = evaluation_batches(val_tokens, seq_len=seq_len, batch_size=loop.batch_size, n_batches=loop.eval_batches)

    def evaluate() -> dict[str, float]:
        loss = mean_loss(model, held_out, dtype=loop.dtype, device=device)
        bpb = bits_per_byte(loss, n_tokens=len(val_tokens), n_bytes=val_tokens.n_bytes)
        return {"val_loss": loss, "val_bits_per_byte": bpb}

    optimizer = make_optimizer(model.named_parameters(), loop)
    # From here on nothing is refused any more: now a run that is started over may lose its log.
    run.start(
        {"data": config.data, "tokenizer": config.tokenizer, "model": config.model, "train": loop}, seed=loop.seed
    )
    with step_progress("pretrain", loop.steps, shown=progress) as observe:
        return train(
            model,
            optimizer,
            batches.batch_at,
            loop,
            run,
            evaluate=evaluate if held_out else None,
            on_step=observe,
            device=device,
        )


def with_special_ids(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The tokenizer's bos, eos and pad ids, which config.json repeats for generation."""
    return replace(
        config,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def same_input(saved: Mapping[str, Any], **asked: Path | str) -> None:
    """Raise ValueError when a resumed run is given another file or folder than it was started with."""
    for name, path in asked.items():
        if Path(saved[name]).resolve() != Path(path).resolve():
            raise ValueError(f"--resume goes on with {name} {saved[name]}, asked was {path}; give the same")


def resumed_settings(asked: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved run's settings, with what may change taken from `asked`.

    Raises ValueError when something is asked for that would make it another run.
    """
    flat = {**saved["model"], **saved["train"]}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        flat.pop(key, None)
    for key, value in asked.items():
        if key in flat and flat[key] != value and key not in RESUMABLE:
            raise ValueError(
                f"--resume goes on with {key}={flat[key]!r}, asked was {value!r}; leave it out, or --force a new run"
            )
        flat[key] = value
    return flat
