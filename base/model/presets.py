"""The configs that graft names: `--preset`."""

from dataclasses import replace

from .config import ModelConfig
from .sizes import gated_width


def _small(n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, max_seq_len: int) -> ModelConfig:
    d_head, d_ff = d_model // n_heads, gated_width(d_model)
    return ModelConfig(1, d_model, n_layers, n_heads, n_kv_heads, d_head, d_ff, max_seq_len)


def _llama(n_layers: int, d_model: int, n_heads: int, d_ff: int, **other: object) -> ModelConfig:
    base = ModelConfig(
        32_000, d_model, n_layers, n_heads, n_heads, d_model // n_heads, d_ff, 2048, qk_norm=False, tie_embeddings=False
    )
    return replace(base, **other)  # pyright: ignore[reportArgumentType]


def _qwen3(n_layers: int, d_model: int, n_heads: int, d_ff: int, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        151_936, d_model, n_layers, n_heads, 8, 128, d_ff, 40_960, rope_theta=1e6, tie_embeddings=tied
    )  # fmt: skip


# The small ones are trained from scratch, so their vocab_size comes from the tokenizer.
# The large ones are the published shapes: for planning memory and time, or random weights on a GPU.
PRESETS: dict[str, ModelConfig] = {
    "nano": _small(4, 128, 4, 2, 256),
    "micro": _small(6, 256, 8, 4, 512),
    "mini": _small(8, 512, 8, 4, 1024),
    "small": _small(12, 768, 12, 4, 1024),
    "medium": _small(24, 1024, 16, 8, 2048),
    "llama-7b": _llama(32, 4096, 32, 11_008),
    "llama-13b": _llama(40, 5120, 40, 13_824),
    "llama-33b": _llama(60, 6656, 52, 17_920),
    "llama-65b": _llama(80, 8192, 64, 22_016),
    "llama-2-70b": _llama(80, 8192, 64, 28_672, n_kv_heads=8, max_seq_len=4096, norm_eps=1e-5),
    "llama-3-8b": _llama(
        32, 4096, 32, 14_336, n_kv_heads=8, vocab_size=128_256, max_seq_len=8192, rope_theta=5e5, norm_eps=1e-5
    ),
    "llama-3-70b": _llama(
        80, 8192, 64, 28_672, n_kv_heads=8, vocab_size=128_256, max_seq_len=8192, rope_theta=5e5, norm_eps=1e-5
    ),
    "llama-3.1-8b": _llama(
        32, 4096, 32, 14_336, n_kv_heads=8, vocab_size=128_256, max_seq_len=131_072, rope_theta=5e5, norm_eps=1e-5
    ),  # without its RoPE scaling, which changes no size
    "smollm2-135m": _llama(
        30,
        576,
        9,
        1536,
        n_kv_heads=3,
        vocab_size=49_152,
        max_seq_len=8192,
        rope_theta=1e5,
        norm_eps=1e-5,
        tie_embeddings=True,
    ),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12_288, tied=False),
    "qwen3-14b": _qwen3(40, 5120, 40, 17_408, tied=False),
    "qwen3-32b": _qwen3(64, 5120, 64, 25_600, tied=False),
}
# The shapes of 2017 (arXiv:1706.03762, table 3, base, its decoder without the encoder's half) and of GPT-2.
PRESETS["transformer-2017"] = ModelConfig(
    1, 512, 6, 8, 8, 64, 2048, 512, norm_eps=1e-5, qk_norm=False, add_norm=True, layer_norm=True, positions="sinusoidal",
    gated=False, activation="relu", scale_embeddings=True, attention_out_bias=True, attention_bias=True, mlp_bias=True,
)  # fmt: skip
PRESETS["gpt2"] = ModelConfig(
    50_257, 768, 12, 12, 12, 64, 3072, 1024, norm_eps=1e-5, qk_norm=False, layer_norm=True, positions="learned", gated=False,
    activation="gelu_tanh", attention_out_bias=True, attention_bias=True, mlp_bias=True,
)  # fmt: skip
PRESETS["llama-70b"] = PRESETS["llama-2-70b"]


def preset(name: str) -> ModelConfig:
    """A preset by name; raises ValueError that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]
