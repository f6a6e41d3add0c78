"""The decoder: embed -> n_layers x (attention, feed-forward) -> norm -> lm_head.

Axes: B batch, T query positions, D model, V vocabulary. Module paths are the keys in a Hugging Face checkpoint, so a
state dict is the file's.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..generate.kv_cache import KVCache, LayerCache
from .attention import Attention
from .config import ModelConfig
from .feed_forward import FeedForward
from .norm import RMSNorm
from .recompute import recompute
from .rope import inverse_frequencies, rope_tables


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then + feed_forward(norm(.)): pre-norm (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens=cu_seqlens, cache=cache)
        normed, x = self.post_attention_layernorm.add(mixed, x)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """Everything below the output projection: ids -> hidden states after the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            DecoderLayer(replace(config, sliding_window=config.layer(i).window, sliding_layers=None))
            for i in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)


class Transformer(nn.Module):
    """A causal language model. `checkpointing` recomputes each layer in the backward pass instead of keeping it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.fingerprint: str | None = None  # of the files it was loaded from; see huggingface.fingerprint
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        ids: Tensor,  # (B, T) int64
        *,
        positions: Tensor | None = None,  # (B, T) int64; default: 0..T-1, or the cache's next ones
        cu_seqlens: Tensor | None = None,  # (n_docs + 1,) int32 with B = 1: documents packed in one row
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V): [b, t] scores the token after ids[b, t]."""
        return self.lm_head(self.hidden_states(ids, positions=positions, cu_seqlens=cu_seqlens, cache=cache))

    def hidden_states(
        self,
        ids: Tensor,  # (B, T) int64
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The final norm's output (B, T, D), which lm_head turns into logits. Does not advance the cache's lengths."""
        T = ids.shape[1]
        if positions is None:
            positions = torch.arange(T, device=ids.device)[None]  # (1, T)
            if cache is not None:
                positions = positions + cache.lengths[:, None]  # (B, T)
        x = self.model.embed_tokens(ids)  # (B, T, D)
        cos, sin = rope_tables(positions, inverse_frequencies(self.config, ids.device))
        for i, layer in enumerate(self.model.layers):
            layer_cache = cache.layers[i] if cache is not None else None
            if self.checkpointing and self.training and cache is None:
                x = recompute(layer, x, cos, sin, cu_seqlens, None)
            else:
                x = layer(x, cos, sin, cu_seqlens, layer_cache)
        return self.model.norm(x)


def initialize_(model: Transformer, *, seed: int) -> None:
    """Fill the weights in place: N(0, init_std^2); projections back into the residual stream are divided by
    sqrt(2 * n_layers) (Radford et al. 2019, GPT-2, section 2.3); norms 1, biases 0. Depends on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    std = model.config.init_std
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                back = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = std / (2 * model.config.n_layers) ** 0.5 if back else std
                values = torch.empty(parameter.shape).normal_(0.0, scale, generator=generator)
                parameter.copy_(values)
