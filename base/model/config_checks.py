"""Which sizes and switches of a decoder fit each other."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ModelConfig

ACTIVATIONS = ("silu", "gelu_tanh", "relu")
POSITIONS = ("rope", "sinusoidal", "learned")
# Above these a config is a slip or damage; refused before anything is built.
LARGEST = {
    "vocab_size": 2**26, "d_model": 2**20, "n_layers": 10_000, "n_heads": 2**16, "n_kv_heads": 2**16, "d_head": 2**16,
    "n_linear_k_heads": 2**16, "n_linear_v_heads": 2**16, "d_linear_k": 2**16, "d_linear_v": 2**16, "linear_conv": 64,
    "d_ff": 2**24, "max_seq_len": 2**31, "n_experts": 2**16, "d_expert": 2**24, "d_shared_expert": 2**24,
}  # fmt: skip
PATTERNS = ("sliding_layers", "rope_layers", "expert_layers", "linear_layers")  # fields with an entry for each layer


def check_config(c: "ModelConfig") -> None:
    """Raise ValueError when the sizes and switches don't fit each other."""
    for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff", "max_seq_len"):
        value = getattr(c, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number >= 1")
        if value > LARGEST[name]:
            raise ValueError(f"{name}={value} is more than {LARGEST[name]:,}, beyond any model that graft can build")
    for name in ("rope_theta", "norm_eps", "init_std"):
        if not (math.isfinite(getattr(c, name)) and getattr(c, name) > 0):
            raise ValueError(f"{name}={getattr(c, name)!r} must be > 0 and finite")
    if c.sliding_window is not None and not 1 <= c.sliding_window <= LARGEST["max_seq_len"]:
        raise ValueError(f"sliding_window={c.sliding_window} must be a whole number >= 1, or none")
    if c.sliding_layers is not None and c.sliding_window is None:
        raise ValueError("sliding_layers is given without sliding_window; set the window, or leave both out")
    _check_gemma(c)
    _check_latent(c)
    if type(c.n_predict) is not int or not 0 <= c.n_predict < c.max_seq_len - 1:
        raise ValueError(f"n_predict={c.n_predict!r} must be a whole number from 0, and below max_seq_len - 1")
    if not (math.isfinite(c.predict_loss) and c.predict_loss >= 0):
        raise ValueError(f"predict_loss={c.predict_loss!r} must be >= 0 and finite")
    if c.expert_layers is not None and not c.n_experts:
        raise ValueError("expert_layers is given without n_experts; set it, or leave both out")
    _check_linear(c)
    for name in PATTERNS:
        layers = getattr(c, name)
        if layers is not None and len(layers) != c.n_layers:
            raise ValueError(f"{name} names {len(layers)} layers, n_layers={c.n_layers}; name each layer once")
    if c.n_experts:
        _check_experts(c)
    if c.qk_norm_joint and not c.qk_norm:
        raise ValueError("qk_norm_joint says how qk_norm is taken; set qk_norm=true, or leave it out")
    if c.n_heads % c.n_kv_heads:
        fits = [k for k in range(1, c.n_heads + 1) if c.n_heads % k == 0]
        shown = ", ".join(map(str, fits[:12])) + (", ..." if len(fits) > 12 else "")
        raise ValueError(f"n_heads={c.n_heads} is not divisible by n_kv_heads={c.n_kv_heads}; use one of {shown}")
    if c.d_head % 2:
        raise ValueError(f"d_head={c.d_head} is odd; RoPE rotates pairs, use an even d_head")


def _check_gemma(c: "ModelConfig") -> None:
    for name in ("attention_softcap", "logit_softcap", "query_pre_attn_scalar", "rope_local_theta"):
        value = getattr(c, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} must be > 0 and finite, or none")
    if c.activation not in ACTIVATIONS:
        raise ValueError(f"activation={c.activation!r} is not known; choose {' or '.join(ACTIVATIONS)}")
    if c.positions not in POSITIONS:
        raise ValueError(f"positions={c.positions!r} is not known; choose {', '.join(POSITIONS)}")
    if c.activation == "relu" and c.gated:
        raise ValueError("activation=relu is of feed-forward layers without a gate; set gated=false, or take silu")
    if not c.gated and c.n_experts:
        raise ValueError("gated=false is not covered for experts; leave it or n_experts out")
    if c.layer_norm and c.offset_norm:
        raise ValueError("layer_norm and offset_norm are two kinds of norms; choose one")
    if c.activation != "silu" and c.n_experts:
        raise ValueError(f"activation={c.activation} is not covered for experts, only silu")
    if c.sandwich_norm + c.post_norm + c.add_norm > 1:
        raise ValueError("sandwich_norm, post_norm and add_norm are places of the norms; choose one")
    if c.rope_local_theta is not None and c.sliding_window is None:
        raise ValueError("rope_local_theta is of layers with a window; set sliding_window, or leave both out")


def _check_linear(c: "ModelConfig") -> None:
    for name in ("n_linear_k_heads", "n_linear_v_heads", "d_linear_k", "d_linear_v", "linear_conv"):
        value, least = getattr(c, name), 2 if name == "linear_conv" else 1
        if value is not None and (type(value) is not int or not least <= value <= LARGEST[name]):
            raise ValueError(f"{name}={value!r} must be a whole number from {least} to {LARGEST[name]:,}")
    if c.linear.n_v_heads % c.linear.n_k_heads:
        raise ValueError(
            f"n_linear_v_heads={c.linear.n_v_heads} is not divisible by n_linear_k_heads={c.linear.n_k_heads}; "
            "each key head serves the same number of value heads"
        )
    if c.linear_layers is not None and (c.post_norm or c.sandwich_norm or c.add_norm):
        raise ValueError(
            "linear_layers is not covered with post_norm, sandwich_norm or add_norm; leave one of them out"
        )
    fits = 0 < c.rope_fraction <= 1 and c.d_rotary >= 2 and c.d_rotary % 2 == 0
    if c.d_head % 2 == 0 and not fits:
        raise ValueError(
            f"rope_fraction={c.rope_fraction} of d_head={c.d_head} turns {c.d_rotary} dimensions; RoPE turns pairs, "
            "an even number from 2 to d_head"
        )


def _check_latent(c: "ModelConfig") -> None:
    if c.d_latent is None:
        given = [name for name in ("d_query_latent", "d_rope", "d_value") if getattr(c, name)]
        if given:
            raise ValueError(f"{given[0]} is given without d_latent; set the latent's width, or leave both out")
        return
    for name, least in (("d_latent", 1), ("d_query_latent", 1), ("d_value", 1), ("d_rope", 2)):
        value = getattr(c, name)
        if value is not None and (type(value) is not int or not least <= value <= LARGEST["d_model"]):
            raise ValueError(f"{name}={value!r} must be a whole number from {least} to {LARGEST['d_model']:,}")
    if c.d_rope % 2 or c.d_rope >= c.d_head:
        raise ValueError(
            f"d_rope={c.d_rope} must be even and less than d_head={c.d_head}, which holds it and the part without RoPE"
        )
    if c.value_width > c.d_head:
        raise ValueError(f"d_value={c.d_value} is more than d_head={c.d_head}; kernels take values up to that width")
    if c.n_kv_heads != c.n_heads:
        raise ValueError(
            f"n_kv_heads={c.n_kv_heads}: with d_latent every head has its own keys; use n_kv_heads={c.n_heads}"
        )
    others = c.rope_local_theta is not None or c.attention_gate or c.rope_fraction != 1 or c.positions != "rope"
    if c.qk_norm or others:
        raise ValueError(
            "qk_norm, rope_local_theta, attention_gate, rope_fraction and positions are not covered with d_latent; leave "
            "them out (qk_norm=false)"
        )


def _check_experts(c: "ModelConfig") -> None:
    for name, least in (("n_experts", 2), ("d_shared_expert", 0), ("d_expert", 1)):
        value = getattr(c, name)
        if value is not None and (type(value) is not int or not least <= value <= LARGEST[name]):
            raise ValueError(f"{name}={value!r} must be a whole number from {least} to {LARGEST[name]:,}")
    if not 1 <= c.n_experts_per_token <= c.n_experts:
        raise ValueError(f"n_experts_per_token={c.n_experts_per_token} must lie between 1 and n_experts={c.n_experts}")
    if c.router not in ("softmax", "sigmoid"):
        raise ValueError(f"router={c.router!r} is not known; choose softmax or sigmoid")
    if c.bias_rate and not c.router_bias:
        raise ValueError(f"bias_rate={c.bias_rate} moves the router's bias; set router_bias=true, or leave it out")
    _check_groups(c)
    for name in ("balance_loss", "router_z_loss", "bias_rate", "routed_scale"):
        if not (math.isfinite(getattr(c, name)) and getattr(c, name) >= 0):
            raise ValueError(f"{name}={getattr(c, name)!r} must be >= 0 and finite")


def _check_groups(c: "ModelConfig") -> None:
    n, most = c.n_expert_groups, c.n_groups_per_token
    if n < 1 or c.n_experts % n:
        raise ValueError(f"n_experts={c.n_experts} is not divisible into n_expert_groups={n}; choose a divisor")
    if not 1 <= most <= n:
        raise ValueError(f"n_groups_per_token={most} must lie between 1 and n_expert_groups={n}")
    size = c.n_experts // n
    if most * size < c.n_experts_per_token:
        raise ValueError(
            f"n_experts_per_token={c.n_experts_per_token} is more than the {most * size} experts of "
            f"n_groups_per_token={most} groups; raise it"
        )
    if c.router_bias and n > 1 and size < 2:
        raise ValueError(f"n_expert_groups={n} leaves {size} expert a group; a group is scored by its two best")
