"""Rotary position embedding's angles (Su et al. 2021, arXiv:2104.09864, eq. 15)."""

import math
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig


def unscaled_frequencies(theta: float, d_head: int, device: torch.device | str = "cpu") -> Tensor:
    """theta^(-2i / Dh) for i in [0, Dh/2). (Dh/2,) float32, radians a token."""
    exponent = torch.arange(0, d_head, 2, dtype=torch.int64, device=device).float() / d_head
    return 1.0 / (theta**exponent)


def inverse_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """theta_i = rope_theta^(-2i / Dh) for i in [0, Dh/2), scaled as the config says. (Dh/2,) float32, radians a token."""
    frequency = unscaled_frequencies(config.rope_theta, config.d_rotary, device)
    scaling = config.rope_scaling
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    if scaling.rope_type == "llama3":
        wavelength = 2 * math.pi / frequency
        low = scaling.original_max_seq_len / scaling.low_freq_factor
        high = scaling.original_max_seq_len / scaling.high_freq_factor
        blend = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        between = (1 - blend) * frequency / scaling.factor + blend * frequency
        scaled = torch.where(wavelength > low, frequency / scaling.factor, between)
        return torch.where(wavelength < high, frequency, scaled)
    if scaling.rope_type == "yarn":
        return _yarn(config, frequency)
    return frequency


def _yarn(config: ModelConfig, frequency: Tensor) -> Tensor:
    """Frequencies that turn often within the original length stay, slow ones are divided by factor, a ramp lies between
    (Peng et al. 2023, arXiv:2309.00071, eq. 21-23). (Dh/2,)"""
    scaling, d_head = config.rope_scaling, config.d_rotary

    def dimension(turns: float) -> float:
        """The dimension that turns so often within the original length."""
        return (
            d_head * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d_head - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(d_head // 2, dtype=torch.float32, device=frequency.device) - low) / (high - low)
    slow = ramp.clamp(0, 1)  # 0: kept, 1: divided
    return frequency / scaling.factor * slow + frequency * (1 - slow)


def rope_tables(
    config: ModelConfig,
    positions: Tensor,  # (B or 1, T) int64
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each (B or 1, T, Dh/2) float32."""
    angles = positions[..., None].float() * inverse_frequencies(config, positions.device)  # (B, T, Dh/2)
    scale = config.rope_scaling.attention_factor if config.rope_scaling.rope_type == "yarn" else 1.0
    return (angles.cos(), angles.sin()) if scale == 1.0 else (angles.cos() * scale, angles.sin() * scale)


def angle_tables(config: ModelConfig, positions: Tensor) -> dict[str, Any]:
    """The tables of StepContext by its names: cos and sin of `rope_tables`, and where layers with a window have a base of
    their own, local_cos and local_sin. Each (B or 1, T, Dh/2) float32. Where positions
    are added to the embeddings, `positions` (B or 1, T) too."""
    cos, sin = rope_tables(config, positions)
    tables: dict[str, Any] = {"cos": cos, "sin": sin}
    if config.rope_local_theta is not None:
        local = unscaled_frequencies(config.rope_local_theta, config.d_rotary, positions.device)
        angles = positions[..., None].float() * local
        tables |= {"local_cos": angles.cos(), "local_sin": angles.sin()}
    if config.positions != "rope":
        tables["positions"] = positions
    return tables
