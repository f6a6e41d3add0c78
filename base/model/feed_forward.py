"""The gated feed-forward layer, SwiGLU (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.swiglu import swiglu
from .attention import project
from .config import ModelConfig


class FeedForward(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)). (B, T, D) -> (B, T, D)."""

    ROLES: ClassVar = {
        "gate_proj.weight": "hidden", "up_proj.weight": "hidden", "down_proj.weight": "residual",
        "gate_proj.bias": "bias", "up_proj.bias": "bias", "down_proj.bias": "bias",
    }  # fmt: skip

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    def decode(self, x: Tensor) -> Tensor:
        """`forward` for one new token a row without gradients, (B, D) -> (B, D), in few operators."""
        gate = F.silu(project(self.gate_proj, x), inplace=True)
        return project(self.down_proj, gate.mul_(project(self.up_proj, x)))
