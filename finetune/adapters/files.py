"""An adapter on disk: a PEFT folder, read and written as it is, plus graft.json that other readers ignore.

The keys of its two files are peft_keys.py's and peft_config.py's; whether it fits a model is fits.py's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...base.checkpoint import load_tensors, save_tensors, write_file, write_json
from ...base.hub import model_folder
from ...base.json_fields import read_json
from .adapter import GRAFT, Adapter, template_args_of
from .config import DEFAULT, LoraConfig
from .fits import check_fits
from .lora import adapted_layers
from .peft_config import CONFIG, check_config, rank_and_alpha
from .peft_keys import WEIGHTS, sorted_keys, tensors_of
from .peft_written import peft_config_of

__all__ = [
    "CONFIG", "GRAFT", "WEIGHTS", "Adapter", "check_fits", "read_adapter", "save_adapter", "stored_bytes", "template_args_of",
]  # fmt: skip

PICKLED, TEMPLATE = "adapter_model.bin", "chat_template.jinja"


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    config: LoraConfig,
    *,
    base: str,
    name: str = DEFAULT,
    graft: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> None:
    """Write one of the model's adapters as a PEFT folder. `base` is the base's folder or hub name, for PEFT to find it.

    A bottleneck has no layout in PEFT: its folder has the same files, with peft_type BOTTLENECK.
    """
    folder = Path(folder)
    layers = {path: layer.updates[name] for path, layer in adapted_layers(model) if name in layer.updates}
    if not layers:
        raise ValueError(f"the model has no adapter {name!r} to save; call attach_lora first")
    save_tensors(folder / WEIGHTS, tensors_of(layers))
    if chat_template is not None:
        write_file(folder / TEMPLATE, chat_template)
    if graft is not None:
        write_json(folder / GRAFT, dict(graft))
    write_json(folder / CONFIG, peft_config_of(config, layers, model, base=base))


def read_adapter(folder: Path | str) -> Adapter:
    """Read a PEFT LoRA folder, or that of a Hugging Face id.

    Raises FileNotFoundError, or ValueError for what isn't covered or is broken.

    Accepted is only what gives here what PEFT gives: see peft_config.py for the options. NaN and infinity are refused.
    """
    folder = model_folder(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"adapter folder {folder} does not exist")
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG}, so it is no adapter folder")
    config = read_json(folder / CONFIG)
    check_config(config, where=str(folder / CONFIG))
    if not (folder / WEIGHTS).exists() and (folder / PICKLED).exists():
        raise ValueError(
            f"{folder} has {PICKLED}, a pickle, which can run any code when it is opened, so graft doesn't; "
            f"save the adapter again with PEFT's save_pretrained, which writes {WEIGHTS}"
        )
    file = folder / WEIGHTS
    parts = sorted_keys(load_tensors(file), config, file)
    template = folder / TEMPLATE
    return Adapter(
        layers=_layers_of(parts.pairs, config, file),
        config=config,
        graft=read_json(folder / GRAFT) if (folder / GRAFT).exists() else {},
        chat_template=template.read_text(encoding="utf-8") if template.exists() else None,
        where=str(folder),
        copies=parts.copies,
        magnitudes=parts.magnitudes,
        modules=parts.modules,
        token_rows=parts.token_rows,
        prefix=parts.prefix,
        bottlenecks=parts.bottlenecks,
    )


def _layers_of(
    pairs: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], file: Path
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The pairs of A and B by path, with their scale; raises ValueError for half a pair and for shapes that don't fit."""
    layers = {}
    for path, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{file}: {path} has only lora_{next(iter(pair))}; the file is incomplete")
        a, b = pair["A"], pair["B"]
        rank, alpha = rank_and_alpha(config, path)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] != rank:
            raise ValueError(
                f"{file}: {path} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, but {CONFIG} gives it "
                f"rank {rank}; expected ({rank}, in) and (out, {rank})"
            )
        layers[path] = (a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank))
    if not layers and config["peft_type"] == "LORA":
        raise ValueError(f"{file} holds no LoRA weight")
    return layers


def stored_bytes(folder: Path | str) -> int:
    """Size of the adapter's weights on disk."""
    return (Path(folder) / WEIGHTS).stat().st_size
