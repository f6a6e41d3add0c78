"""Positions added to the embeddings, where RoPE doesn't turn queries and keys: sinusoidal or learned ones."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.checks import has_values
from .config import ModelConfig


class SinusoidalPositions(nn.Module):
    """sin(t / 10000^(2i / D)) in dimension 2i, its cosine in 2i + 1 (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.d_model = config.d_model

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """(B or 1, T) int64 -> (B or 1, T, D)."""
        i = torch.arange(0, self.d_model, 2, device=positions.device)
        angles = positions[..., None].float() * torch.exp(i.float() * (-math.log(10_000.0) / self.d_model))
        both = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)  # (B, T, D up to an even number)
        return both[..., : self.d_model].to(dtype)


class LearnedPositions(nn.Module):
    """A vector for each position up to max_seq_len (Radford et al. 2019, GPT-2)."""

    ROLES: ClassVar = {"weight": "embedding"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.max_seq_len, config.d_model))

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """(B or 1, T) int64 -> (B or 1, T, D). Raises ValueError for a text of more tokens than there are positions.

        A row of packed documents may be longer, since positions begin again in each.
        """
        n = self.weight.shape[0]
        if positions.shape[1] > n and has_values(positions) and (last := int(positions.max())) >= n:
            raise ValueError(f"{last + 1} tokens are more than the {n} positions that the model has learned")
        return F.embedding(positions.clamp(max=n - 1), self.weight).to(dtype)  # what lies beyond only pads a batch


POSITIONS = {"sinusoidal": SinusoidalPositions, "learned": LearnedPositions}
