"""The sizes and switches of a decoder, and what each layer is made of."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .config_checks import check_config
from .rope_scaling import UNSCALED, RopeScaling


@dataclass(frozen=True)
class LayerSpec:
    """What one layer is made of. Layers with equal specs have equal shapes, memory and FLOPs."""

    window: int | None = None  # keys that a query sees, its own included; None: all before it
    rotates: bool = True  # queries and keys carry their positions by RoPE
    attention: str = (
        "grouped"  # grouped: grouped-query attention; latent: multi-head latent attention; linear: Gated DeltaNet
    )
    feed_forward: str = "gated"  # gated: SwiGLU or GeGLU; plain: without a gate; experts: a mixture of gated ones
    norm: str = (
        "pre"  # pre: before attention and feed-forward; post: after them, before the residual is added; sandwich: both;
        # add: after the residual is added
    )
    local_rope: bool = False  # RoPE's angles are those of rope_local_theta


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with RMSNorm, RoPE, grouped-query attention and a gated feed-forward layer or a mixture of such experts.

    Raises ValueError when the sizes don't fit each other.
    """

    vocab_size: int  # V, rows of the embedding
    d_model: int = 256  # D
    n_layers: int = 6  # blocks of attention and feed-forward
    n_heads: int = 8  # H, query heads
    n_kv_heads: int = 4  # K, key and value heads; H / K queries share one
    d_head: int = 32  # Dh; H * Dh need not equal D
    d_ff: int = 704  # F, width of the gated feed-forward layer
    max_seq_len: int = 512  # longest sequence in tokens
    rope_theta: float = 10_000.0  # base of RoPE's wavelengths
    rope_scaling: RopeScaling = UNSCALED
    rope_local_theta: float | None = None  # RoPE's base, unscaled, on layers with a window (Gemma 3); None: rope_theta
    norm_eps: float = 1e-6
    qk_norm: bool = True  # RMSNorm over each query's and key's Dh values, as in Qwen3
    qk_norm_joint: bool = False  # that RMSNorm is over the values of all heads together, as in OLMo 2
    post_norm: bool = False  # norms after attention and feed-forward, not before them (OLMo 2)
    sandwich_norm: bool = False  # norms before and after them (Gemma 2)
    offset_norm: bool = False  # norms multiply by 1 + weight (Gemma)
    scale_embeddings: bool = False  # embeddings are multiplied by sqrt(d_model) (Gemma)
    activation: str = "silu"  # of the gated feed-forward: silu or gelu_tanh (Gemma)
    attention_softcap: float | None = None  # scores <- cap * tanh(scores / cap) (Gemma 2); None: no cap
    logit_softcap: float | None = None  # the same of the logits
    query_pre_attn_scalar: int | None = None  # scores are divided by its square root; None: d_head
    add_norm: bool = False  # norms after the residual is added, and none before the head (the model of 2017)
    layer_norm: bool = False  # norms are LayerNorm with a bias, not RMSNorm
    positions: str = "rope"  # rope, or vectors added to the embeddings: sinusoidal (2017) or learned (GPT-2)
    gated: bool = True  # feed-forward layers have a gate; false: down_proj(act(up_proj(x)))
    d_latent: int | None = (
        None  # R, keys and values are made from so wide a latent (MLA); None: grouped-query attention
    )
    d_query_latent: int | None = None  # queries from one so wide; None: from the hidden state
    d_rope: int = 0  # with a latent: of d_head's dimensions those that RoPE turns, whose key all heads share
    d_value: int | None = None  # with a latent: width of a head's values; None: d_head
    rope_interleaved: bool = True  # with a latent: RoPE turns neighbours, not halves (DeepSeek)
    tie_embeddings: bool = True  # lm_head shares embed_tokens' weight
    attention_bias: bool = False  # q, k, v projections have a bias (Qwen2)
    attention_out_bias: bool = False  # o_proj has a bias (Llama with attention_bias)
    mlp_bias: bool = False  # gate, up and down projections have a bias
    sliding_window: int | None = None  # a query sees its last w keys (Mistral); None: all
    sliding_layers: tuple[bool, ...] | None = None  # which layers have that window (Qwen2, Qwen3); None: all of them
    rope_layers: tuple[bool, ...] | None = None  # which layers rotate queries and keys (SmolLM3); None: all of them
    n_experts: int = 0  # feed-forwards of a layer's mixture of experts; 0: no mixture
    n_experts_per_token: int = 2  # of which each token is read by so many
    d_expert: int | None = None  # an expert's width; None: d_ff
    d_shared_expert: int = 0  # width of an expert that reads every token; 0: none
    gate_shared_expert: bool = True  # that expert has a gate of its own for each token (Qwen2-MoE)
    router: str = "softmax"  # scores of the experts: softmax, or sigmoid of each alone (DeepSeek-V3)
    router_bias: bool = False  # a bias that choosing sees and weighing doesn't keeps experts equally busy
    bias_rate: float = 0.0  # by which that bias moves after each training step; 0: it stays
    n_expert_groups: int = 1  # groups of experts, of which each token reads from a few
    n_groups_per_token: int = 1  # from so many
    routed_scale: float = 1.0  # times the experts' sum, the shared one left out
    expert_layers: tuple[bool, ...] | None = None  # which layers have the mixture; None: all of them
    linear_layers: tuple[bool, ...] | None = (
        None  # which have Gated DeltaNet in place of attention (Qwen3-Next); None: none
    )
    n_linear_k_heads: int | None = None  # query and key heads of those layers; None: n_heads
    n_linear_v_heads: int | None = None  # value heads, a multiple of n_linear_k_heads; None: n_linear_k_heads
    d_linear_k: int | None = None  # width of such a query or key; None: d_head
    d_linear_v: int | None = None  # width of such a value; None: d_linear_k
    linear_conv: int = 4  # tokens that their short convolution sees
    attention_gate: bool = False  # attention's output is multiplied by a sigmoid of its input (Qwen3-Next)
    rope_fraction: float = 1.0  # share of each query's and key's dimensions that RoPE turns, the first ones
    normalize_experts: bool = True  # the weights of a token's experts add up to 1
    balance_loss: float = 0.01  # times the loss that keeps experts equally busy, added to the cross entropy in training
    router_z_loss: float = 0.0  # times the mean square of the router's log-sum-exp, the same
    n_predict: int = 0  # further tokens that training predicts, by a layer each (DeepSeek-V3); 0: none
    predict_loss: float = 0.3  # times the mean of their losses, added to the next token's
    init_std: float = 0.02  # standard deviation of the initial weights
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None  # generation stops at any of them
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_config(self)

    def layer(self, i: int) -> LayerSpec:
        """What layer i is made of, i in [0, n_layers)."""
        slides = self.sliding_layers is None or self.sliding_layers[i]
        mixes = self.n_experts > 0 and (self.expert_layers is None or self.expert_layers[i])
        is_linear = self.linear_layers is not None and self.linear_layers[i]
        return LayerSpec(
            window=self.sliding_window if slides and not is_linear else None,
            rotates=self.positions == "rope" and not is_linear and (self.rope_layers is None or self.rope_layers[i]),
            attention="linear" if is_linear else "grouped" if self.d_latent is None else "latent",
            feed_forward="experts" if mixes else "gated" if self.gated else "plain",
            norm="sandwich" if self.sandwich_norm else "post" if self.post_norm else "add" if self.add_norm else "pre",
            local_rope=slides and not is_linear and self.rope_local_theta is not None,
        )

    @property
    def attention_scale(self) -> float | None:
        """What scores are multiplied by; None: 1 / sqrt(d_head). DeepSeek multiplies by YaRN's factor twice, once a side."""
        yarn = self.rope_scaling.score_factor if self.d_latent is not None else 1.0
        if self.query_pre_attn_scalar is None and yarn == 1.0:
            return None
        return yarn * (self.query_pre_attn_scalar or self.d_head) ** -0.5

    @property
    def value_width(self) -> int:
        """Dv, of one head's values."""
        return self.d_head if self.d_value is None else self.d_value

    @property
    def decodes_short(self) -> bool:
        """Whether one new token a row may go through kernels/decode: it knows RMSNorm on the residual stream alone."""
        return not (self.layer_norm or self.add_norm)

    @property
    def linear(self) -> "LinearSizes":
        """The sizes of linear layers."""
        n_k_heads, d_k = self.n_linear_k_heads or self.n_heads, self.d_linear_k or self.d_head
        return LinearSizes(n_k_heads, self.n_linear_v_heads or n_k_heads, d_k, self.d_linear_v or d_k, self.linear_conv)

    @property
    def n_linear_layers(self) -> int:
        """Layers whose past is a state of one size, in place of keys and values."""
        return sum(self.linear_layers or ())

    @property
    def d_rotary(self) -> int:
        """Dimensions of a query or key that RoPE turns."""
        return self.d_rope if self.d_latent is not None else int(self.d_head * self.rope_fraction)

    @property
    def expert_width(self) -> int:
        """F of one expert."""
        return self.d_ff if self.d_expert is None else self.d_expert

    @property
    def n_params(self) -> int:
        """Parameters, the tied embedding counted once."""
        return self._count(self.layer_params)

    @property
    def n_active_params(self) -> int:
        """Parameters that one token meets: of a mixture's experts only those that read it."""
        return self._count(lambda spec: self.layer_params(spec, active=True))

    def _count(self, layer_params: Callable[[LayerSpec], int]) -> int:
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        specs = Counter(self.layer(i) for i in range(self.n_layers))
        embeddings += self.max_seq_len * self.d_model * (self.positions == "learned")
        last = 0 if self.add_norm else self.norm_params(self.d_model)
        D, of_last = self.d_model, layer_params(self.layer(self.n_layers - 1))
        further = self.n_predict * (2 * D * D + 3 * self.norm_params(D) + of_last)  # multi_token.py
        return embeddings + sum(n * layer_params(spec) for spec, n in specs.items()) + last + further

    def layer_params(self, spec: LayerSpec, *, active: bool = False) -> int:
        """Parameters of one layer; with `active`, those that one token meets."""
        q, kv = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        attention = self.d_model * ((2 + self.attention_gate) * q + 2 * kv)
        attention += ((1 + self.attention_gate) * q + 2 * kv) * self.attention_bias
        attention += self.d_model * self.attention_out_bias
        norms = (q + kv if self.qk_norm_joint else 2 * self.d_head) * self.qk_norm
        if spec.attention == "linear":
            attention, norms = self.linear.n_params(self.d_model), 0
        norms = self.norm_params(norms)
        norms += (4 if spec.norm == "sandwich" else 2) * self.norm_params(self.d_model)
        if spec.attention == "latent":
            attention = self._latent_params()
        if spec.feed_forward == "plain":
            return attention + 2 * self.d_model * self.d_ff + (self.d_ff + self.d_model) * self.mlp_bias + norms
        if spec.feed_forward == "gated":
            return attention + self._gated_params(self.d_ff) + norms
        read = self.n_experts_per_token if active else self.n_experts
        experts = self.d_model * self.n_experts + read * 3 * self.d_model * self.expert_width
        if self.d_shared_expert:
            experts += self._gated_params(self.d_shared_expert) + self.d_model * self.gate_shared_expert
        experts += self.n_experts * self.router_bias
        return attention + experts + norms

    def norm_params(self, n: int) -> int:
        """Of norms over n values in all."""
        return 2 * n if self.layer_norm else n

    def _latent_params(self) -> int:
        assert self.d_latent is not None
        D, H, R, Rq = self.d_model, self.n_heads, self.d_latent, self.d_query_latent
        queries = D * H * self.d_head if Rq is None else Rq * (D + 1 + H * self.d_head + self.attention_bias)
        entries = (D + self.attention_bias) * (R + self.d_rope) + R
        made = R * H * (self.d_head - self.d_rope + self.value_width)
        return queries + entries + made + D * (H * self.value_width + self.attention_out_bias)

    def _gated_params(self, width: int) -> int:
        return 3 * self.d_model * width + (2 * width + self.d_model) * self.mlp_bias


class LinearSizes(NamedTuple):
    """A Gated DeltaNet layer."""

    n_k_heads: int  # of queries and keys
    n_v_heads: int
    d_k: int
    d_v: int
    conv: int  # tokens that the convolution sees

    @property
    def k_width(self) -> int:
        """All keys of a token."""
        return self.n_k_heads * self.d_k

    @property
    def v_width(self) -> int:
        """All values of a token."""
        return self.n_v_heads * self.d_v

    def n_params(self, d_model: int) -> int:
        """Parameters of such a layer, its own norm included."""
        projections = d_model * (2 * self.k_width + 3 * self.v_width + 2 * self.n_v_heads)
        return projections + (2 * self.k_width + self.v_width) * self.conv + 2 * self.n_v_heads + self.d_v
