"""A config with other sizes: what follows from a replaced one follows it."""

from dataclasses import replace

from .config import ModelConfig
from .config_checks import PATTERNS


def with_sizes(config: ModelConfig, **sizes: object) -> ModelConfig:
    """Replace sizes; what follows from a replaced one follows it, unless it is given too: d_head = d_model / n_heads,
    n_kv_heads by the same sharing, d_ff = 8/3 d_model. A pattern of fewer layers repeats.

    Raises ValueError when d_model is not divisible by n_heads and no d_head is given, and for a pattern that doesn't divide
    the layers.
    """
    n_layers = sizes.get("n_layers", config.n_layers)
    for name in PATTERNS:
        pattern = sizes.get(name)
        if isinstance(pattern, tuple) and pattern and isinstance(n_layers, int) and len(pattern) < n_layers:
            if n_layers % len(pattern):
                raise ValueError(
                    f"{name} is a pattern of {len(pattern)} layers, which does not divide n_layers={n_layers}; use a multiple of it"
                )
            sizes[name] = pattern * (n_layers // len(pattern))
    if "d_head" not in sizes and ("d_model" in sizes or "n_heads" in sizes):
        d_model, n_heads = sizes.get("d_model", config.d_model), sizes.get("n_heads", config.n_heads)
        if not (isinstance(d_model, int) and isinstance(n_heads, int) and d_model > 0 and n_heads > 0):
            raise ValueError(f"d_model={d_model!r} and n_heads={n_heads!r} must be whole numbers >= 1")
        if d_model % n_heads:
            below, above = d_model // n_heads * n_heads, -(-d_model // n_heads) * n_heads
            choice = f"{below} or {above}" if below else str(above)
            raise ValueError(f"d_model={d_model} is not divisible by n_heads={n_heads}; use d_model {choice}")
        sizes["d_head"] = d_model // n_heads
    if sizes.get("d_latent") is not None:  # every head has its own keys, and no norm of them
        sizes = {"n_kv_heads": sizes.get("n_heads", config.n_heads), "qk_norm": False} | sizes
    if "n_heads" in sizes and "n_kv_heads" not in sizes:
        # Keep the sharing ratio where it divides, else give each query head its own keys.
        n_heads = sizes["n_heads"]
        assert isinstance(n_heads, int)
        share = config.n_heads // config.n_kv_heads
        sizes["n_kv_heads"] = n_heads // share if n_heads % share == 0 else n_heads
    d_model = sizes.get("d_model")
    if isinstance(d_model, int) and "d_ff" not in sizes:
        sizes["d_ff"] = gated_width(d_model) if sizes.get("gated", config.gated) else 4 * d_model
    return replace(config, **sizes)  # pyright: ignore[reportArgumentType]


def gated_width(d_model: int) -> int:
    """8/3 D up to a multiple of 64: three matrices of it cost what two of 4 D did (arXiv:2002.05202, section 2)."""
    return -(-8 * d_model // (3 * 64)) * 64
