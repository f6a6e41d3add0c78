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
from ..json_fields import check, field, read_json
from .config import LARGEST, ModelConfig, RopeScaling
from .transformer import Transformer

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARD_BYTES = 5_000_000_000  # Hugging Face's own limit per file


def config_from_dict(raw_config: dict[str, Any], *, where: str = "config.json") -> ModelConfig:
    """A config.json's dict -> ModelConfig. Raises ValueError for an architecture, a feature or a value that isn't covered."""

    def get(key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        return field(raw_config, key, kind, where, default=default)

    names = get("architectures", list, [])
    architecture = check(names[0], str, f"{where}: architectures") if names else None
    model_type = get("model_type", str) or (ARCHITECTURES.get(architecture) if architecture else None)
    if model_type not in ARCHITECTURES.values() or (architecture and architecture not in ARCHITECTURES):
        raise ValueError(
            f"{where}: architecture {architecture or model_type!r} is not known; graft reads {', '.join(ARCHITECTURES)}"
        )
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in sizes if key not in raw_config]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; is it a whole model's config?")
    vocab_size, d_model, d_ff, n_layers, n_heads = (field(raw_config, key, int, where) for key in sizes)
    if get("hidden_act", str, "silu") not in ("silu", "swish"):
        raise ValueError(
            f"{where}: hidden_act {raw_config['hidden_act']!r} is not covered; graft's feed-forward is silu-gated"
        )
    if n_heads < 1:
        raise ValueError(f"{where}: num_attention_heads={n_heads} must be >= 1")
    _refuse_uncovered(raw_config, where)
    bias = get("attention_bias", bool, model_type == "qwen2")
    try:
        window, sliding = _windows(raw_config, model_type, n_layers, where)
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=get("num_key_value_heads", int, n_heads),
            d_head=get("head_dim", int, d_model // n_heads),
            d_ff=d_ff,
            max_seq_len=get("max_position_embeddings", int, 2048),
            rope_theta=_rope_theta(raw_config, where),
            rope_scaling=_rope_scaling(raw_config, where),
            norm_eps=_number(raw_config, "rms_norm_eps", where, 1e-6),
            qk_norm=model_type == "qwen3",
            tie_embeddings=get("tie_word_embeddings", bool, False),
            attention_bias=bias,
            attention_out_bias=bias and model_type != "qwen2",
            mlp_bias=get("mlp_bias", bool, False),
            sliding_window=window,
            sliding_layers=sliding,
            init_std=_number(raw_config, "initializer_range", where, 0.02),
            bos_token_id=get("bos_token_id", int),
            eos_token_id=_end_ids(raw_config, where),
            pad_token_id=get("pad_token_id", int),
        )
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _end_ids(section: dict[str, Any], where: object) -> int | tuple[int, ...] | None:
    """eos_token_id, which may be missing, one id or a list."""
    value = field(section, "eos_token_id", (int, list), where, default=None)
    if not isinstance(value, list):
        return value
    return tuple(check(one, int, f"{where}: an id of eos_token_id") for one in value)


def _number(section: dict[str, Any], key: str, where: object, default: float) -> float:
    """A number as a float. JSON's whole numbers have no bound, floats do."""
    value = field(section, key, float, where, default=default)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where}: {key} is too large for a float") from None


def _refuse_uncovered(raw_config: dict[str, Any], where: str) -> None:
    """Features that would be computed wrongly in silence."""
    if raw_config.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError(f"{where}: partial_rotary_factor {raw_config['partial_rotary_factor']} is not covered, only 1")


def _windows(
    raw_config: dict[str, Any], model_type: str | None, n_layers: int, where: str
) -> tuple[int | None, tuple[bool, ...] | None]:
    """(sliding_window, sliding_layers) as transformers reads them.

    Mistral: the window on every layer. Qwen2 and Qwen3: only with use_sliding_window, on the layers from max_window_layers on,
    unless layer_types says for each layer what it is.
    """
    window = field(raw_config, "sliding_window", int, where, default=None)
    types = field(raw_config, "layer_types", list, where, default=None)
    if types is not None:
        unknown = {str(kind) for kind in types} - {"full_attention", "sliding_attention"}
        if unknown or len(types) != n_layers:
            kinds = sorted({str(kind)[:40] for kind in types})[:8]
            raise ValueError(
                f"{where}: layer_types names {len(types)} layers of kinds {kinds}; graft covers full_attention and "
                f"sliding_attention, one for each of the {n_layers} layers"
            )
    if model_type in ("qwen2", "qwen3"):
        if not field(raw_config, "use_sliding_window", bool, where, default=False) or window is None:
            if types is not None and "sliding_attention" in types:
                raise ValueError(
                    f"{where}: layer_types has sliding_attention, but use_sliding_window is off; say one of them"
                )
            return None, None
        if types is None and n_layers <= LARGEST["n_layers"]:  # ModelConfig refuses the others
            first = field(raw_config, "max_window_layers", int, where, default=28)
            types = ["sliding_attention" if i >= first else "full_attention" for i in range(n_layers)]
    if window is None or types is None:
        return window, None
    slides = tuple(kind == "sliding_attention" for kind in types)
    if not any(slides):
        return None, None
    return window, None if all(slides) else slides


def _rope_theta(raw_config: dict[str, Any], where: str) -> float:
    newer = field(raw_config, "rope_parameters", dict, where, default={})
    return _number(newer if newer.get("rope_theta") is not None else raw_config, "rope_theta", where, 10_000.0)


def _rope_scaling(raw_config: dict[str, Any], where: str) -> RopeScaling:
    """Newer files say `rope_parameters`, older ones `rope_scaling` with `rope_type` or `type`."""
    older = field(raw_config, "rope_scaling", dict, where, default={})
    scaling = field(raw_config, "rope_parameters", dict, where, default={}) or older
    return RopeScaling(
        rope_type=field(scaling, "rope_type" if "rope_type" in scaling else "type", str, where, default="default"),
        factor=_number(scaling, "factor", where, 1.0),
        low_freq_factor=_number(scaling, "low_freq_factor", where, 1.0),
        high_freq_factor=_number(scaling, "high_freq_factor", where, 4.0),
        original_max_seq_len=field(scaling, "original_max_position_embeddings", int, where, default=8192),
    )


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
    raw_config: dict[str, Any] = {
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
        raw_config |= {"sliding_window": config.sliding_window}
        if architecture != "MistralForCausalLM":
            raw_config |= {"use_sliding_window": True, "max_window_layers": 0}
        if config.sliding_layers is not None:
            if architecture == "MistralForCausalLM":
                raise ValueError(
                    "no known architecture has a window on some layers without QK-norm and biases; use all or none"
                )
            kinds = ["sliding_attention" if slides else "full_attention" for slides in config.sliding_layers]
            raw_config |= {"layer_types": kinds, "max_window_layers": config.n_layers}
    return raw_config


def load_config(folder: Path | str) -> ModelConfig:
    """Read a model folder's config.json, and from generation_config.json what else ends a text.

    Chat models list the end of a turn there, and the end of a document alone in config.json.
    """
    path = _model_folder(folder) / "config.json"
    config = config_from_dict(read_json(path), where=str(path))
    generation = Path(folder) / "generation_config.json"
    if not generation.exists():
        return config
    ends = [config.eos_token_id, _end_ids(read_json(generation), generation)]
    ids = [one for end in ends if end is not None for one in (end if isinstance(end, tuple) else [end])]
    unique = tuple(dict.fromkeys(ids))
    return replace(config, eos_token_id=unique if len(unique) > 1 else next(iter(unique), None))


def _model_folder(folder: Path | str) -> Path:
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a model folder with config.json and model.safetensors")
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
        weight_map = field(read_json(index), "weight_map", dict, index)
        names = {check(name, str, f"{index}: the file of {key}") for key, name in weight_map.items()}
        if outside := [name for name in names if Path(name).name != name or name in ("", ".", "..")]:
            raise ValueError(f"{index} names {outside[0]!r}; expected files of the same folder")
        files = [folder / name for name in sorted(names)]
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
        if not file.is_file():
            raise ValueError(f"{file} is not a regular file; expected a safetensors file")
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
        expected = None if old is None else tuple(old.shape)
        raise ValueError(f"weight {name} has shape {tuple(tensor.shape)}; config.json gives it {expected}")
    if tensor.dtype not in WEIGHT_DTYPES:  # 8-bit floats come with scales, without which they would be computed wrongly
        raise ValueError(f"weight {name} holds {tensor.dtype}; expected float32, bfloat16, float16 or float64")
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
    raw_config = config_to_dict(config, dtype=dtype)
    write_json(folder / "config.json", raw_config | (extra or {}))
    generation = {
        key: raw_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw_config[key] is not None
    }
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
