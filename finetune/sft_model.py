"""The base as a method of fine-tuning wants it, and the folder that is left of it."""

import sys
from pathlib import Path
from typing import Any

from ..base.checkpoint import write_json
from ..base.hub import name_of
from ..base.json_fields import read_json
from ..base.model.huggingface import save_model
from ..base.model.transformer import Transformer
from ..base.run import Run
from ..base.tokenizer.tokenizer import Tokenizer
from ..quant.files import read_quantization_config
from ..quant.linear import quantize_linears_
from .adapters.attach import attach_adapter
from .adapters.files import GRAFT, save_adapter
from .data.chat import ChatTemplate
from .data.stop import write_endings
from .folders import carry_over
from .loading import load_model
from .quantize import calibrate_model_, rows_of_text


def stored_in_4_bits(config: Run) -> dict[str, Any] | None:
    """How the base's linears are quantized on disk, or None; refuses options that don't go together or with such a base."""
    base = config.inputs["base"].path
    stored = read_quantization_config(read_json(base / "config.json"))
    backend = config.quant.quant_backend
    if stored and config.method == "full":
        raise ValueError(f"{base} is in 4 bits and can't be fully fine-tuned; use --qlora, or its full base")
    if backend != "graft" and config.method != "qlora":
        raise ValueError(f"quant_backend={backend} is about QLoRA; add --qlora, or leave it out")
    if config.quant.calibrate and (config.method != "qlora" or stored or backend != "graft"):
        reason = f"{base} is in 4 bits already" if stored else "it chooses the codes of QLoRA's base"
        raise ValueError(
            f"calibrate={config.quant.calibrate}: {reason}; give a full-precision base with --qlora, or leave it out"
        )
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
        for note in (experts_left_out(model, config.method), linear_layers_left_out(model)):
            if note:
                print(note, file=sys.stderr)
    return model


def experts_left_out(model: Transformer, method: str) -> str | None:
    """What a user should know of a mixture's experts, whose stacked weights are no linears; None without a mixture."""
    n = sum(tensor.numel() for name, tensor in model.named_parameters() if ".mlp.experts." in name)
    if not n:
        return None
    bits = " and are not stored in 4 bits" if method == "qlora" else ""
    return f"note: the experts' {n:,} weights get no adapter{bits}; attention and shared feed-forward layers do"


def linear_layers_left_out(model: Transformer) -> str | None:
    """What a user should know where no adapter acts in the linear attention layers; None where one does, or there are none."""
    n = model.config.n_linear_layers
    if not n or any(".linear_attn." in name for name, p in model.named_parameters() if p.requires_grad):
        return None
    return (
        f"note: the {n} linear attention layers' projections get no adapter; to train them too, name in_proj_qkvz, in_proj_ba "
        "and out_proj in targets, or all-linear"
    )


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
        if config.quant.calibrate and quantize:
            rows = rows_of_text(Tokenizer.load(base), Path(config.quant.calibrate), model.config.max_seq_len)
            calibrate_model_(model, base, rows)
        if is_peer:  # bitsandbytes quantizes whole layers, so the base is held in full precision first
            double_quant, backend = config.quant.double_quant, config.quant.quant_backend
            quantize_linears_(model, double_quant=double_quant, backend=backend)
    model.checkpointing, model.recompute_layers = config.train.checkpointing, config.train.recompute_layers
    return model


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
    name = name_of(base) or str(base.resolve() if base.exists() else base)
    save_adapter(model, folder, config.lora, base=name, graft=metadata, chat_template=source)
