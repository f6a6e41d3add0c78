"""The layer with norms before and after each branch (Gemma 2, arXiv:2408.00118, section 2)."""

from torch import Tensor, nn

from ...kernels.decode import add_rms_norm_
from .attention import Attention
from .config import LayerSpec, ModelConfig
from .experts import feed_forward
from .kv_cache import LayerCache, StepContext
from .norm import norm
from .paged_cache import PagedLayer


class SandwichLayer(nn.Module):
    """x + norm(attention(norm(x))), then + norm(feed_forward(norm(.))). (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.input_layernorm = norm(config, config.d_model)
        self.self_attn = Attention(config, spec)
        self.post_attention_layernorm = norm(config, config.d_model)
        self.pre_feedforward_layernorm = norm(config, config.d_model)
        self.mlp = feed_forward(config, spec)
        self.post_feedforward_layernorm = norm(config, config.d_model)

    def forward(self, x: Tensor, context: StepContext, cache: LayerCache | PagedLayer | None = None) -> Tensor:
        mixed = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), context, cache))
        normed, x = self.pre_feedforward_layernorm.add(mixed, x)
        return x + self.post_feedforward_layernorm(self.mlp(normed, context))

    def decode(self, pending: Tensor | None, stream: Tensor, context: StepContext, cache: LayerCache) -> Tensor:
        """`forward` for one new token a row; see DecoderLayer.decode."""
        before = self.input_layernorm
        mixed = self.self_attn.decode(add_rms_norm_(pending, stream, before.gain, before.eps), cache, context)
        before = self.pre_feedforward_layernorm
        normed = add_rms_norm_(self.post_attention_layernorm(mixed), stream, before.gain, before.eps)
        return self.post_feedforward_layernorm(self.mlp.decode(normed))
