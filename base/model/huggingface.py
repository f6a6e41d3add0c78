"""A base on disk: a Hugging Face model folder, read and written as it is. The one place that knows its config keys.

Covers LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM with the silu activation.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checkpoint import iterate_tensors, save_tensors, write_json
from ..dtypes import dtype_named
from ..json_fields import read_json
from .config import ModelConfig, RopeScaling
from .transformer import Transformer

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
SHARD_BYTES = 5_000_000_000  # Hugging Face's own limit per file


def config_from_dict(found: dict[str, Any], *, where: str = "config.json") -> ModelConfig:
    """A config.json's dict -> ModelConfig. Raises ValueError for an architecture or a feature that isn't covered."""
    names = found.get("architectures") or []
    architecture = names[0] if names else None
    model_type = found.get("model_type") or (ARCHITECTURES.get(architecture) if architecture else None)
    if model_type not in ARCHITECTURES.values() or (architecture and architecture not in ARCHITECTURES):
        raise ValueError(
            f"{where}: architecture {architecture or model_type!r} is not known; graft reads {', '.join(ARCHITECTURES)}"
        )
    missing = [
        key
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if key not in found
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; is it a whole model's config?")
    if found.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(
            f"{where}: hidden_act {found['hidden_act']!r} is not covered; graft's feed-forward is silu-gated"
        )
    _refuse_uncovered(found, model_type, where)
    n_heads = found["num_attention_heads"]
    bias = bool(found.get("attention_bias", model_type == "qwen2"))
    window, sliding = _windows(found, model_type, where)
    eos = found.get("eos_token_id")
    return ModelConfig(
        vocab_size=found["vocab_size"],
        d_model=found["hidden_size"],
        n_layers=found["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=found.get("num_key_value_heads") or n_heads,
        d_head=found.get("head_dim") or found["hidden_size"] // n_heads,
        d_ff=found["intermediate_size"],
        max_seq_len=found.get("max_position_embeddings", 2048),
        rope_theta=_rope_theta(found),
        rope_scaling=_rope_scaling(found, where),
        norm_eps=found.get("rms_norm_eps", 1e-6),
        qk_norm=model_type == "qwen3",
        tie_embeddings=bool(found.get("tie_word_embeddings", False)),
        attention_bias=bias,
        attention_out_bias=bias and model_type != "qwen2",
        mlp_bias=bool(found.get("mlp_bias", False)),
        sliding_window=window,
        sliding_layers=sliding,
        init_std=found.get("initializer_range", 0.02),
        bos_token_id=found.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=found.get("pad_token_id"),
    )


def _refuse_uncovered(found: dict[str, Any], model_type: str | None, where: str) -> None:
    """Features that would be computed wrongly in silence."""
    if found.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError(f"{where}: partial_rotary_factor {found['partial_rotary_factor']} is not covered, only 1")


def _windows(found: dict[str, Any], model_type: str | None, where: str) -> tuple[int | None, tuple[bool, ...] | None]:
    """(sliding_window, sliding_layers) as transformers reads them.

    Mistral: the window on every layer. Qwen2 and Qwen3: only with use_sliding_window, on the layers from max_window_layers on,
    unless layer_types says for each layer what it is.
    """
    window, types = found.get("sliding_window"), found.get("layer_types")
    n_layers = found["num_hidden_layers"]
    if types is not None:
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != n_layers:
            raise ValueError(
                f"{where}: layer_types names {len(types)} layers of kinds {sorted(set(types))}; graft covers full_attention and "
                f"sliding_attention, one for each of the {n_layers} layers"
            )
    if model_type in ("qwen2", "qwen3"):
        if not found.get("use_sliding_window", False) or window is None:
            if types is not None and "sliding_attention" in types:
                raise ValueError(
                    f"{where}: layer_types has sliding_attention, but use_sliding_window is off; say one of them"
                )
            return None, None
        if types is None:
            first = found.get("max_window_layers", 28)
            types = ["sliding_attention" if i >= first else "full_attention" for i in range(n_layers)]
    if window is None or types is None:
        return window, None
    slides = tuple(kind == "sliding_attention" for kind in types)
    if not any(slides):
        return None, None
    return window, None if all(slides) else slides


def _rope_theta(found: dict[str, Any]) -> float:
    newer = found.get("rope_parameters") or {}
    return float(newer.get("rope_theta", found.get("rope_theta", 10_000.0)))


def _rope_scaling(found: dict[str, Any], where: str) -> RopeScaling:
    """Newer files say `rope_parameters`, older ones `rope_scaling` with `rope_type` or `type`."""
    scaling = found.get("rope_parameters") or found.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    try:
        return RopeScaling(
            rope_type=kind,
            factor=float(scaling.get("factor", 1.0)),
            low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
            high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
            original_max_seq_len=int(scaling.get("original_max_position_embeddings", 8192)),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def config_to_dict(config: ModelConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """ModelConfig -> config.json's dict, with the keys of both older and newer readers."""
    if config.qk_norm:
        architecture = "Qwen3ForCausalLM"
    elif config.attention_bias and not config.attention_out_bias:
        architecture = "Qwen2ForCausalLM"
    elif config.sliding_window is not None:
        architecture = "MistralForCausalLM"
    else:
        architecture = "LlamaForCausalLM"
    scaling: dict[str, Any] = {"rope_type": config.rope_scaling.rope_type}
    if scaling["rope_type"] != "default":
        scaling["factor"] = config.rope_scaling.factor
    if scaling["rope_type"] == "llama3":
        scaling |= {
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
        }
    plain = not (config.attention_bias or config.attention_out_bias or config.mlp_bias)
    as_qwen2 = config.attention_bias and not config.attention_out_bias and not config.mlp_bias
    same_attention_bias = config.attention_bias == config.attention_out_bias
    fits = {
        "Qwen3ForCausalLM": same_attention_bias and not config.mlp_bias,
        "Qwen2ForCausalLM": as_qwen2,
        "MistralForCausalLM": plain,
        "LlamaForCausalLM": same_attention_bias,
    }
    if not fits[architecture]:
        raise ValueError(
            f"no known architecture has qk_norm={config.qk_norm}, attention_bias={config.attention_bias}, "
            f"attention_out_bias={config.attention_out_bias}, mlp_bias={config.mlp_bias} together; leave the biases out"
        )
    name = str(dtype).removeprefix("torch.")
    found: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "use_cache": True,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": name,
        "dtype": name,
    }
    if config.sliding_window is not None:
        found |= {"sliding_window": config.sliding_window}
        if architecture != "MistralForCausalLM":
            found |= {"use_sliding_window": True, "max_window_layers": 0}
        if config.sliding_layers is not None:
            if architecture == "MistralForCausalLM":
                raise ValueError(
                    "no known architecture has a window on some layers without QK-norm and biases; use all or none"
                )
            kinds = ["sliding_attention" if slides else "full_attention" for slides in config.sliding_layers]
            found |= {"layer_types": kinds, "max_window_layers": config.n_layers}
    return found


def load_config(folder: Path | str) -> ModelConfig:
    """Read a model folder's config.json, and from generation_config.json what else ends a text.

    Chat models list the end of a turn there, and the end of a document alone in config.json.
    """
    path = _model_folder(folder) / "config.json"
    config = config_from_dict(read_json(path), where=str(path))
    generation = Path(folder) / "generation_config.json"
    if not generation.exists():
        return config
    ends = [config.eos_token_id, read_json(generation).get("eos_token_id")]
    ids = [one for end in ends if end is not None for one in (end if isinstance(end, list | tuple) else [end])]
    if wrong := [one for one in ids if type(one) is not int]:
        raise ValueError(f"{generation}: eos_token_id {wrong[0]!r} is no id; a whole number or a list of them is due")
    unique = tuple(dict.fromkeys(ids))
    return replace(config, eos_token_id=unique if len(unique) > 1 else next(iter(unique), None))


def _model_folder(folder: Path | str) -> Path:
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a model folder with config.json and model.safetensors is due")
    if not (folder / "config.json").exists():
        hint = (
            "; the run there is not finished: go on with graft pretrain --resume"
            if (folder / "run.json").exists()
            else ""
        )
        raise FileNotFoundError(f"{folder} has no config.json, so it is no model folder{hint}")
    return folder


def weight_files(folder: Path | str) -> list[Path]:
    """The folder's safetensors files in order. Raises FileNotFoundError that says which is missing."""
    folder = _model_folder(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    elif single.exists():
        files = [single]
    elif list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise FileNotFoundError(
            f"{folder} holds pickled weights only; graft never loads pickle: convert to safetensors"
        )
    else:
        raise FileNotFoundError(f"{folder} has no model.safetensors")
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is named in {index.name} but missing; copy or download it again")
    return files


def iterate_weights(folder: Path | str, *, device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Every (key on disk, tensor) of a model folder, one at a time."""
    for file in weight_files(folder):
        yield from iterate_tensors(file, device=device)


def empty_model(config: ModelConfig) -> Transformer:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"), _WithoutInit():
        return Transformer(config)


class _WithoutInit(TorchFunctionMode):
    """New modules leave their weights as they are. On meta tensors torch.nn.init.normal_ imports sympy and torch._dynamo, which
    takes as long as importing torch."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def place_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where `name` says, replacing a meta parameter. Raises ValueError for unknown names or other shapes."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        old = module._parameters[leaf]
    except (AttributeError, KeyError):
        raise ValueError(
            f"weight {name!r} belongs to no module of this model; does config.json fit the weights?"
        ) from None
    if old is None or old.shape != tensor.shape:
        due = None if old is None else tuple(old.shape)
        raise ValueError(f"weight {name} has shape {tuple(tensor.shape)}, config.json asks for {due}")
    module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)


def load_weights(
    model: Transformer,
    weights: Iterator[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None,  # None keeps the file's
    device: torch.device | str,
    where: str,
    take: Callable[[str, Tensor], bool] | None = None,  # a caller that places a weight itself returns True
) -> None:
    """Fill a meta model from (name, tensor) pairs. Raises ValueError that names weights which are missing."""
    for name, tensor in weights:
        if name == "model.embed_tokens.weight":
            model.fingerprint = fingerprint_of(model.config, tensor)
        if take is not None and take(name, tensor):
            continue
        if name.endswith("rotary_emb.inv_freq"):  # older Llama files keep a table that follows from the config
            continue
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        place_parameter(model, name, tensor.to(device=device, dtype=dtype or tensor.dtype))
    if model.config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    missing = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{where} lacks the weights {', '.join(missing[:3])}{rest}; the folder is incomplete")


def load_full_precision(
    folder: Path | str, *, dtype: str | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """Load a folder's weights as they are, in eval mode. Never holds more than one tensor beside the model."""
    model = empty_model(load_config(folder))
    load_weights(
        model,
        iterate_weights(folder),
        dtype=dtype_named(dtype) if dtype else None,
        device=device,
        where=str(folder),
    )
    return model.eval()


def save_model(model: Transformer, folder: Path | str, *, dtype: str | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors (in shards above 5 GB) that transformers opens.

    dtype: the precision on disk, by default the weights' own. The tokenizer is saved by its own class.
    """
    folder = Path(folder)
    target = dtype_named(dtype) if dtype else next(model.parameters()).dtype
    tensors = {
        name: tensor.detach().to(target)
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_embeddings)
    }
    write_weights(folder, tensors)
    write_config(model.config, folder, dtype=target)


def write_config(config: ModelConfig, folder: Path, *, dtype: torch.dtype, extra: dict[str, Any] | None = None) -> None:
    """config.json (with `extra` keys, such as quantization_config) and generation_config.json."""
    found = config_to_dict(config, dtype=dtype)
    write_json(folder / "config.json", found | (extra or {}))
    generation = {key: found[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if found[key] is not None}
    write_json(folder / "generation_config.json", generation)


def write_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    """model.safetensors, or numbered shards with an index when it would pass SHARD_BYTES."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        n_bytes = tensor.numel() * tensor.element_size()
        if size + n_bytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += n_bytes
    if len(shards) == 1:
        save_tensors(folder / "model.safetensors", shards[0])
        # An index of a former, larger model would be read in place of this file.
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def fingerprint(model: Transformer) -> str:
    """A short name for these very weights: SHA-256 over the config's sizes and a sample of the embedding's values.

    Of a loaded model it is that of the file, whatever dtype it was loaded in. An adapter keeps its base's, so that it is
    refused on another base of the same shape. The embedding is sampled (and rounded to bfloat16) because it is never
    quantized: the same base in 4 bits has the same fingerprint.
    """
    return model.fingerprint or fingerprint_of(model.config, model.model.embed_tokens.weight.detach())


def fingerprint_of(config: ModelConfig, weight: Tensor) -> str:
    """`fingerprint` from the embedding (V, D)."""
    c = config
    rows = torch.linspace(0, weight.shape[0] - 1, min(64, weight.shape[0])).long().to(weight.device)
    sample = weight[rows].to(torch.bfloat16).float().cpu().contiguous().numpy()
    shape = f"{c.vocab_size} {c.d_model} {c.n_layers} {c.n_heads} {c.n_kv_heads} {c.d_head} {c.d_ff}"
    return hashlib.sha256(shape.encode() + sample.tobytes()).hexdigest()[:16]
