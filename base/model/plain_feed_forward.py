"""The feed-forward layer without a gate (Vaswani et al. 2017, arXiv:1706.03762, eq. 2; GPT-2 with GELU)."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import project
from .config import ModelConfig
from .kv_cache import StepContext


class PlainFeedForward(nn.Module):
    """down_proj(act(up_proj(x))), act: relu, silu, or gelu in its tanh form. (B, T, D) -> (B, T, D)."""

    ROLES: ClassVar = {
        "up_proj.weight": "hidden", "down_proj.weight": "residual", "up_proj.bias": "bias", "down_proj.bias": "bias",
    }  # fmt: skip

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor, context: StepContext | None = None) -> Tensor:
        del context  # every kind of feed-forward layer is called alike
        return self.down_proj(self._act(self.up_proj(x)))

    def decode(self, x: Tensor) -> Tensor:
        """`forward` for one new token a row without gradients, (B, D) -> (B, D)."""
        return project(self.down_proj, self._act(project(self.up_proj, x)))

    def _act(self, x: Tensor) -> Tensor:
        if self.activation == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        return F.relu(x) if self.activation == "relu" else F.silu(x)
