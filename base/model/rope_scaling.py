"""How RoPE is stretched beyond the length that a model was trained on."""

import math
from dataclasses import dataclass

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched beyond the pretrained length.

    linear: Chen et al. 2023, arXiv:2306.15595; yarn: Peng et al. 2023, arXiv:2309.00071; llama3: its report, section 3.4.
    dynamic changes frequencies beyond max_seq_len alone, which no sequence here passes, so it computes as default.
    """

    rope_type: str = "default"  # default: none; linear: positions / factor; llama3, yarn: low frequencies / factor
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original / high are kept
    original_max_seq_len: int = 8192
    beta_fast: float = 32.0  # yarn: dimensions that turn more often than this in the original length are kept
    beta_slow: float = 1.0  # yarn: those that turn less often are divided by factor
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    truncate: bool = True  # yarn: the bounds between them are whole dimensions
    mscale: float = (
        0.0  # yarn, DeepSeek's: what attention_factor was made from, and with a latent the scores' factor too
    )
    mscale_all_dim: float = 0.0

    @property
    def score_factor(self) -> float:
        """What latent attention multiplies scores by, beyond 1 / sqrt(d_head): mscale of all dimensions, squared."""
        if self.rope_type != "yarn" or not self.mscale_all_dim or self.factor <= 1:
            return 1.0
        return (0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0) ** 2

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type {self.rope_type!r} is not supported; known are {', '.join(ROPE_TYPES)}")
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_seq_len",
            "beta_fast",
            "beta_slow",
            "attention_factor",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r} must be > 0 and finite")
        for name in ("mscale", "mscale_all_dim"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)!r} must be >= 0 and finite")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be less than high_freq_factor={self.high_freq_factor}"
            )


UNSCALED = RopeScaling()
