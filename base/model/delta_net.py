"""Gated DeltaNet, linear attention in place of attention (Yang et al. 2024, arXiv:2412.06464, section 3.4; Qwen3-Next's layout).

    x -> q, k, v -> short causal convolution -> silu -> q / |q| / sqrt(Dk), k / |k|     Hk heads of q and k, Hv of v
    x -> b -> beta = sigmoid(b);  x -> a -> log decay = -exp(A_log) softplus(a + dt_bias)   one of each a value head
    o = gated delta rule (kernels/gated_delta);  out = out_proj(RMSNorm(o) silu(z)), x -> z

A text costs the same per token at any length, and its past is one (Dk, Dv) matrix a head.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.causal_conv import causal_conv
from ...kernels.checks import accumulator
from ...kernels.gated_delta import gated_delta
from ...kernels.swiglu import swiglu
from .config import ModelConfig
from .kv_cache import StepContext
from .norm import RMSNorm
from .state_cache import StateCache

UNIT_EPS = 1e-6  # added to the squared length of queries and keys


class ShortConv(nn.Module):
    """The convolution's weight, with the shape that it has on disk."""

    ROLES: ClassVar = {"weight": "conv"}

    def __init__(self, n_channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_channels, 1, width))


class GatedDeltaNet(nn.Module):
    """(B, T, D) -> (B, T, D)."""

    ROLES: ClassVar = {
        "in_proj_qkvz.weight": "hidden", "in_proj_ba.weight": "router", "out_proj.weight": "residual",
        "A_log": "log_rate", "dt_bias": "time_step",
    }  # fmt: skip

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sizes = s = config.linear
        self.in_proj_qkvz = nn.Linear(config.d_model, 2 * (s.k_width + s.v_width), bias=False)
        self.in_proj_ba = nn.Linear(config.d_model, 2 * s.n_v_heads, bias=False)
        self.conv1d = ShortConv(2 * s.k_width + s.v_width, s.conv)
        self.A_log = nn.Parameter(torch.empty(s.n_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(s.n_v_heads))
        self.norm = RMSNorm(s.d_v, config.norm_eps)
        self.out_proj = nn.Linear(s.v_width, config.d_model, bias=False)

    def new_cache(self, n_rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str) -> StateCache:
        """Empty states; `capacity` is nothing to them."""
        s = self.sizes
        recent = torch.zeros(n_rows, s.conv - 1, 2 * s.k_width + s.v_width, dtype=dtype, device=device)
        state = torch.zeros(n_rows, s.n_v_heads, s.d_k, s.d_v, dtype=accumulator(dtype), device=device)
        return StateCache(recent, state)

    def forward(self, x: Tensor, context: StepContext, cache: StateCache | None = None) -> Tensor:
        """With a cache, texts go on from its states, which are then those after x."""
        s, (B, T, _) = self.sizes, x.shape
        qkv, z = self._projected(x)
        recent, state = (None, None) if cache is None else cache.read(B)
        weight = self.conv1d.weight[:, 0]
        mixed = F.silu(causal_conv(qkv, weight, before=recent, cu_seqlens=context.cu_seqlens))
        q, k, v = mixed.split([s.k_width, s.k_width, s.v_width], -1)
        q, k = (self._heads(_unit(t.reshape(B, T, s.n_k_heads, s.d_k))) for t in (q, k))  # (B, Hv, T, Dk)
        v = v.reshape(B, T, s.n_v_heads, s.d_v).transpose(1, 2)  # (B, Hv, T, Dv)
        log_decay, beta = self._gates(x)  # (B, Hv, T)
        if context.n_new is not None:  # padding changes no state
            real = torch.arange(T, device=x.device) < context.n_new[:, None]  # (B, T)
            log_decay, beta = log_decay * real[:, None], beta * real[:, None]
        out, state = gated_delta(q * s.d_k**-0.5, k, v, log_decay, beta, state=state, cu_seqlens=context.cu_seqlens)
        if cache is not None:
            assert recent is not None
            cache.write(torch.cat([recent.to(qkv.dtype), qkv], 1), state, context)
        normed = self.norm(out.transpose(1, 2)).to(z.dtype)  # (B, T, Hv, Dv)
        return self.out_proj(swiglu(z.contiguous(), normed).view(B, T, s.v_width))

    def decode(self, x: Tensor, cache: StateCache, context: StepContext) -> Tensor:
        """`forward` for one new token a row, (B, D) -> (B, D)."""
        return self.forward(x[:, None], context, cache)[:, 0]

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> the convolution's input (B, T, C), q, k and v in turn; and z (B, T, Hv, Dv).

        On disk the rows of in_proj_qkvz lie by key head: its q, its k, then v and z of the value heads that read it.
        """
        s, (B, T, _) = self.sizes, x.shape
        shared = s.v_width // s.n_k_heads
        by_head = self.in_proj_qkvz(x).view(B, T, s.n_k_heads, 2 * (s.d_k + shared))
        q, k, v, z = by_head.split([s.d_k, s.d_k, shared, shared], -1)
        return torch.cat([t.reshape(B, T, -1) for t in (q, k, v)], -1), z.reshape(B, T, s.n_v_heads, s.d_v)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> log decay and beta, (B, Hv, T) float32. On disk in_proj_ba lies by key head: b, then a."""
        s, (B, T, _) = self.sizes, x.shape
        b, a = self.in_proj_ba(x).view(B, T, s.n_k_heads, -1).chunk(2, -1)
        b, a = (t.reshape(B, T, s.n_v_heads).transpose(1, 2) for t in (b, a))
        wide = accumulator(x.dtype)
        step = F.softplus(a.to(wide) + self.dt_bias.to(wide)[:, None])
        return -self.A_log.to(wide).exp()[:, None] * step, b.sigmoid().to(wide)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, Hk, Dk) -> (B, Hv, T, Dk): value heads that share a key head lie side by side."""
        return x.transpose(1, 2).repeat_interleave(self.sizes.n_v_heads // self.sizes.n_k_heads, 1)


def _unit(x: Tensor) -> Tensor:
    """Of length 1 along the last axis, in float32."""
    x = x.to(accumulator(x.dtype))
    return x * (x.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt()
