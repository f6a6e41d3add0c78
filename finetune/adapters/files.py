"""An adapter on disk: a PEFT folder, read and written as it is, plus graft.json that other readers ignore."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...base.checkpoint import load_tensors, read_json, save_tensors, write_file, write_json
from .lora import DEFAULT, LoraConfig, linears, lora_layers

CONFIG, WEIGHTS, GRAFT, TEMPLATE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "graft.json",
    "chat_template.jinja",
)
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: for each adapted linear its A (R, in), B (out, R) and scale."""

    layers: dict[str, tuple[Tensor, Tensor, float]]
    config: dict[str, Any]  # adapter_config.json
    graft: dict[str, Any] = field(default_factory=dict)  # graft.json: base_fingerprint, prompt_format, ...
    chat_template: str | None = None
    where: str = ""

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for a, b, _ in self.layers.values() for t in (a, b))

    @property
    def ranks(self) -> list[int]:
        return sorted({a.shape[0] for a, _, _ in self.layers.values()})


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
    """Write one of the model's adapters as a PEFT folder. `base` is the base's folder or hub name, for PEFT to find it."""
    folder = Path(folder)
    layers = [(path, layer.updates[name]) for path, layer in lora_layers(model) if name in layer.updates]
    if not layers:
        raise ValueError(f"the model has no adapter {name!r} to save; call attach_lora first")
    tensors = {}
    for path, layer in layers:
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_a
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_b
    leaves = dict.fromkeys(path.rpartition(".")[2] for path, _ in layers)
    save_tensors(folder / WEIGHTS, tensors)
    if chat_template is not None:
        write_file(folder / TEMPLATE, chat_template)
    if graft is not None:
        write_json(folder / GRAFT, dict(graft))
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": config.rank,
            "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
            "lora_dropout": config.dropout,
            "target_modules": _target_modules(list(leaves), [path for path, _ in layers], model),
            "use_rslora": config.rank_stabilized,
            "use_dora": False,
            "bias": "none",
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
            "layers_to_transform": None,
            "layers_pattern": None,
            "revision": None,
        },
    )


def _target_modules(leaves: list[str], paths: list[str], model: nn.Module) -> list[str]:
    """Short names when they mean exactly these layers to PEFT, which matches by suffix; else the whole paths."""
    meant = {path for path, _ in linears(model) if path.rpartition(".")[2] in leaves}
    return leaves if meant == set(paths) else paths


def read_adapter(folder: Path | str) -> Adapter:
    """Read a PEFT LoRA folder. Raises FileNotFoundError, or ValueError for a kind of adapter that isn't covered."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"adapter folder {folder} does not exist")
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG}, so it is no adapter folder")
    config = read_json(folder / CONFIG)
    _refuse_uncovered(config, folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(folder / WEIGHTS).items():
        path, dot, side = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not dot or side not in ("A", "B"):
            raise ValueError(f"{folder / WEIGHTS}: key {key!r} is no LoRA weight; graft reads lora_A and lora_B only")
        pairs.setdefault(path, {})[side] = tensor
    layers = {}
    for path, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{folder / WEIGHTS}: {path} has only lora_{next(iter(pair))}; the file is incomplete")
        layers[path] = (pair["A"], pair["B"], _scale(config, path, pair["A"].shape[0]))
    if not layers:
        raise ValueError(f"{folder / WEIGHTS} holds no LoRA weight")
    template = folder / TEMPLATE
    return Adapter(
        layers,
        config,
        read_json(folder / GRAFT) if (folder / GRAFT).exists() else {},
        template.read_text(encoding="utf-8") if template.exists() else None,
        str(folder),
    )


def _refuse_uncovered(config: dict[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type {config.get('peft_type')!r} is not covered; graft reads LORA")
    for key, plain in (
        ("use_dora", (False, None)),
        ("bias", ("none", None)),
        ("modules_to_save", ([], None)),
        ("fan_in_fan_out", (False, None)),
        ("init_lora_weights", (True, False, None, "gaussian", "eva")),  # the others change the base's weights too
    ):
        if config.get(key) not in plain:
            raise ValueError(f"{folder}: {key}={config[key]!r} is not covered; merge that adapter in PEFT first")


def _scale(config: dict[str, Any], path: str, rank: int) -> float:
    """alpha / r (or / sqrt(r)) with PEFT's per-layer patterns: regular expressions that match the path's end, first hit."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def check_fits(adapter: Adapter, model: nn.Module, *, fingerprint: str | None = None) -> None:
    """Raise ValueError when the adapter was made for another base: unknown layers, other shapes, another fingerprint."""
    for path, (a, b, _) in adapter.layers.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"adapter {adapter.where} is for another base: this one has no {path}") from None
        due = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if due != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"adapter {adapter.where} is for another base: {path} is {due[0]} x {due[1]} here, "
                f"{b.shape[0]} x {a.shape[1]} there"
            )
    made_for = adapter.graft.get("base_fingerprint")
    if made_for and fingerprint and made_for != fingerprint:
        raise ValueError(
            f"adapter {adapter.where} was trained on another base of the same shape "
            f"(fingerprint {made_for}, this base has {fingerprint}); load the base that it was made for"
        )


def stored_bytes(folder: Path | str) -> int:
    """Size of the adapter's weights on disk."""
    return (Path(folder) / WEIGHTS).stat().st_size


def as_dtype(adapter: Adapter, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The layers moved and converted for the base that they are used with."""
    return {path: (a.to(device, dtype), b.to(device, dtype), s) for path, (a, b, s) in adapter.layers.items()}
