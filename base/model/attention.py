"""Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245) with RoPE and optional QK-norm."""

from collections.abc import Callable
from typing import ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention import attention
from ...kernels.attention.masked import attention_masked
from ...kernels.decode import place_token_
from ...kernels.paged_attention import paged_attention
from ...kernels.rope import rope
from .config import LayerSpec, ModelConfig
from .kv_cache import LayerCache, StepContext
from .norm import norm
from .paged_cache import PagedLayer

# Keys and values (B or 1, K, P, Dh) that stand before the rows' own, and what hides some of them: (B, 1, 1, P) of 0 and -inf.
Before = tuple[Tensor, Tensor, Tensor | None]


class Scores(TypedDict):
    """How the products of queries and keys become scores, for every kernel alike."""

    scale: float | None  # None: 1 / sqrt(Dh)
    softcap: float | None


class Attention(nn.Module):
    """q, k, v projections -> RoPE -> attention -> o_proj. Shapes: x (B, T, D) -> (B, T, D)."""

    ROLES: ClassVar = {
        "q_proj.weight": "hidden", "k_proj.weight": "hidden", "v_proj.weight": "hidden", "o_proj.weight": "residual",
        "q_proj.bias": "bias", "k_proj.bias": "bias", "v_proj.bias": "bias", "o_proj.bias": "bias",
    }  # fmt: skip

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        q_width, kv_width = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        gated = 2 if config.attention_gate else 1  # each head's query, then its gate
        self.q_proj = nn.Linear(config.d_model, gated * q_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_width, config.d_model, bias=config.attention_out_bias)
        if config.qk_norm:
            joint = config.qk_norm_joint
            self.q_norm = norm(config, q_width if joint else config.d_head)
            self.k_norm = norm(config, kv_width if joint else config.d_head)
        self.scores: Scores = {"scale": config.attention_scale, "softcap": config.attention_softcap}
        # What every token sees beside the row's own keys, if anything gives it: dtype -> Before, or None.
        self.prefix: Callable[[torch.dtype], Before | None] | None = None

    @property
    def cache_width(self) -> int:
        """Values that the cache keeps of a token."""
        return 2 * self.config.n_kv_heads * self.config.d_head

    def new_pages(self, n: int, page: int, dtype: torch.dtype, device: torch.device | str) -> PagedLayer:
        """n empty pages of `page` tokens."""
        return PagedLayer(*self.new_cache(n, page, dtype, device).tensors())

    def new_cache(self, n_rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str) -> LayerCache:
        """An empty cache of this layer's shapes."""
        shape = (n_rows, self.config.n_kv_heads, capacity, self.config.d_head)
        return LayerCache(
            torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
        )

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        context: StepContext,  # angles and masks that all layers share
        cache: LayerCache | PagedLayer | None = None,
    ) -> Tensor:
        """Causal self-attention; with a cache, the new keys are written to it and the old ones are seen too."""
        B, T, _ = x.shape
        c = self.config
        q, k, gate = self.q_proj(x), self.k_proj(x), None
        if c.attention_gate:
            q, gate = q.view(B, T, c.n_heads, 2 * c.d_head).chunk(2, -1)
            q, gate = q.reshape(B, T, -1), gate.reshape(B, T, -1)
        if c.qk_norm and c.qk_norm_joint:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.view(B, T, c.n_heads, c.d_head), k.view(B, T, c.n_kv_heads, c.d_head)
        v = self.v_proj(x).view(B, T, c.n_kv_heads, c.d_head).transpose(1, 2)  # (B, K, T, Dh)
        if c.qk_norm and not c.qk_norm_joint:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, Dh), (B, K, T, Dh)
        if self.spec.rotates:
            q, k = turned(q, k, *context.angles(local=self.spec.local_rope))
        if cache is not None:
            cache.write(k, v, context)
        before = self.prefix(k.dtype) if self.prefix is not None else None
        if before is not None:
            if isinstance(cache, PagedLayer):
                raise ValueError(
                    "prefix adapters read keys and values kept in rows, not in pages; leave cache_bytes out"
                )
            mixed = self._attend_after(before, q, k, v, cache, context)
        elif isinstance(cache, PagedLayer) and context.start and context.pages is not None:
            table, lengths = context.pages.table, context.pages.lengths
            mixed = paged_attention(q, cache.keys, cache.values, table, lengths, window=self.spec.window, **self.scores)
        elif isinstance(cache, LayerCache) and context.start:
            mixed = self._attend_cached(q, cache, context)
        else:  # the new keys are the only ones
            attend = context.attend or attention
            mixed = attend(q, k, v, window=self.spec.window, cu_seqlens=context.cu_seqlens, **self.scores)
        mixed = mixed.transpose(1, 2).reshape(B, T, c.n_heads * c.d_head)
        return self.o_proj(mixed if gate is None else mixed * gate.sigmoid())

    def _attend_cached(self, q: Tensor, cache: LayerCache, context: StepContext) -> Tensor:
        """New queries (B, H, T, Dh) over all keys in the cache -> (B, H, T, Dh)."""
        keys, values, mask = cache.read(q.shape[0], context, self.spec.window)  # (B, K, S, Dh), (B or 1, 1, T, S)
        if mask is None and q.is_cuda:
            return attention(q, keys, values, **self.scores)
        return attention_masked(q, keys, values, mask, **self.scores)

    def _attend_after(
        self, before: Before, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, context: StepContext
    ) -> Tensor:
        """New queries (B, H, T, Dh) over `before`, then over the keys that they see without it -> (B, H, T, Dh)."""
        T, mask = q.shape[2], None
        if cache is not None and context.start:
            k, v, mask = cache.read(q.shape[0], context, self.spec.window)
        elif before[2] is not None or context.cu_seqlens is not None:
            mask = causal_mask(T, context.cu_seqlens, k)
        keys, values, mask = joined(before, k, v, mask)
        if mask is None:  # causal, aligned at the right end: all of `before` is seen
            return attention(q, keys, values, **self.scores)
        return attention_masked(q, keys, values, mask, **self.scores)

    def decode(self, x: Tensor, cache: LayerCache, context: StepContext) -> Tensor:
        """`forward` for one new token a row, (B, D) -> (B, D), in few operators: only where kernels.decode can run."""
        c, B = self.config, x.shape[0]
        if c.attention_gate or c.d_rotary < c.d_head:
            context = context._replace(cos=context.cos[:, None], sin=context.sin[:, None])
            return self.forward(x[:, None], context, cache)[:, 0]
        q, k, v = project(self.q_proj, x), project(self.k_proj, x), project(self.v_proj, x)
        norms = {}
        if c.qk_norm and c.qk_norm_joint:
            q, k = self.q_norm(q), self.k_norm(k)
        elif c.qk_norm:
            norms = {"q_weight": self.q_norm.gain, "k_weight": self.k_norm.gain, "eps": self.q_norm.eps}
        cos, sin = context.angles(local=self.spec.local_rope) if self.spec.rotates else context.unturned
        place_token_(q, k, v, cos, sin, cache.keys, cache.values, context.start, **norms)
        keys, values, mask = cache.read(B, context, self.spec.window)
        before = self.prefix(keys.dtype) if self.prefix is not None else None
        if before is not None:
            keys, values, mask = joined(before, keys, values, mask)
        mixed = attention_masked(q.view(B, c.n_heads, 1, c.d_head), keys, values, mask, **self.scores)
        return project(self.o_proj, mixed.reshape(B, c.n_heads * c.d_head))


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE over the first R dimensions of q (B, H, T, Dh) and k (B, K, T, Dh); cos and sin are (B or 1, T, R/2)."""
    R = 2 * cos.shape[-1]
    if q.shape[-1] == R:
        return rope(q, k, cos, sin)
    first = rope(q[..., :R], k[..., :R], cos, sin)
    return torch.cat([first[0], q[..., R:]], -1), torch.cat([first[1], k[..., R:]], -1)


def joined(
    before: Before,
    keys: Tensor,  # (B, K, S, Dh)
    values: Tensor,
    mask: Tensor | None,  # (B or 1, 1, T, S); None: every key is seen
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values (B, K, P + S, Dh) and their mask; None where nothing is hidden that was not before."""
    first_keys, first_values, hidden = before
    keys = torch.cat([first_keys.expand(keys.shape[0], -1, -1, -1), keys], 2)
    values = torch.cat([first_values.expand(values.shape[0], -1, -1, -1), values], 2)
    if mask is None and hidden is None:
        return keys, values, None
    n, S = first_keys.shape[2], keys.shape[2] - first_keys.shape[2]
    left = keys.new_zeros(1, 1, 1, n) if hidden is None else hidden
    right = keys.new_zeros(1, 1, 1, S) if mask is None else mask
    rows, T = max(left.shape[0], right.shape[0]), right.shape[2]
    return keys, values, torch.cat([left.expand(rows, 1, T, n), right.expand(rows, 1, T, S)], -1)


def causal_mask(T: int, cu_seqlens: Tensor | None, like: Tensor) -> Tensor:
    """(1, 1, T, T) of 0 and -inf: a token sees itself and those before it, of its own document where several are packed."""
    seen = torch.ones(T, T, dtype=torch.bool, device=like.device).tril()
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(T, device=like.device), cu_seqlens[1:], right=True)
        seen &= document[:, None] == document
    return torch.zeros(1, 1, T, T, dtype=like.dtype, device=like.device).masked_fill(~seen, -torch.inf)


def project(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), without nn.Module's call where it has no hooks: 3 to 5 us less, 45 times a decoding step."""
    if module._forward_hooks or module._forward_pre_hooks:
        return module(x)
    if type(module) is nn.Linear:
        return F.linear(x, module.weight, module.bias)
    return module.forward(x)
