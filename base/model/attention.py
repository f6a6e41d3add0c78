"""Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245) with RoPE and optional QK-norm."""

from torch import Tensor, nn

from ...kernels.attention import attention
from ...kernels.rope import rope
from ..generate.kv_cache import LayerCache
from .config import ModelConfig
from .norm import RMSNorm


class Attention(nn.Module):
    """q, k, v projections -> RoPE -> attention -> o_proj. Shapes: x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        q_width, kv_width = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.q_proj = nn.Linear(config.d_model, q_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_width, config.d_model, bias=config.attention_out_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.d_head, config.norm_eps)
            self.k_norm = RMSNorm(config.d_head, config.norm_eps)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        cos: Tensor,  # (B or 1, T, Dh/2)
        sin: Tensor,
        *,
        cu_seqlens: Tensor | None = None,  # (n_docs + 1,) int32, with B = 1
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Causal self-attention; with a cache, the new keys are appended to it and the old ones are seen too."""
        B, T, _ = x.shape
        c = self.config
        q = self.q_proj(x).view(B, T, c.n_heads, c.d_head)
        k = self.k_proj(x).view(B, T, c.n_kv_heads, c.d_head)
        v = self.v_proj(x).view(B, T, c.n_kv_heads, c.d_head).transpose(1, 2)  # (B, K, T, Dh)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)  # (B, H, T, Dh), (B, K, T, Dh)
        key_lengths = None
        if cache is not None:
            k, v, key_lengths = cache.append(k, v)  # (B, K, S, Dh)
        mixed = attention(q, k, v, window=c.sliding_window, cu_seqlens=cu_seqlens, key_lengths=key_lengths)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, c.n_heads * c.d_head))
