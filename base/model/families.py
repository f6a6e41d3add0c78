"""The architectures of transformers that a config may be written as: what each of them can say."""

from dataclasses import dataclass

from . import gpt2
from .config import ModelConfig
from .deepseek_json import deepseek_fits


@dataclass(frozen=True)
class Family:
    """What one architecture of transformers has; a config that fits is written under its name."""

    model_type: str
    qk_norm: str | None = None  # over each head's values, or over all heads' jointly
    biases: tuple[str, ...] = ()  # those that may be there: qkv (without the output's), attention (all four), mlp
    windows: str | None = None  # all: on every layer or none; some: on layers that it chooses
    experts: str | None = None  # the keys that it has for them
    chooses_rope: bool = False  # some layers may be without RoPE
    post_norm: bool = False
    gemma: int = 0  # 1 to 3: norms of 1 + weight, scaled embeddings, gelu; from 2 on norms on both sides and soft caps
    hybrid: bool = (
        False  # linear attention on layers that it chooses, gates on the others, norms of 1 + weight, partial RoPE
    )
    norm_eps: float = 1e-6  # where the file doesn't say
    ties: bool = False


# In the order in which they are tried for a config to write.
FAMILIES = {
    "LlamaForCausalLM": Family("llama", biases=("attention", "mlp")),
    "MistralForCausalLM": Family("mistral", windows="all"),
    "Qwen2ForCausalLM": Family("qwen2", biases=("qkv",), windows="some"),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm="head", biases=("attention",), windows="some"),
    "SmolLM3ForCausalLM": Family("smollm3", biases=("attention", "mlp"), windows="some", chooses_rope=True, ties=True),
    "Olmo2ForCausalLM": Family("olmo2", qk_norm="joint", biases=("attention",), post_norm=True, norm_eps=1e-5),
    "MixtralForCausalLM": Family("mixtral", windows="all", experts="mixtral", norm_eps=1e-5),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qk_norm="head", biases=("attention",), windows="all", experts="qwen"),
    "Qwen2MoeForCausalLM": Family("qwen2_moe", biases=("qkv",), experts="qwen"),
    "Qwen3NextForCausalLM": Family("qwen3_next", qk_norm="head", biases=("attention",), experts="qwen", hybrid=True),
    "DeepseekV2ForCausalLM": Family("deepseek_v2", biases=("attention",), experts="deepseek"),
    "DeepseekV3ForCausalLM": Family("deepseek_v3", biases=("attention",), experts="deepseek"),
    "GemmaForCausalLM": Family("gemma", biases=("attention",), gemma=1, ties=True),
    "Gemma2ForCausalLM": Family("gemma2", biases=("attention",), windows="some", gemma=2, ties=True),
    "Gemma3ForCausalLM": Family(
        "gemma3_text", qk_norm="head", biases=("attention",), windows="some", gemma=3, ties=True
    ),
    "OlmoeForCausalLM": Family("olmoe", qk_norm="joint", biases=("attention",), experts="olmoe", norm_eps=1e-5),
    "GPT2LMHeadModel": Family("gpt2"),  # gpt2.py knows it
}
ARCHITECTURES = {architecture: family.model_type for architecture, family in FAMILIES.items()}


def family_of(config: ModelConfig) -> tuple[str, Family]:
    """The first architecture that has all of a config's switches. Raises ValueError when there is none."""
    for architecture, family in FAMILIES.items():
        if family.model_type == "gpt2":
            if gpt2.fits(config):
                return architecture, family
            continue
        fits = (_kinds_fit, _attention_fits, _hybrid_fits, _gemma_fits, deepseek_fits, _experts_fit)
        if all(fit(config, family) for fit in fits):
            return architecture, family
    names = (
        *(
            "qk_norm",
            "qk_norm_joint",
            "post_norm",
            "attention_bias",
            "attention_out_bias",
            "mlp_bias",
            "sliding_layers",
        ),
        *("sandwich_norm", "offset_norm", "scale_embeddings", "activation", "attention_softcap", "logit_softcap"),
        *("query_pre_attn_scalar", "rope_local_theta", "linear_layers", "attention_gate", "rope_fraction"),
        *("positions", "layer_norm", "add_norm", "gated"),
        *("d_latent", "router", "router_bias", "n_expert_groups", "gate_shared_expert"),
        *("rope_layers", "n_experts", "d_expert", "d_shared_expert", "expert_layers", "normalize_experts"),
    )
    default = ModelConfig(1)
    chosen = [
        f"{name}={getattr(config, name)}"
        for name in names
        if name == "qk_norm" or getattr(config, name) != getattr(default, name)
    ]
    raise ValueError(
        f"no known architecture has {', '.join(chosen)} together; known are {', '.join(FAMILIES)}: leave some out"
    )


def _kinds_fit(config: ModelConfig, family: Family) -> bool:
    return config.positions == "rope" and config.gated and not (config.layer_norm or config.add_norm)


def _attention_fits(config: ModelConfig, family: Family) -> bool:
    qk_norm = ("joint" if config.qk_norm_joint else "head") if config.qk_norm else None
    if qk_norm != family.qk_norm or config.post_norm != family.post_norm:
        return False
    biases = (config.attention_bias, config.attention_out_bias)
    always = family.model_type == "qwen2"  # its q, k and v have biases, whatever the file says
    known = {
        (False, False): not always,
        (True, False): "qkv" in family.biases,
        (True, True): "attention" in family.biases,
    }
    if not known.get(biases, False) or (config.mlp_bias and "mlp" not in family.biases):
        return False
    if config.rope_layers is not None and not family.chooses_rope:
        return False
    windows = None if config.sliding_window is None else "all" if config.sliding_layers is None else "some"
    return windows is None or windows == family.windows or family.windows == "some"


def _hybrid_fits(config: ModelConfig, family: Family) -> bool:
    if family.hybrid:
        return config.attention_gate and config.offset_norm and config.sliding_window is None
    return not (config.attention_gate or config.linear_layers) and config.rope_fraction == 1


def _gemma_fits(config: ModelConfig, family: Family) -> bool:
    signs = (config.offset_norm and not family.hybrid, config.scale_embeddings, config.activation == "gelu_tanh")
    if signs != (family.gemma > 0,) * 3 or config.sandwich_norm != (family.gemma > 1):
        return False
    capped = (config.attention_softcap, config.logit_softcap, config.query_pre_attn_scalar) != (None, None, None)
    if capped and family.gemma < 2:
        return False
    if family.gemma == 3:  # its layers with a window always have a RoPE of their own
        return (config.rope_local_theta is None) == (config.sliding_window is None)
    return config.rope_local_theta is None


def _experts_fit(config: ModelConfig, family: Family) -> bool:
    if family.experts == "deepseek":
        return True  # deepseek_json.py knows
    if not config.n_experts or family.experts is None:
        return not config.n_experts and (family.experts is None or family.hybrid)
    if bool(config.d_shared_expert) != (family.model_type in ("qwen2_moe", "qwen3_next")):
        return False
    if family.experts == "qwen":
        return True
    if family.experts == "olmoe" and config.n_heads * config.d_head != config.d_model:
        return False  # its QK-norm is over d_model values
    normalizes = family.experts == "olmoe" or config.normalize_experts
    return config.expert_layers is None and config.expert_width == config.d_ff and normalizes
