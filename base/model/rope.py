"""Rotary position embedding's angles (Su et al. 2021, arXiv:2104.09864, eq. 15)."""

import math

import torch
from torch import Tensor

from .config import ModelConfig


def inverse_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """theta_i = rope_theta^(-2i / Dh) for i in [0, Dh/2), scaled as the config says. (Dh/2,) float32, radians a token."""
    exponent = torch.arange(0, config.d_head, 2, dtype=torch.int64, device=device).float() / config.d_head
    frequency = 1.0 / (config.rope_theta**exponent)
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
    return frequency


def rope_tables(
    positions: Tensor,  # (B or 1, T) int64
    frequencies: Tensor,  # (Dh/2,)
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each (B or 1, T, Dh/2) float32."""
    angles = positions[..., None].float() * frequencies  # (B, T, Dh/2)
    return angles.cos(), angles.sin()
