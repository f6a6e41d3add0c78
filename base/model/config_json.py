"""config.json of a Hugging Face model folder, both ways: the one place that knows its keys.

Covers the text models below with the silu activation; what a config asks for beyond that is refused by name.
"""

import math
from typing import Any

import torch

from ..json_fields import check, field
from .config import ModelConfig
from .config_checks import LARGEST
from .deepseek_json import deepseek_fields, deepseek_to_dict
from .families import ARCHITECTURES, FAMILIES, Family
from .gemma_json import gemma_fields, gemma_to_dict, with_gemma_defaults
from .gpt2 import config_from_gpt2, config_to_gpt2
from .hybrid_json import hybrid_from_dict, hybrid_to_dict
from .own_json import MODEL_TYPE, layout_of, own_from_dict, own_to_dict
from .rope_scaling import RopeScaling


def config_from_dict(raw_config: dict[str, Any], *, where: str = "config.json") -> ModelConfig:
    """A config.json's dict -> ModelConfig. Raises ValueError for an architecture, a feature or a value that isn't covered."""

    def get(key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        return field(raw_config, key, kind, where, default=default)

    names = get("architectures", list, [])
    architecture = check(names[0], str, f"{where}: architectures") if names else None
    if get("model_type", str) == MODEL_TYPE:
        return own_from_dict(raw_config, _special_ids(raw_config, where), where)
    model_type = get("model_type", str) or (ARCHITECTURES.get(architecture) if architecture else None)
    if (
        model_type is None
        or model_type not in ARCHITECTURES.values()
        or (architecture and architecture not in ARCHITECTURES)
    ):
        raise ValueError(
            f"{where}: architecture {architecture or model_type!r} is not known; graft reads {', '.join(ARCHITECTURES)}"
        )
    if model_type == "gpt2":
        return config_from_gpt2(raw_config, _special_ids(raw_config, where), where)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in sizes if key not in raw_config]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; is it a whole model's config?")
    vocab_size, d_model, d_ff, n_layers, n_heads = (field(raw_config, key, int, where) for key in sizes)
    if get("hidden_act", str, "silu") not in ("silu", "swish") and not model_type.startswith("gemma"):
        raise ValueError(
            f"{where}: hidden_act {raw_config['hidden_act']!r} is not covered; graft's feed-forward is silu-gated"
        )
    if n_heads < 1:
        raise ValueError(f"{where}: num_attention_heads={n_heads} must be >= 1")
    _refuse_uncovered(raw_config, model_type, where)
    raw_config = with_gemma_defaults(raw_config, model_type, n_layers, where)
    family = next(family for family in FAMILIES.values() if family.model_type == model_type)
    only_qkv = "qkv" in family.biases  # an older key of Qwen2's is attention_bias, a newer one of its mixtures qkv_bias
    bias = get("attention_bias", bool, get("qkv_bias", bool, only_qkv))
    try:
        window, sliding = _windows(raw_config, model_type, n_layers, where)
        d_head = get("head_dim", int, d_model // n_heads)
        heads = {"n_kv_heads": get("num_key_value_heads", int, n_heads), "d_head": d_head}
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            **(heads | deepseek_fields(raw_config, model_type, n_heads, n_layers, where)),
            d_ff=d_ff,
            max_seq_len=get("max_position_embeddings", int, 2048),
            rope_theta=_rope_theta(raw_config, where),
            rope_scaling=_rope_scaling(raw_config, where),
            norm_eps=_number(raw_config, "rms_norm_eps", where, family.norm_eps),
            qk_norm=family.qk_norm is not None,
            qk_norm_joint=family.qk_norm == "joint",
            post_norm=family.post_norm,
            tie_embeddings=get("tie_word_embeddings", bool, family.ties),
            attention_bias=bias,
            attention_out_bias=bias and not only_qkv,
            mlp_bias=get("mlp_bias", bool, False),
            sliding_window=window,
            sliding_layers=sliding,
            rope_layers=_rope_layers(raw_config, n_layers, where) if family.chooses_rope else None,
            **(_experts(raw_config, family, n_layers, where) if family.experts not in (None, "deepseek") else {}),
            **(hybrid_from_dict(raw_config, n_layers, where) if family.hybrid else {}),
            rope_fraction=_rope_fraction(raw_config, 0.25 if family.hybrid else 1.0, where),
            **gemma_fields(raw_config, model_type, d_head, slides=window is not None, where=where),
            init_std=_number(raw_config, "initializer_range", where, 0.02),
            **_special_ids(raw_config, where),
        )
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _special_ids(raw_config: dict[str, Any], where: str) -> dict[str, Any]:
    begin, pad = (field(raw_config, key, int, where, default=None) for key in ("bos_token_id", "pad_token_id"))
    return {"bos_token_id": begin, "eos_token_id": end_ids(raw_config, where), "pad_token_id": pad}


def end_ids(section: dict[str, Any], where: object) -> int | tuple[int, ...] | None:
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


def _refuse_uncovered(raw_config: dict[str, Any], model_type: str, where: str) -> None:
    """Features that would be computed wrongly in silence."""
    if model_type != "qwen3_next" and (share := _rope_fraction(raw_config, 1.0, where)) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor {share} is not covered, only 1")
    if raw_config.get("clip_qkv") is not None:
        raise ValueError(f"{where}: clip_qkv {raw_config['clip_qkv']} is not covered, only none")
    if raw_config.get("router_jitter_noise"):
        raise ValueError(f"{where}: router_jitter_noise {raw_config['router_jitter_noise']} is not covered, only 0")


def _rope_layers(raw_config: dict[str, Any], n_layers: int, where: str) -> tuple[bool, ...] | None:
    """Which layers have RoPE: `no_rope_layers` is 1 where there is RoPE; by default every fourth layer has none (SmolLM3)."""
    layers = field(raw_config, "no_rope_layers", list, where, default=None)
    if layers is None:
        interval = field(raw_config, "no_rope_layer_interval", int, where, default=4)
        if interval < 1:
            raise ValueError(f"{where}: no_rope_layer_interval={interval} must be >= 1")
        layers = [int((i + 1) % interval != 0) for i in range(n_layers)]
    rotates = tuple(bool(check(one, (int, bool), f"{where}: an entry of no_rope_layers")) for one in layers)
    return None if all(rotates) and len(rotates) == n_layers else rotates


def _experts(raw_config: dict[str, Any], family: Family, n_layers: int, where: str) -> dict[str, Any]:
    """The mixture's part of the config. Raises ValueError for what isn't covered."""

    def get(key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        return field(raw_config, key, kind, where, default=default)

    n_experts = get("num_local_experts", int, get("num_experts", int, 512 if family.hybrid else None))
    if n_experts == 0 and family.hybrid:
        return {}
    if n_experts is None:
        raise ValueError(f"{where} lacks num_experts; is it a whole model's config?")
    experts: dict[str, Any] = {
        "n_experts": n_experts,
        "n_experts_per_token": get("num_experts_per_tok", int, 10 if family.hybrid else 2),
        "normalize_experts": family.experts == "mixtral" or get("norm_topk_prob", bool, family.hybrid),
        "balance_loss": _number(raw_config, "router_aux_loss_coef", where, 0.001),
        "router_z_loss": _number(raw_config, "router_z_loss_coef", where, 0.0),
    }
    if family.experts != "qwen":
        return experts
    step, dense = get("decoder_sparse_step", int, 1), get("mlp_only_layers", list, []) or []
    if step < 1:
        raise ValueError(f"{where}: decoder_sparse_step={step} must be >= 1")
    mixes = tuple(i not in dense and (i + 1) % step == 0 for i in range(min(n_layers, LARGEST["n_layers"])))
    if family.model_type in ("qwen2_moe", "qwen3_next"):
        experts["d_shared_expert"] = get("shared_expert_intermediate_size", int, 512 if family.hybrid else 0)
    if not any(mixes):
        raise ValueError(f"{where}: no layer has experts (decoder_sparse_step={step}); it is no mixture of experts")
    return experts | {
        "d_expert": get("moe_intermediate_size", int, 512 if family.hybrid else None),
        "expert_layers": None if all(mixes) else mixes,
    }


def _windows(
    raw_config: dict[str, Any], model_type: str | None, n_layers: int, where: str
) -> tuple[int | None, tuple[bool, ...] | None]:
    """(sliding_window, sliding_layers) as transformers reads them.

    Mistral: the window on every layer. Qwen2 and Qwen3: only with use_sliding_window, on the layers from max_window_layers on,
    unless layer_types says for each layer what it is.
    """
    if model_type == "qwen3_next":
        return None, None
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
    if model_type == "qwen2_moe":
        if field(raw_config, "use_sliding_window", bool, where, default=False):
            raise ValueError(f"{where}: use_sliding_window is not covered for qwen2_moe, only false")
        return None, None
    if model_type == "qwen3_moe" and not field(raw_config, "use_sliding_window", bool, where, default=False):
        return None, None
    if model_type in ("qwen2", "qwen3", "smollm3"):
        if not field(raw_config, "use_sliding_window", bool, where, default=False) or window is None:
            if types is not None and "sliding_attention" in types:
                raise ValueError(
                    f"{where}: layer_types has sliding_attention, but use_sliding_window is off; say one of them"
                )
            return None, None
        if types is None and model_type == "smollm3":
            rotates = _rope_layers(raw_config, n_layers, where) or (True,) * n_layers
            types = ["full_attention" if has_rope else "sliding_attention" for has_rope in rotates]
        elif types is None and n_layers <= LARGEST["n_layers"]:  # ModelConfig refuses the others
            first = field(raw_config, "max_window_layers", int, where, default=28)
            types = ["sliding_attention" if i >= first else "full_attention" for i in range(n_layers)]
    if window is None or types is None:
        return window, None
    slides = tuple(kind == "sliding_attention" for kind in types)
    if not any(slides):
        return None, None
    return window, None if all(slides) else slides


def _rope_fraction(raw_config: dict[str, Any], default: float, where: str) -> float:
    newer = field(raw_config, "rope_parameters", dict, where, default={})
    key = "partial_rotary_factor"
    return _number(newer if newer.get(key) is not None else raw_config, key, where, default)


def _rope_theta(raw_config: dict[str, Any], where: str) -> float:
    newer = field(raw_config, "rope_parameters", dict, where, default={})
    return _number(newer if newer.get("rope_theta") is not None else raw_config, "rope_theta", where, 10_000.0)


def _rope_scaling(raw_config: dict[str, Any], where: str) -> RopeScaling:
    """Newer files say `rope_parameters`, older ones `rope_scaling` with `rope_type` or `type`."""
    older = field(raw_config, "rope_scaling", dict, where, default={})
    scaling = field(raw_config, "rope_parameters", dict, where, default={}) or older
    if kinds := [key for key, value in scaling.items() if isinstance(value, dict)]:
        raise ValueError(
            f"{where}: rope_parameters differ by kind of layer ({', '.join(kinds)}); graft has one RoPE for all"
        )
    rope_type = field(scaling, "rope_type" if "rope_type" in scaling else "type", str, where, default="default")
    if rope_type == "yarn":
        return _yarn(scaling, raw_config, where)
    return RopeScaling(
        rope_type=rope_type,
        factor=_number(scaling, "factor", where, 1.0),
        low_freq_factor=_number(scaling, "low_freq_factor", where, 1.0),
        high_freq_factor=_number(scaling, "high_freq_factor", where, 4.0),
        original_max_seq_len=field(scaling, "original_max_position_embeddings", int, where, default=8192),
    )


def _yarn(scaling: dict[str, Any], raw_config: dict[str, Any], where: str) -> RopeScaling:
    """YaRN: the attention factor follows from the others where it is missing (arXiv:2309.00071, eq. 22; mscale is DeepSeek's)."""
    longest = field(raw_config, "max_position_embeddings", int, where, default=2048)
    original = field(scaling, "original_max_position_embeddings", int, where, default=longest)
    factor = _number(scaling, "factor", where, longest / max(original, 1))
    mscale, mscale_all = (_number(scaling, key, where, 0.0) for key in ("mscale", "mscale_all_dim"))
    attention_factor = (
        _mscale(factor, mscale) / _mscale(factor, mscale_all) if mscale and mscale_all else _mscale(factor)
    )
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_seq_len=original,
        beta_fast=_number(scaling, "beta_fast", where, 32.0),
        beta_slow=_number(scaling, "beta_slow", where, 1.0),
        attention_factor=_number(scaling, "attention_factor", where, attention_factor),
        truncate=field(scaling, "truncate", bool, where, default=True),
        mscale=mscale,
        mscale_all_dim=mscale_all,
    )


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def config_to_dict(config: ModelConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """ModelConfig -> config.json's dict, with the keys of both older and newer readers; switches that no known architecture has
    together are written in graft's own layout."""
    architecture, family = layout_of(config)
    scaling = _scaling_to_dict(config.rope_scaling)
    name = str(dtype).removeprefix("torch.")
    ends = list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": ends, "pad_token_id": config.pad_token_id}
    if family.model_type == MODEL_TYPE:
        return own_to_dict(config, ids, dtype=name)
    if family.model_type == "gpt2":
        return config_to_gpt2(config, ids, dtype=name)
    raw_config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": family.model_type,
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
        **ids,
        "torch_dtype": name,
        "dtype": name,
    }
    if family.chooses_rope:
        rotates = config.rope_layers or (True,) * config.n_layers
        raw_config["no_rope_layers"] = [int(has_rope) for has_rope in rotates]
    raw_config |= _windows_to_dict(config, family) | _experts_to_dict(config, family)
    raw_config |= hybrid_to_dict(config, raw_config["rope_parameters"]) if family.hybrid else {}
    raw_config |= deepseek_to_dict(config, family.model_type)
    return raw_config | gemma_to_dict(config, family.model_type, scaling)


def _scaling_to_dict(scaling: RopeScaling) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": scaling.rope_type}
    if scaling.rope_type != "default":
        found["factor"] = scaling.factor
    if scaling.rope_type == "llama3":
        found |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.rope_type == "yarn":
        found |= {key: getattr(scaling, key) for key in ("beta_fast", "beta_slow", "attention_factor", "truncate")}
        found |= {key: getattr(scaling, key) for key in ("mscale", "mscale_all_dim") if getattr(scaling, key)}
    if scaling.rope_type in ("llama3", "yarn"):
        found["original_max_position_embeddings"] = scaling.original_max_seq_len
    return found


def _windows_to_dict(config: ModelConfig, family: Family) -> dict[str, Any]:
    if config.sliding_window is None:
        return {}
    found: dict[str, Any] = {"sliding_window": config.sliding_window}
    if family.model_type not in ("mistral", "mixtral"):
        found |= {"use_sliding_window": True, "max_window_layers": 0}
    if config.sliding_layers is not None or family.chooses_rope:
        slides = config.sliding_layers or (True,) * config.n_layers
        kinds = ["sliding_attention" if one else "full_attention" for one in slides]
        found |= {"layer_types": kinds, "max_window_layers": config.n_layers}
    return found


def _experts_to_dict(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family.experts in (None, "deepseek"):
        return {}
    if not config.n_experts:
        return {"num_experts": 0}
    found: dict[str, Any] = {
        "num_local_experts" if family.experts == "mixtral" else "num_experts": config.n_experts,
        "num_experts_per_tok": config.n_experts_per_token,
        "router_aux_loss_coef": config.balance_loss,
    }
    if config.router_z_loss:
        found["router_z_loss_coef"] = config.router_z_loss
    if family.experts != "mixtral":
        found["norm_topk_prob"] = config.normalize_experts
    if family.experts == "qwen":
        mixes = config.expert_layers or (True,) * config.n_layers
        dense = [i for i, one in enumerate(mixes) if not one]
        found |= {"moe_intermediate_size": config.expert_width, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    if family.model_type in ("qwen2_moe", "qwen3_next"):
        found |= {"shared_expert_intermediate_size": config.d_shared_expert, "qkv_bias": config.attention_bias}
    return found
