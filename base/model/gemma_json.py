"""Gemma's keys of config.json, both ways: what its three text architectures say that others don't."""

from typing import Any

from ..json_fields import field
from .config import ModelConfig
from .config_checks import LARGEST

GLOBAL, LOCAL = "full_attention", "sliding_attention"
EVERY = {"gemma2": 2, "gemma3_text": 6}  # without layer_types, each layer of that number sees everything
CAPS = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
DEFAULT_CAPS = {
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
}  # Gemma 2's where the file is silent; Gemma 3 has none
ACTIVATION = "gelu_pytorch_tanh"


def with_gemma_defaults(raw_config: dict[str, Any], model_type: str, n_layers: int, where: str) -> dict[str, Any]:
    """A Gemma file with the keys that it may leave out, in the form that the general reader knows. Others' come back as they are.

    Raises ValueError for what isn't covered.
    """
    if model_type not in ("gemma", *EVERY):
        return raw_config
    if raw_config.get("use_bidirectional_attention"):
        raise ValueError(f"{where}: use_bidirectional_attention is not covered, only causal attention")
    key = "hidden_act" if model_type == "gemma" else "hidden_activation"
    if field(raw_config, key, str, where, default=ACTIVATION) != ACTIVATION:
        raise ValueError(f"{where}: {key} {raw_config[key]!r} is not covered for {model_type}; only {ACTIVATION} is")
    told = {"head_dim": 256} | raw_config | {"hidden_act": None}
    if model_type == "gemma":
        return told
    told = {"sliding_window": 4096} | told
    if told.get("layer_types") is None:
        every = field(told, "sliding_window_pattern", int, where, default=EVERY[model_type])
        if every < 1:
            raise ValueError(f"{where}: sliding_window_pattern={every} must be >= 1")
        told["layer_types"] = [LOCAL if (i + 1) % every else GLOBAL for i in range(min(n_layers, LARGEST["n_layers"]))]
    return told | (_two_ropes(told, where) if model_type == "gemma3_text" else {})


def _two_ropes(told: dict[str, Any], where: str) -> dict[str, Any]:
    """Newer files have a RoPE for each kind of layer, older ones rope_theta, rope_scaling and rope_local_base_freq."""
    both = field(told, "rope_parameters", dict, where, default={})
    if not {GLOBAL, LOCAL} & both.keys():
        both = {GLOBAL: both | field(told, "rope_scaling", dict, where, default={})}
    of_all, local = (field(both, kind, dict, where, default={}) for kind in (GLOBAL, LOCAL))
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"{where}: rope_type {local['rope_type']!r} of {LOCAL} is not covered, only default")
    theta = told["rope_theta"] if told.get("rope_theta") is not None else 1e6
    local_theta = local.get("rope_theta") or told.get("rope_local_base_freq") or 10_000.0
    return {
        "rope_parameters": {"rope_theta": theta} | of_all,
        "rope_scaling": None,
        "rope_local_base_freq": local_theta,
    }


def gemma_fields(
    told: dict[str, Any],  # of with_gemma_defaults
    model_type: str,
    d_head: int,
    *,
    slides: bool,  # some layer has a window
    where: str,
) -> dict[str, Any]:
    """ModelConfig's fields that only Gemma sets; {} for another family."""
    if model_type not in ("gemma", *EVERY):
        return {}
    fields: dict[str, Any] = {"offset_norm": True, "scale_embeddings": True, "activation": "gelu_tanh"}
    if model_type == "gemma":
        return fields

    def number(key: str, default: float | None) -> float | None:
        value = field(told, key, float, where, default=default)
        return None if value is None else float(value)

    for name, key in CAPS.items():
        absent = key not in told and model_type == "gemma2"  # null means no cap
        fields[name] = DEFAULT_CAPS[name] if absent else number(key, None)
    scalar = field(told, "query_pre_attn_scalar", int, where, default=256)
    fields |= {"sandwich_norm": True, "query_pre_attn_scalar": None if scalar == d_head else scalar}
    if model_type == "gemma3_text" and slides:
        fields["rope_local_theta"] = number("rope_local_base_freq", None)
    return fields


def gemma_to_dict(config: ModelConfig, model_type: str, scaling: dict[str, Any]) -> dict[str, Any]:
    """The keys that only Gemma has, over those of every family; {} for another one."""
    if model_type not in ("gemma", *EVERY):
        return {}
    found: dict[str, Any] = {"hidden_act": ACTIVATION, "hidden_activation": ACTIVATION}
    if model_type == "gemma":
        return found
    found |= {key: getattr(config, name) for name, key in CAPS.items()}
    found["query_pre_attn_scalar"] = config.query_pre_attn_scalar or config.d_head
    slides = config.sliding_layers or (config.sliding_window is not None,) * config.n_layers
    found["layer_types"] = [LOCAL if one else GLOBAL for one in slides]
    if model_type == "gemma3_text":
        theta = config.rope_local_theta or 10_000.0
        ropes = {
            GLOBAL: {"rope_theta": config.rope_theta, **scaling},
            LOCAL: {"rope_theta": theta, "rope_type": "default"},
        }
        found |= {"rope_parameters": ropes, "rope_local_base_freq": theta}
    return found
