"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values are made from a narrow latent.

    x (D) --kv_a--> [latent (R) | rope key (Dr)]   this alone is cached: R + Dr values a token, for all heads
                     latent --norm, kv_b--> of each head: key without position (Dn), value (Dv)
    x (D) --q_a, norm, q_b--> of each head: [query without position (Dn) | query with RoPE (Dr)]

    score = (q_n . k_n + q_r . k_r) * scale

While one reads a text, keys and values are expanded. With earlier tokens in the cache, W_k of kv_b is taken into the query and
W_v behind the weighted sum instead (section 2.1.2): attention then runs over the cached entries themselves, all heads sharing
them as one key, q_n^T W_k latent = (W_k^T q_n) . latent.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...kernels.attention import attention
from ...kernels.attention.masked import attention_masked
from ...kernels.attention.widths import widened
from ...kernels.rope import rope
from .attention import Scores
from .config import LayerSpec, ModelConfig
from .kv_cache import LayerCache, StepContext
from .latent_cache import LatentCache, PagedLatent
from .norm import RMSNorm
from .paged_cache import PagedLayer

LATENT_EPS = 1e-6  # of the latents' norms, whatever the other norms' is


class LatentAttention(nn.Module):
    """Causal self-attention through a latent. Shapes: x (B, T, D) -> (B, T, D)."""

    ROLES: ClassVar = {
        "q_proj.weight": "hidden", "q_a_proj.weight": "hidden", "q_b_proj.weight": "hidden",
        "kv_a_proj_with_mqa.weight": "hidden", "kv_b_proj.weight": "hidden", "o_proj.weight": "residual",
        "q_a_proj.bias": "bias", "kv_a_proj_with_mqa.bias": "bias", "o_proj.bias": "bias",
    }  # fmt: skip
    prefix = None  # prefix adapters bring keys and values, which this layer doesn't keep

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        assert config.d_latent is not None
        c = self.config = config
        self.spec = spec
        self.R, self.d_plain, self.d_value = config.d_latent, c.d_head - c.d_rope, c.value_width
        queries = c.n_heads * c.d_head
        if c.d_query_latent is None:
            self.q_proj = nn.Linear(c.d_model, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(c.d_model, c.d_query_latent, bias=c.attention_bias)
            self.q_a_layernorm = RMSNorm(c.d_query_latent, LATENT_EPS)
            self.q_b_proj = nn.Linear(c.d_query_latent, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.d_model, self.R + c.d_rope, bias=c.attention_bias)
        self.kv_a_layernorm = RMSNorm(self.R, LATENT_EPS)
        self.kv_b_proj = nn.Linear(self.R, c.n_heads * (self.d_plain + self.d_value), bias=False)
        self.o_proj = nn.Linear(c.n_heads * self.d_value, c.d_model, bias=c.attention_out_bias)
        # None would be one over the root of the kernel's head size, which is the latent's when entries are the keys.
        self.scores: Scores = {"scale": c.attention_scale or c.d_head**-0.5, "softcap": c.attention_softcap}

    @property
    def cache_width(self) -> int:
        """Values that the cache keeps of a token."""
        return self.R + self.config.d_rope

    def new_cache(self, n_rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str) -> LatentCache:
        """An empty cache of this layer's shapes."""
        return LatentCache(torch.zeros(n_rows, 1, capacity, self.cache_width, dtype=dtype, device=device))

    def new_pages(self, n: int, page: int, dtype: torch.dtype, device: torch.device | str) -> PagedLatent:
        """n empty pages of `page` tokens."""
        return PagedLatent(torch.zeros(n, 1, page, self.cache_width, dtype=dtype, device=device))

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        context: StepContext,
        cache: LayerCache | PagedLayer | None = None,
    ) -> Tensor:
        """Causal self-attention; with a cache, the new entries are written to it and the old ones are seen too."""
        B, T, _ = x.shape
        plain, turned, entries = self._projected(x, context)
        if cache is not None:
            assert isinstance(cache, LatentCache | PagedLatent)
            cache.write_entries(entries, context)
        if cache is not None and context.start:
            assert isinstance(cache, LatentCache | PagedLatent)
            entries, mask = cache.read_entries(B, T, context, self.spec.window)
            mixed = self._attend_cached(plain, turned, entries, mask)
        else:
            k, v = self._expanded(entries)
            q, v = torch.cat([plain, turned], -1), widened(v, k.shape[-1])
            attend = context.attend or attention
            mixed = attend(q, k, v, window=self.spec.window, cu_seqlens=context.cu_seqlens, **self.scores)
            mixed = mixed[..., : self.d_value]
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, self.config.n_heads * self.d_value))

    def decode(self, x: Tensor, cache: LayerCache, context: StepContext) -> Tensor:
        """`forward` for one new token a row, (B, D) -> (B, D); the context's angles are (B or 1, Dr/2)."""
        context = context._replace(cos=context.cos[:, None], sin=context.sin[:, None])
        return self.forward(x[:, None], context, cache)[:, 0]

    def _projected(self, x: Tensor, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries without position (B, H, T, Dn) and with RoPE (B, H, T, Dr), and the cache's entries (B, 1, T, R + Dr)."""
        B, T, _ = x.shape
        c = self.config
        q = self.q_proj(x) if c.d_query_latent is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        plain, turned = q.view(B, T, c.n_heads, c.d_head).transpose(1, 2).split([self.d_plain, c.d_rope], -1)
        latent, key = self.kv_a_proj_with_mqa(x).split([self.R, c.d_rope], -1)
        latent, key = self.kv_a_layernorm(latent)[:, None], key[:, None]  # (B, 1, T, R), (B, 1, T, Dr)
        if self.spec.rotates:
            if c.rope_interleaved:
                turned, key = halves(turned), halves(key)
            turned, key = rope(turned, key, context.cos, context.sin)
        return plain, turned, torch.cat([latent, key], -1)

    def _expanded(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Entries (B, 1, S, R + Dr) -> keys (B, H, S, Dn + Dr) and values (B, H, S, Dv)."""
        B, _, S, _ = entries.shape
        latent, key = entries[:, 0].split([self.R, self.config.d_rope], -1)
        made = self.kv_b_proj(latent).view(B, S, self.config.n_heads, -1).transpose(1, 2)
        plain, v = made.split([self.d_plain, self.d_value], -1)
        return torch.cat([plain, key[:, None].expand(-1, self.config.n_heads, -1, -1)], -1), v

    def _attend_cached(self, plain: Tensor, turned: Tensor, entries: Tensor, mask: Tensor | None) -> Tensor:
        """New queries over all entries (B, 1, S, R + Dr) -> (B, H, T, Dv), in the form that takes fewer products."""
        if not self._absorbs(plain.shape[2], entries.shape[2]):
            k, v = self._expanded(entries)
            return attention_masked(torch.cat([plain, turned], -1), k, v, mask, **self.scores)
        w = self.kv_b_proj.weight.view(self.config.n_heads, -1, self.R)
        w_k, w_v = w.split([self.d_plain, self.d_value], 1)  # (H, Dn, R), (H, Dv, R)
        q = torch.cat([plain @ w_k, turned], -1)  # (B, H, T, R + Dr)
        mixed = attention_masked(q, entries, entries, mask, **self.scores)[..., : self.R]
        return mixed @ w_v.transpose(1, 2)

    def _absorbs(self, T: int, S: int) -> bool:
        """Whether the absorbed form takes fewer products for T queries over S entries. An adapted or quantized kv_b_proj is a
        function, not a matrix: there the entries are expanded."""
        if type(self.kv_b_proj) is not nn.Linear:
            return False
        made = self.d_plain + self.d_value
        absorbed = T * self.R * made + 2 * T * S * self.cache_width
        expanded = S * self.R * made + T * S * (self.config.d_head + self.d_value)
        return absorbed < expanded


def halves(x: Tensor) -> Tensor:
    """(..., Dr) of pairs (x_0, x_1), (x_2, x_3), ... -> (x_0, x_2, ..., x_1, x_3, ...): the pairs that kernels/rope turns."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
