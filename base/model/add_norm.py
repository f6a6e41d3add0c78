"""The layer of 2017, with norms after the residual is added (Vaswani et al., arXiv:1706.03762, section 3.1)."""

from torch import Tensor, nn

from .attention import Attention
from .config import LayerSpec, ModelConfig
from .experts import feed_forward
from .kv_cache import LayerCache, StepContext
from .norm import norm
from .paged_cache import PagedLayer


class AddNormLayer(nn.Module):
    """norm(x + attention(x)), then norm(. + feed_forward(.)). (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.self_attn = Attention(config, spec)
        self.post_attention_layernorm = norm(config, config.d_model)
        self.mlp = feed_forward(config, spec)
        self.post_feedforward_layernorm = norm(config, config.d_model)

    def forward(self, x: Tensor, context: StepContext, cache: LayerCache | PagedLayer | None = None) -> Tensor:
        x, _ = self.post_attention_layernorm.add(self.self_attn(x, context, cache), x)
        return self.post_feedforward_layernorm.add(self.mlp(x, context), x)[0]

    def decode(self, pending: Tensor | None, stream: Tensor, context: StepContext, cache: LayerCache) -> Tensor:
        """Not there: ModelConfig.decodes_short is false."""
        raise NotImplementedError
