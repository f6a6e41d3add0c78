"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751, section 2.1): h + up(gelu(down(h))).

One stands after each layer's attention and one after its feed-forward part, before the residual sum, where h is the output of
o_proj or down_proj. `up` starts at zero, so that the model is the base at first.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AFTER = ("o_proj", "down_proj")  # the linears whose output a bottleneck changes
PARTS = ("down_weight", "down_bias", "up_weight", "up_bias")


class Bottleneck(nn.Module):
    """One adapter's bottleneck after one linear."""

    ROLES: ClassVar = {
        "down_weight": "adapter", "up_weight": "adapter", "down_bias": "bias", "up_bias": "bias",
    }  # fmt: skip
    stacks: ClassVar[bool] = False

    def __init__(self, tensors: Mapping[str, Tensor], *, dropout: float = 0.0, trained: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.down_weight = nn.Parameter(tensors["down_weight"], requires_grad=trained)  # (size, D)
        self.down_bias = nn.Parameter(tensors["down_bias"], requires_grad=trained)  # (size,)
        self.up_weight = nn.Parameter(tensors["up_weight"], requires_grad=trained)  # (D, size)
        self.up_bias = nn.Parameter(tensors["up_bias"], requires_grad=trained)  # (D,)

    def apply_to(self, base: nn.Module, x: Tensor) -> Tensor:
        """(..., in) -> (..., D)."""
        h = base(x)
        dropped = F.dropout(h, self.dropout) if self.dropout and self.training else h
        inner = F.gelu(F.linear(dropped, self.down_weight.to(h.dtype), self.down_bias.to(h.dtype)))
        return h + F.linear(inner, self.up_weight.to(h.dtype), self.up_bias.to(h.dtype))


def fresh_tensors(d_model: int, size: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """A new bottleneck's tensors by name: down ~ U(-1/sqrt(D), 1/sqrt(D)) as nn.Linear's, up = 0."""
    bound = 1 / math.sqrt(d_model)
    down = torch.empty(size, d_model).uniform_(-bound, bound, generator=generator)
    return {
        "down_weight": down.to(device),
        "down_bias": torch.zeros(size, device=device),
        "up_weight": torch.zeros(d_model, size, device=device),
        "up_bias": torch.zeros(d_model, device=device),
    }
