"""The keys of config.json for hybrids of attention and Gated DeltaNet (Qwen3-Next), both ways."""

from typing import Any

from ..json_fields import field
from .config import ModelConfig
from .config_checks import LARGEST

LINEAR, FULL = "linear_attention", "full_attention"
# Their key on disk, and its value where the file doesn't say.
SIZES = {
    "n_linear_k_heads": ("linear_num_key_heads", 16),
    "n_linear_v_heads": ("linear_num_value_heads", 32),
    "d_linear_k": ("linear_key_head_dim", 128),
    "d_linear_v": ("linear_value_head_dim", 128),
    "linear_conv": ("linear_conv_kernel_dim", 4),
}


def hybrid_from_dict(raw_config: dict[str, Any], n_layers: int, where: str) -> dict[str, Any]:
    """The fields of ModelConfig. Raises ValueError for kinds of layers that aren't covered."""
    types = field(raw_config, "layer_types", list, where, default=None)
    if types is None and n_layers <= LARGEST["n_layers"]:
        interval = field(raw_config, "full_attention_interval", int, where, default=4)
        if interval < 1:
            raise ValueError(f"{where}: full_attention_interval={interval} must be >= 1")
        types = [LINEAR if (i + 1) % interval else FULL for i in range(n_layers)]
    unknown = sorted({str(kind)[:40] for kind in types or ()} - {LINEAR, FULL})
    if unknown:
        raise ValueError(f"{where}: layer_types has {unknown[0]!r}; graft covers {LINEAR} and {FULL} here")
    linear = tuple(kind == LINEAR for kind in types or ())
    sizes = {name: field(raw_config, key, int, where, default=usual) for name, (key, usual) in SIZES.items()}
    return sizes | {"linear_layers": linear, "attention_gate": True, "offset_norm": True}


def hybrid_to_dict(config: ModelConfig, rope: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config of that family, over those of every family, of which `rope` is rope_parameters."""
    linear = config.linear_layers or (False,) * config.n_layers
    s = config.linear
    sizes = (s.n_k_heads, s.n_v_heads, s.d_k, s.d_v, s.conv)
    return {key: size for (key, _), size in zip(SIZES.values(), sizes, strict=True)} | {
        "layer_types": [LINEAR if one else FULL for one in linear],
        "partial_rotary_factor": config.rope_fraction,
        "rope_parameters": rope | {"partial_rotary_factor": config.rope_fraction},
    }
