"""DeepSeek's keys of config.json, both ways: latent attention and the experts of V2 and V3."""

from typing import TYPE_CHECKING, Any

from ..json_fields import field
from .config import ModelConfig
from .config_checks import LARGEST

if TYPE_CHECKING:
    from .families import Family

KINDS = ("deepseek_v2", "deepseek_v3")
# What a file may leave out, as transformers reads it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "n_routed_experts": 64, "num_experts_per_tok": None, "moe_intermediate_size": 1407, "n_shared_experts": 2,
        "n_group": None, "topk_group": None, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0,
        "norm_topk_prob": False, "topk_method": "greedy", "scoring_func": "softmax",
    },
    "deepseek_v3": {
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1,
        "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
        "norm_topk_prob": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    },
}  # fmt: skip
METHODS = {"deepseek_v2": ("greedy", "group_limited_greedy"), "deepseek_v3": ("noaux_tc",)}


def deepseek_fields(
    raw_config: dict[str, Any], model_type: str, n_heads: int, n_layers: int, where: str
) -> dict[str, Any]:
    """ModelConfig's fields that DeepSeek's files set, n_kv_heads and d_head among them; {} for another family.

    Raises ValueError for what isn't covered.
    """
    if model_type not in KINDS:
        return {}
    told = DEFAULTS[model_type] | {key: value for key, value in raw_config.items() if value is not None}
    if "q_lora_rank" in raw_config:
        told["q_lora_rank"] = raw_config["q_lora_rank"]  # null means none

    def whole(key: str, default: int | None = None) -> Any:
        return field(told, key, int, where, default=default)

    rope, plain = whole("qk_rope_head_dim"), whole("qk_nope_head_dim")
    fields = {
        "n_kv_heads": n_heads,
        "d_head": rope + plain,
        "d_latent": whole("kv_lora_rank"),
        "d_query_latent": field(told, "q_lora_rank", int, where, default=None),
        "d_rope": rope,
        "d_value": None if whole("v_head_dim") == rope + plain else whole("v_head_dim"),
        "rope_interleaved": field(told, "rope_interleave", bool, where, default=True),
    }
    n_dense = whole("first_k_dense_replace")
    if n_dense < 0:
        raise ValueError(f"{where}: first_k_dense_replace={n_dense} must be >= 0")
    return fields if n_dense >= n_layers else fields | _experts(told, model_type, n_dense, n_layers, where)


def _experts(told: dict[str, Any], model_type: str, n_dense: int, n_layers: int, where: str) -> dict[str, Any]:
    def whole(key: str, default: int | None = None) -> Any:
        return field(told, key, int, where, default=default)

    method = field(told, "topk_method", str, where)
    expected = {"scoring_func": DEFAULTS[model_type]["scoring_func"], "moe_layer_freq": 1}
    for key, covered in expected.items():
        if told.get(key, covered) != covered:
            raise ValueError(f"{where}: {key} {told[key]!r} is not covered for {model_type}, only {covered!r}")
    if method not in METHODS[model_type]:
        raise ValueError(
            f"{where}: topk_method {method!r} is not covered for {model_type}; only {' and '.join(METHODS[model_type])}"
        )
    newest = model_type == "deepseek_v3"
    if not newest and told["norm_topk_prob"]:
        raise ValueError(f"{where}: norm_topk_prob true is not covered for deepseek_v2, only false")
    in_groups = method != "greedy"
    d_expert, n_shared = whole("moe_intermediate_size"), whole("n_shared_experts", 0)
    n_per_token = whole("num_experts_per_tok")
    return {
        "n_experts": whole("n_routed_experts"),
        "n_experts_per_token": n_per_token,
        "d_expert": d_expert,
        "d_shared_expert": d_expert * n_shared,
        "gate_shared_expert": False,
        "router": expected["scoring_func"],
        "router_bias": newest,
        "bias_rate": float(field(told, "router_bias_rate", float, where, default=0.0)),
        "n_expert_groups": whole("n_group", 1) if in_groups else 1,
        "n_groups_per_token": whole("topk_group", 1) if in_groups else 1,
        "routed_scale": float(field(told, "routed_scaling_factor", float, where)),
        "normalize_experts": newest and field(told, "norm_topk_prob", bool, where),
        "balance_loss": float(field(told, "aux_loss_alpha", float, where, default=0.0)),
        "router_z_loss": float(field(told, "router_z_loss_coef", float, where, default=0.0)),
        "expert_layers": tuple(i >= n_dense for i in range(min(n_layers, LARGEST["n_layers"]))) if n_dense else None,
    }


def deepseek_to_dict(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The keys that only DeepSeek has, over those of every family; {} for another one."""
    if model_type not in KINDS:
        return {}
    c = config
    layers = c.expert_layers or (True,) * c.n_layers
    found: dict[str, Any] = {
        "head_dim": c.d_rope,  # transformers takes RoPE's width from it
        "kv_lora_rank": c.d_latent,
        "q_lora_rank": c.d_query_latent,
        "qk_rope_head_dim": c.d_rope,
        "qk_nope_head_dim": c.d_head - c.d_rope,
        "v_head_dim": c.value_width,
        "rope_interleave": c.rope_interleaved,
        "first_k_dense_replace": layers.index(True) if c.n_experts else c.n_layers,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": c.n_predict,
    }
    if not c.n_experts:
        return found
    grouped = c.n_expert_groups > 1
    found |= {
        "n_routed_experts": c.n_experts,
        "num_experts_per_tok": c.n_experts_per_token,
        "moe_intermediate_size": c.expert_width,
        "n_shared_experts": c.d_shared_expert // c.expert_width,
        "n_group": c.n_expert_groups,
        "topk_group": c.n_groups_per_token,
        "routed_scaling_factor": c.routed_scale,
        "norm_topk_prob": c.normalize_experts,
        "scoring_func": c.router,
        "topk_method": "noaux_tc" if c.router_bias else "group_limited_greedy" if grouped else "greedy",
        "aux_loss_alpha": c.balance_loss,
    }
    extra = {"router_bias_rate": c.bias_rate, "router_z_loss_coef": c.router_z_loss}
    return found | {key: value for key, value in extra.items() if value}


def deepseek_fits(config: ModelConfig, family: "Family") -> bool:
    """Whether a config is one of this architecture, as far as attention and experts go."""
    model_type = family.model_type
    if (config.d_latent is not None) != (model_type in KINDS):
        return False
    if model_type not in KINDS:
        return not config.router_bias and config.router == "softmax" and config.gate_shared_expert
    c = config
    capped = c.attention_softcap or c.query_pre_attn_scalar or c.sliding_window or c.rope_layers
    if capped or c.qk_norm or c.mlp_bias or (model_type == "deepseek_v2" and not c.rope_interleaved):
        return False
    if not c.n_experts:
        return True
    layers = c.expert_layers or (True,) * c.n_layers
    first_dense = list(layers) == sorted(layers)
    if not first_dense or c.gate_shared_expert or not c.d_shared_expert or c.d_shared_expert % c.expert_width:
        return False
    if model_type == "deepseek_v3":
        return c.router == "sigmoid" and c.router_bias
    return c.router == "softmax" and not c.router_bias and not c.normalize_experts
