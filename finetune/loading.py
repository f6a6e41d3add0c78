"""A base from disk, in full precision or in 4 bits: the one `load_model` that users call."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from ..base.device import resolve_device
from ..base.dtypes import dtype_named
from ..base.hub import model_folder
from ..base.json_fields import read_json
from ..base.model.config import ModelConfig
from ..base.model.huggingface import (
    empty_model,
    iterate_weights,
    load_config,
    load_weights,
    save_model,
    weight_files,
    write_config,
    write_weights,
)
from ..base.model.transformer import Transformer
from ..base.tokenizer.tokenizer import Tokenizer
from ..quant.files import read_quantization_config
from ..quant.linear import module_names, quantize_linears_
from ..quant.streaming import WeightStream


def load_model(
    folder: Path | str,
    *,
    dtype: str | None = "float32",  # of what is not quantized, and of the arithmetic; None keeps the file's
    device: str = "cpu",
    quantize: Literal["nf4"] | None = None,  # turn a full-precision folder's linears to NF4 as they stream in
    double_quant: bool = True,
) -> Transformer:
    """A model folder or Hugging Face id (org/name, org/name@revision) -> a model in eval mode.

    model(ids (B, T) int64) -> logits (B, T, V).

    A folder in 4 bits (its config.json has quantization_config) is loaded in 4 bits. At no time is more than one tensor
    held beside the model, so the full-precision model never exists. Raises FileNotFoundError or ValueError for a folder
    that is missing, broken or of an unknown architecture.
    """
    device, folder = resolve_device(device), model_folder(folder)
    model = empty_model(load_config(folder))
    config_file = Path(folder) / "config.json"
    try:
        stored = read_quantization_config(read_json(config_file))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    stream = None
    if stored is not None:
        # The arithmetic is in `dtype`, as everywhere else, whatever the file's author computed in.
        stored["compute_dtype"] = None
        known = module_names(model)
        stored["keep"] = tuple(name for name in stored["keep"] if name in known)  # files name other architectures' too
        quantize_linears_(model, **stored)
    elif quantize is not None:
        quantize_linears_(model, double_quant=double_quant, quant_type=quantize)
    if stored is not None or quantize is not None:
        stream = WeightStream(model, device=device)
    weights = iterate_weights(folder)
    load_weights(
        model,
        weights if stream is None else _checked(weights, stream, folder),
        dtype=dtype_named(dtype) if dtype else None,
        device=device,
        where=str(folder),
        take=None if stream is None else _named_take(stream, folder),
    )
    return model.eval()


def _named_take(stream: WeightStream, folder: Path | str) -> Callable[[str, Tensor], bool]:
    """stream.take, whose errors also name the folder."""

    def take(name: str, tensor: Tensor) -> bool:
        try:
            return stream.take(name, tensor)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    return take


def _checked(
    weights: Iterator[tuple[str, Tensor]], stream: WeightStream, folder: Path | str
) -> Iterator[tuple[str, Tensor]]:
    """The weights, and at their end an error by the file's own keys when one of a 4-bit layer has not come."""
    yield from weights
    try:
        stream.finish()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def check_token_ids(tokenizer: Tokenizer, config: ModelConfig, *, where: Path | str = "this base") -> None:
    """Raise ValueError for a token or a special id beyond the embedding's rows, which would fail at the first such text.

    Every command calls it once it has loaded a base's tokenizer and config. More rows than tokens are fine: many bases
    pad their embedding.
    """
    rows = config.vocab_size
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    special = [("bos_token_id", config.bos_token_id), ("pad_token_id", config.pad_token_id)]
    special += [("eos_token_id", end) for end in ends]
    named = [(f"config.json's {key}", index) for key, index in special if index is not None]
    named += [(f"token {content!r}", index) for content, index in tokenizer.special_tokens.items()]
    named.append(("the tokenizer's last token", max(tokenizer.vocab)))
    for name, index in named:
        if not 0 <= index < rows:
            raise ValueError(
                f"{where}: {name} has id {index}, but the embedding has {rows} rows (ids 0 to {rows - 1}); "
                "take the tokenizer that belongs to these weights, or a base whose embedding was enlarged for it"
            )


def check_finite(model: torch.nn.Module, *, where: Path | str = "this base") -> None:
    """Raise ValueError for a weight that holds NaN or infinity: every answer would be made of it, without a word."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{where}: {name} holds NaN or infinity; the training that wrote it diverged or the file is damaged, so take "
                "an earlier checkpoint, or fetch it again"
            )


def weight_reader(folder: Path | str) -> Callable[[str], Tensor]:
    """read(name) -> one weight of a model folder in full precision, read when it is asked for."""
    file_of: dict[str, Path] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            file_of |= dict.fromkeys(opened.keys(), file)

    def read(name: str) -> Tensor:
        if name not in file_of:
            raise ValueError(f"{folder} has no weight named {name}, so it can't be calibrated; leave calibrate out")
        with safe_open(file_of[name], framework="pt") as opened:
            return opened.get_tensor(name)

    return read


def save_any(model: Transformer, folder: Path | str, *, stored: dict[str, Any] | None) -> None:
    """Write a model folder; `stored` is its config.json's quantization_config when its linears are in 4 bits."""
    if stored is None:
        save_model(model, folder)
        return
    folder = Path(folder)
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_embeddings)
    }
    write_weights(folder, tensors, model.config)
    write_config(
        model.config, folder, dtype=model.model.embed_tokens.weight.dtype, extra={"quantization_config": stored}
    )


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    seen = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]
    }
    return sum(seen.values())
