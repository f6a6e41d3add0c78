"""A base on disk: a Hugging Face model folder, read and written as it is. config_json.py knows the keys of its config."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checkpoint import iterate_tensors, save_tensors, write_json
from ..dtypes import dtype_named
from ..hub import HOW_TO_CONVERT, forced_hint, model_folder
from ..json_fields import check, field, read_json
from .config import ModelConfig
from .config_json import config_from_dict, config_to_dict, end_ids
from .expert_files import stack_experts, unstack_experts
from .gpt2 import from_gpt2, to_gpt2
from .multi_token import export_figures, exported, is_of_predictor
from .own_json import layout_of
from .transformer import Transformer

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEPT_WIDE = "e_score_correction_bias"  # in float32 whatever the others' dtype: it moves by thousandths
SHARD_BYTES = 5_000_000_000  # Hugging Face's own limit per file


def load_config(folder: Path | str) -> ModelConfig:
    """Read a model folder's config.json, and from generation_config.json what else ends a text.

    Chat models list the end of a turn there, and the end of a document alone in config.json.
    """
    path = _model_folder(folder) / "config.json"
    config = config_from_dict(read_json(path), where=str(path))
    generation = Path(folder) / "generation_config.json"
    if not generation.exists():
        return config
    ends = [config.eos_token_id, end_ids(read_json(generation), generation)]
    ids = [one for end in ends if end is not None for one in (end if isinstance(end, tuple) else [end])]
    unique = tuple(dict.fromkeys(ids))
    return replace(config, eos_token_id=unique if len(unique) > 1 else next(iter(unique), None))


def _model_folder(folder: Path | str) -> Path:
    folder = model_folder(folder)
    if not folder.exists():
        raise FileNotFoundError(f"model folder {folder} does not exist{forced_hint(folder)}")
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
            f"{folder} holds pickled weights only; graft never loads pickle: {HOW_TO_CONVERT.format(name=folder)}"
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
    for name, tensor in stack_experts(from_gpt2(weights), model.config):
        if name == "model.embed_tokens.weight":
            model.fingerprint = fingerprint_of(model.config, tensor)
        if take is not None and take(name, tensor):
            continue
        if name.endswith("rotary_emb.inv_freq"):  # older Llama files keep a table that follows from the config
            continue
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        if is_of_predictor(name, model.config):  # only training uses them
            continue
        wanted = torch.float32 if name.endswith(KEPT_WIDE) else dtype or tensor.dtype
        place_parameter(model, name, tensor.to(device=device, dtype=wanted))
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
    config_to_dict(model.config, dtype=target)  # raises before anything is written
    tensors = {
        name: tensor.detach().to(torch.float32 if name.endswith(KEPT_WIDE) else target)
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_embeddings)
    }
    write_weights(folder, tensors, model.config)
    write_config(model.config, folder, dtype=target)


def write_config(config: ModelConfig, folder: Path, *, dtype: torch.dtype, extra: dict[str, Any] | None = None) -> None:
    """config.json (with `extra` keys, such as quantization_config) and generation_config.json."""
    raw_config = config_to_dict(config, dtype=dtype)
    write_json(folder / "config.json", raw_config | (extra or {}))
    generation = {
        key: raw_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw_config[key] is not None
    }
    write_json(folder / "generation_config.json", generation)


def write_weights(folder: Path, tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """model.safetensors, or numbered shards with an index when it would pass SHARD_BYTES. Experts become a key each."""
    tensors = as_on_disk(tensors, config)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    write_shards(folder, sizes, lambda names: {name: tensors[name] for name in names})


def left_out(model: Transformer) -> dict[str, int]:
    """Named figures of weights that a folder doesn't hold, or holds for other readers than graft."""
    return export_figures(model, deepseek=layout_of(model.config)[1].experts == "deepseek")


def as_on_disk(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict, or some of it, with the file's keys: a mixture's experts have one each; of GPT-2's q, k and v all or none."""
    family = layout_of(config)[1]
    if config.n_predict:
        tensors = exported(tensors, config, deepseek=family.experts == "deepseek")
    if family.model_type == "gpt2":
        return to_gpt2(tensors)
    if not config.n_experts:
        return dict(tensors)
    return unstack_experts(tensors, config, mixtral=family.experts == "mixtral")


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],  # bytes of each tensor
    read: Callable[
        [Sequence[str]], dict[str, Tensor]
    ],  # names -> what to write for them; one file's are held at a time
    *,
    limit: int = SHARD_BYTES,
) -> None:
    """model.safetensors, or numbered files of at most `limit` bytes (a larger tensor is one by itself) with an index."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, n_bytes in sizes.items():
        if size + n_bytes > limit and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
    if len(shards) == 1:
        save_tensors(folder / "model.safetensors", read(shards[0]))
        # An index of a former, larger model would be read in place of this file.
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = read(shard)
        save_tensors(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(sizes.values())
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
    if c.n_experts:
        shape += f" {c.n_experts} {c.n_experts_per_token} {c.expert_width} {c.d_shared_expert}"
    return hashlib.sha256(shape.encode() + sample.tobytes()).hexdigest()[:16]
