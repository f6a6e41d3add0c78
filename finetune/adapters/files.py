"""An adapter on disk: a PEFT folder, read and written as it is, plus graft.json that other readers ignore."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...base.checkpoint import load_tensors, save_tensors, write_file, write_json
from ...base.hub import model_folder
from ...base.json_fields import read_json
from ...base.model.huggingface import WEIGHT_DTYPES
from .lora import DEFAULT, LoraConfig, linears, lora_layers
from .peft_config import check_config, is_target, rank_and_alpha

CONFIG, WEIGHTS, PICKLED, GRAFT, TEMPLATE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
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
    copies: dict[str, Tensor] = field(default_factory=dict)  # the base's own head or embedding, if PEFT saved them too

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for a, b, _ in self.layers.values() for t in (a, b))

    @property
    def ranks(self) -> list[int]:
        return sorted({a.shape[0] for a, _, _ in self.layers.values()})

    @property
    def template_args(self) -> dict[str, Any]:
        """What the chat template got in training beside the messages. Raises ValueError for a damaged graft.json."""
        return template_args_of(self.graft, self.where)

    @property
    def prompt_shape(self) -> dict[str, str] | None:
        """What stood before and after the part of a prompt that differs, {"before", "after"}; None where it isn't known."""
        shape = self.graft.get("prompt_shape")
        if shape is None:
            return None
        if not (isinstance(shape, dict) and all(isinstance(shape.get(side), str) for side in ("before", "after"))):
            raise ValueError(
                f"{self.where}/{GRAFT}: prompt_shape is {shape!r:.60}; expected an object with before and after"
            )
        return shape


def template_args_of(metadata: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """graft.json's template_args, {} without them. Raises ValueError for what is no object."""
    args = metadata.get("template_args") or {}
    if not isinstance(args, dict):
        raise ValueError(f"{where}/{GRAFT}: template_args is {args!r:.60}; expected an object")
    return args


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
    pairs, copies = _sorted_keys(load_tensors(folder / WEIGHTS), folder / WEIGHTS)
    layers = {}
    for path, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{folder / WEIGHTS}: {path} has only lora_{next(iter(pair))}; the file is incomplete")
        a, b = pair["A"], pair["B"]
        rank, alpha = rank_and_alpha(config, path)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] != rank:
            raise ValueError(
                f"{folder / WEIGHTS}: {path} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, but {CONFIG} gives it "
                f"rank {rank}; expected ({rank}, in) and (out, {rank})"
            )
        layers[path] = (a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank))
    if not layers:
        raise ValueError(f"{folder / WEIGHTS} holds no LoRA weight")
    template = folder / TEMPLATE
    return Adapter(
        layers,
        config,
        read_json(folder / GRAFT) if (folder / GRAFT).exists() else {},
        template.read_text(encoding="utf-8") if template.exists() else None,
        str(folder),
        copies,
    )


def _sorted_keys(tensors: Mapping[str, Tensor], file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A file's tensors as {path: {"A": ..., "B": ...}}, and the copies of the base's own weights by path."""
    pairs: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{file}: {key} holds {tensor.dtype}; expected float32, bfloat16, float16 or float64")
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {key} holds NaN or infinity; the training that wrote it diverged, train again")
        name = key.removeprefix(PREFIX).removesuffix(".weight")
        path, dot, side = name.rpartition(".lora_")
        if key == f"{PREFIX}{path}.lora_{side}.weight" and dot and side in ("A", "B"):
            pairs.setdefault(path, {})[side] = tensor
        elif key == f"{PREFIX}{name}.weight" and name.removesuffix(".base_layer").endswith(("lm_head", "embed_tokens")):
            copies[name.removesuffix(".base_layer")] = tensor
        else:
            raise ValueError(
                f"{file}: key {key!r} is not covered; graft reads {PREFIX}<path>.lora_A.weight and .lora_B.weight"
            )
    return pairs, copies


def check_fits(adapter: Adapter, model: nn.Module, *, fingerprint: str | None = None) -> None:
    """Raise ValueError when the adapter was made for another base or is incomplete.

    That is: unknown layers, other shapes, another fingerprint, weights that target_modules doesn't name (PEFT would ignore
    them) or that it names and the file lacks, and a copy of the base's weight that isn't equal to it.
    """
    for path, (a, b, _) in adapter.layers.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"adapter {adapter.where} is for another base: this one has no {path}") from None
        expected = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if expected != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"adapter {adapter.where} is for another base: {path} is {expected[0]} x {expected[1]} here, "
                f"{b.shape[0]} x {a.shape[1]} there"
            )
    made_for = adapter.graft.get("base_fingerprint")
    if made_for and fingerprint and made_for != fingerprint:
        raise ValueError(
            f"adapter {adapter.where} was trained on another base of the same shape "
            f"(fingerprint {made_for}, this base has {fingerprint}); load the base that it was made for"
        )
    named = {path for path, _ in linears(model) if is_target(adapter.config, path)}
    if surplus := sorted(set(adapter.layers) - named):
        raise ValueError(
            f"adapter {adapter.where} holds weights for {surplus[0]}, which its target_modules doesn't name, so PEFT would "
            f"ignore them; correct target_modules in {CONFIG}"
        )
    if missing := sorted(named - set(adapter.layers)):
        raise ValueError(
            f"adapter {adapter.where} is incomplete: its target_modules names {missing[0]}, for which {WEIGHTS} has no "
            f"weights; get the whole file, or correct target_modules in {CONFIG}"
        )
    for path, copy in adapter.copies.items():
        _check_copy(adapter, model, path, copy)


def _check_copy(adapter: Adapter, model: nn.Module, path: str, copy: Tensor) -> None:
    """PEFT saves the base's own weight beside an adapted head or embedding: it must be this base's."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"adapter {adapter.where} is for another base: this one has no {path}") from None
    weight = getattr(getattr(module, "base", module), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(
            f"adapter {adapter.where} holds a copy of {path}'s weight, which can't be compared with this base's, since "
            "that is quantized; use the base in full precision, or save the adapter with save_embedding_layers=False"
        )
    dtype = min(weight.dtype, copy.dtype, key=lambda dtype: dtype.itemsize)  # the base may have been loaded in less
    if weight.shape != copy.shape or not torch.equal(weight.detach().to(dtype).cpu(), copy.to(dtype)):
        raise ValueError(
            f"adapter {adapter.where} brings a {path} of its own ({' x '.join(map(str, copy.shape))}), which differs from this "
            "base's; load the base that it was made for, or, if it was trained too, merge that adapter in PEFT first"
        )


def stored_bytes(folder: Path | str) -> int:
    """Size of the adapter's weights on disk."""
    return (Path(folder) / WEIGHTS).stat().st_size


def as_dtype(adapter: Adapter, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The layers moved and converted for the base that they are used with."""
    return {path: (a.to(device, dtype), b.to(device, dtype), s) for path, (a, b, s) in adapter.layers.items()}
