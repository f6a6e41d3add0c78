"""The gated feed-forward layer, SwiGLU or GeGLU (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.swiglu import swiglu
from .attention import project
from .config import ModelConfig
from .kv_cache import StepContext


class FeedForward(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)), act: silu, or gelu in its tanh form. (B, T, D) -> (B, T, D)."""

    ROLES: ClassVar = {
        "gate_proj.weight": "hidden", "up_proj.weight": "hidden", "down_proj.weight": "residual",
        "gate_proj.bias": "bias", "up_proj.bias": "bias", "down_proj.bias": "bias",
    }  # fmt: skip

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:  # None: the config's d_ff
        super().__init__()
        width = config.d_ff if width is None else width
        self.gelu = config.activation == "gelu_tanh"
        self.gate_proj = nn.Linear(config.d_model, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.d_model, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor, context: StepContext | None = None) -> Tensor:
        del context  # every kind of feed-forward layer is called alike
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up if self.gelu else swiglu(gate, up))

    def decode(self, x: Tensor) -> Tensor:
        """`forward` for one new token a row without gradients, (B, D) -> (B, D), in few operators."""
        gate = project(self.gate_proj, x)
        gate = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate, inplace=True)
        return project(self.down_proj, gate.mul_(project(self.up_proj, x)))
