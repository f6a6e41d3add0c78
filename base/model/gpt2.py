"""GPT-2's folders (GPT2LMHeadModel): its keys of config.json and its names of weights, both ways.

On disk a layer's query, key and value lie side by side in one matrix, and matrices are (in, out):

    h.0.attn.c_attn.weight (D, 3 D)      model.layers.0.self_attn.{q,k,v}_proj.weight, (D, D) each
    h.0.mlp.c_fc.weight    (D, F)        model.layers.0.mlp.up_proj.weight (F, D)
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..json_fields import field
from .config import ModelConfig

# Keys that would change the result, and the one value that is covered.
COVERED = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
NAMES = {  # below the layer, on disk -> here
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
TOP = {"wte.weight": "embed_tokens.weight", "wpe.weight": "embed_positions.weight", "ln_f.weight": "norm.weight",
       "ln_f.bias": "norm.bias"}  # fmt: skip
LAYER = re.compile(r"(?:transformer\.)?h\.(\d+)\.(.+)\.(weight|bias)")
SWITCHES: dict[str, Any] = {
    "positions": "learned", "layer_norm": True, "gated": False, "activation": "gelu_tanh", "qk_norm": False,
    "attention_bias": True, "attention_out_bias": True, "mlp_bias": True,
}  # fmt: skip


def fits(config: ModelConfig) -> bool:
    """Whether a config can be written as GPT-2."""
    default, square = ModelConfig(1), config.n_heads * config.d_head == config.d_model
    free = {"vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff", "max_seq_len", "norm_eps"}
    free |= {"tie_embeddings", "init_std", "rope_theta", "bos_token_id", "eos_token_id", "pad_token_id"}
    wanted = {name: getattr(default, name) for name in default.__dataclass_fields__} | SWITCHES
    same = all(getattr(config, name) == value for name, value in wanted.items() if name not in free)
    return same and square and config.n_heads == config.n_kv_heads


def config_from_gpt2(raw_config: dict[str, Any], ids: dict[str, Any], where: str) -> ModelConfig:
    """config.json -> ModelConfig. Dropout is left out: models here have none. Raises ValueError for what isn't covered."""
    for key, value in COVERED.items():
        if raw_config.get(key, value) != value:
            raise ValueError(f"{where}: {key} {raw_config[key]!r} is not covered for gpt2; only {value!r} is")

    def size(key: str) -> int:
        return field(raw_config, key, int, where)

    d_model, n_heads = size("n_embd"), size("n_head")
    inner = field(raw_config, "n_inner", int, where, default=None)
    if n_heads < 1 or d_model % n_heads:
        raise ValueError(f"{where}: n_embd={d_model} is not divisible by n_head={n_heads}")
    try:
        return ModelConfig(
            size("vocab_size"), d_model, size("n_layer"), n_heads, n_heads, d_model // n_heads, inner or 4 * d_model,
            field(raw_config, "n_positions", int, where, default=1024),
            norm_eps=field(raw_config, "layer_norm_epsilon", float, where, default=1e-5),
            tie_embeddings=field(raw_config, "tie_word_embeddings", bool, where, default=True),
            init_std=field(raw_config, "initializer_range", float, where, default=0.02),
            **SWITCHES, **ids,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def config_to_gpt2(config: ModelConfig, ids: dict[str, Any], *, dtype: str) -> dict[str, Any]:
    """The whole config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "n_positions": config.max_seq_len,
        "n_ctx": config.max_seq_len,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        **COVERED,
        **ids,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def from_gpt2(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A file's weights by the model's own names; other families' come back as they are."""
    for name, tensor in weights:
        bare, layer = name.removeprefix("transformer."), LAYER.fullmatch(name)
        if bare in TOP:
            yield f"model.{TOP[bare]}", tensor
        elif layer is None:
            if not re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", bare):  # the causal mask of older files
                yield name, tensor
        else:
            number, path, kind = layer.groups()
            if path == "attn" or path.endswith("masked_bias"):
                continue
            if kind == "weight" and not path.startswith("ln_"):
                tensor = tensor.t().contiguous()
            head = f"model.layers.{number}."
            if path == "attn.c_attn":
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    yield f"{head}self_attn.{part}_proj.{kind}", piece.contiguous()
            else:
                yield f"{head}{NAMES.get(path, path)}.{kind}", tensor


def to_gpt2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict -> a file's names. Raises ValueError for a tensor that the layout has no place for, such as a 4-bit weight's."""
    ours, top = {here: disk for disk, here in NAMES.items()}, {f"model.{here}": disk for disk, here in TOP.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "lm_head.weight":
            found[name] = tensor
        elif name in top:
            found[f"transformer.{top[name]}"] = tensor
        elif layer is None or (layer[2] not in ours and not re.fullmatch(r"self_attn\.[qkv]_proj", layer[2])):
            raise ValueError(f"GPT-2's layout has no place for {name}; quantized GPT-2 models can't be saved")
        else:
            number, path, kind = layer.groups()
            turns = kind == "weight" and tensor.ndim == 2
            head = f"transformer.h.{number}."
            if path == "self_attn.q_proj":
                parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                joined = torch.cat(parts)
                found[f"{head}attn.c_attn.{kind}"] = joined.t().contiguous() if turns else joined
            elif path in ours:
                found[f"{head}{ours[path]}.{kind}"] = tensor.t().contiguous() if turns else tensor
    return found
