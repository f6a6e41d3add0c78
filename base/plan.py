"""Resource accounting before a run: parameters, arithmetic, bytes, days. Pure functions; no tensor is made."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from .model.config import ModelConfig

TOKENS_PER_PARAM = (
    20.0  # compute-optimal (Hoffmann et al. 2022, arXiv:2203.15556, table 3: 400M 8.0B, 1B 20.2B, 67B 1.5T)
)

# Bytes a parameter through a training run: weight + gradient + optimizer state. Norms' and scales' few bytes are left out.
BYTES_PER_PARAM = {
    "adamw float32": 4 + 4 + 8,  # two moments in float32
    "adamw bfloat16 + float32 master": 2 + 2 + 4 + 8,
    "adamw8bit": 4 + 4 + 2,  # two moments in 8 bits (arXiv:2110.02861)
    "sgd momentum": 4 + 4 + 4,
    "sgd": 4 + 4,
}


@dataclass(frozen=True)
class Device:
    """What one accelerator offers, from its data sheet: dense rates, without sparsity."""

    name: str
    flops: float  # bfloat16 products a second
    bytes_per_s: float  # of its memory
    memory_bytes: float


DEVICES = {
    "a100": Device("A100 80GB", 312e12, 2.039e12, 80e9),
    "h100": Device("H100 SXM", 989.5e12, 3.35e12, 80e9),
    "h200": Device("H200 SXM", 989.5e12, 4.8e12, 141e9),
    "rtx4090": Device("RTX 4090", 165.2e12, 1.008e12, 24e9),
}


def training_flops(n_params: float, n_tokens: float) -> float:
    """6 N D: 2 for each parameter and token forward, 4 backward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1)."""
    return 6.0 * n_params * n_tokens


def attention_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward products of queries with keys and of weights with values, a token of a causal sequence.

    Products of 2 H Dh and 2 H Dv FLOPs for each key, T / 2 keys on average (the window's at most), 3 passes' worth, all layers. Of
    linear attention its recurrence: 3 products of 2 Hv Dk Dv FLOPs (what the state knows, what is written, what is read).
    """
    specs = Counter(config.layer(i) for i in range(config.n_layers))
    specs[config.layer(config.n_layers - 1)] += config.n_predict
    keys = sum(
        n * _keys_seen(spec.window, seq_len) for spec, n in specs.items() if spec.attention != "linear"
    )  # of all layers
    s = config.linear
    state = 6 * config.n_linear_layers * s.n_v_heads * s.d_k * s.d_v
    return 3 * (2 * config.n_heads * (config.d_head + config.value_width) * keys + state)


def _keys_seen(window: int | None, seq_len: int) -> float:
    """Keys that a query sees on average: the first `window` queries (window + 1) / 2, the rest all of the window."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs a token: 6 for each parameter that multiplies (the embedding's look-up and experts that don't read the
    token do not, the head once for each predicted token), plus attention."""
    head = config.vocab_size * config.d_model
    lookup = 0 if config.tie_embeddings else head
    return 6.0 * (config.n_active_params - lookup + config.n_predict * head) + attention_flops_per_token(
        config, seq_len
    )


def training_seconds(flops: float, *, n_devices: int = 1, device_flops: float, mfu: float) -> float:
    """Wall-clock time at a model FLOPs utilization `mfu` in (0, 1]. Raises ValueError outside of it.

    Known value: 6 * 70e9 * 15e12 FLOPs on 1,024 H100 at 0.5 of 989.5 TFLOP/s take 143.9 days.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu} must lie in (0, 1]; 0.4 to 0.5 is good on GPUs")
    if n_devices < 1:
        raise ValueError(f"n_devices={n_devices} must be >= 1")
    if not device_flops > 0:
        raise ValueError(f"device_flops={device_flops} must be > 0, in FLOP/s: an H100 has 989.5e12")
    return flops / (n_devices * device_flops * mfu)


def compute_optimal_tokens(n_params: float) -> float:
    """About 20 tokens a parameter (Hoffmann et al. 2022, arXiv:2203.15556)."""
    return TOKENS_PER_PARAM * n_params


def compute_optimal_params(flops: float) -> float:
    """The parameters whose 20 tokens each use a budget of FLOPs: 6 N (20 N) = C."""
    return math.sqrt(flops / (6 * TOKENS_PER_PARAM))


def largest_model(memory_bytes: float, *, optimizer: str = "adamw float32") -> float:
    """Parameters whose weights, gradients and optimizer state fill the memory; activations are not counted.

    Known value: 8 x 80 GB hold 40e9 at AdamW's 16 bytes. Raises ValueError for an unknown optimizer.
    """
    if optimizer not in BYTES_PER_PARAM:
        raise ValueError(f"unknown optimizer {optimizer!r}; choose {', '.join(BYTES_PER_PARAM)}")
    return memory_bytes / BYTES_PER_PARAM[optimizer]


def matmul_intensity(m: int, k: int, n: int, *, n_bytes: int = 2) -> float:
    """FLOPs a byte of an (m, k) by (k, n) product that reads both and writes the result once.

    A device whose FLOP/s over bytes/s is higher than this waits for its memory. With one row it is below 1: decoding.
    """
    return 2.0 * m * k * n / (n_bytes * (m * k + k * n + m * n))


def ridge(device: Device) -> float:
    """FLOPs a byte from which on a device computes rather than waits for memory (the roofline's corner)."""
    return device.flops / device.bytes_per_s


@dataclass(frozen=True)
class Plan:
    """A run's account."""

    n_params: int
    n_tokens: float
    optimal_tokens: float  # compute-optimal for this size
    seq_len: int
    flops_per_token: float  # training, attention included
    attention_share: float  # of flops_per_token
    flops: float  # of the whole run
    n_devices: int
    device: str
    mfu: float
    seconds: float
    state_bytes: dict[str, int]  # weights, gradients and optimizer state, by optimizer
    intensity_training: float  # FLOPs a byte of a feed-forward product over seq_len tokens, bfloat16
    intensity_decoding: float  # the same for one token
    intensity_needed: float  # by the device

    @property
    def days(self) -> float:
        return self.seconds / 86_400

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"days": self.days}


def make_plan(
    config: ModelConfig,
    *,
    n_tokens: float | None = None,  # None: compute-optimal
    seq_len: int | None = None,  # None: the model's longest
    device: str = "h100",
    n_devices: int = 1,
    mfu: float = 0.4,
) -> Plan:
    """Account for pretraining a model. Raises ValueError for an unknown device or impossible numbers."""
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; known are {', '.join(DEVICES)}")
    if n_tokens is not None and not n_tokens > 0:
        raise ValueError(f"n_tokens={n_tokens} must be > 0")
    seq_len = seq_len or config.max_seq_len
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be >= 1")
    n, chip = config.n_params, DEVICES[device]
    tokens = compute_optimal_tokens(n) if n_tokens is None else n_tokens
    per_token = flops_per_token(config, seq_len)
    return Plan(
        n_params=n,
        n_tokens=tokens,
        optimal_tokens=compute_optimal_tokens(n),
        seq_len=seq_len,
        flops_per_token=per_token,
        attention_share=attention_flops_per_token(config, seq_len) / per_token,
        flops=per_token * tokens,
        n_devices=n_devices,
        device=chip.name,
        mfu=mfu,
        seconds=training_seconds(per_token * tokens, n_devices=n_devices, device_flops=chip.flops, mfu=mfu),
        state_bytes={name: n_bytes * n for name, n_bytes in BYTES_PER_PARAM.items()},
        intensity_training=matmul_intensity(seq_len, config.d_model, config.d_ff),
        intensity_decoding=matmul_intensity(1, config.d_model, config.d_ff),
        intensity_needed=ridge(chip),
    )
