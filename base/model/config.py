"""The sizes and switches of a decoder, and the presets that graft names."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
ACTIVATIONS = ("silu", "gelu_tanh", "relu")
POSITIONS = ("rope", "sinusoidal", "learned")
# Above these a config is a slip or damage; refused before anything is built.
LARGEST = {
    "vocab_size": 2**26, "d_model": 2**20, "n_layers": 10_000, "n_heads": 2**16, "n_kv_heads": 2**16, "d_head": 2**16,
    "n_linear_k_heads": 2**16, "n_linear_v_heads": 2**16, "d_linear_k": 2**16, "d_linear_v": 2**16, "linear_conv": 64,
    "d_ff": 2**24, "max_seq_len": 2**31, "n_experts": 2**16, "d_expert": 2**24, "d_shared_expert": 2**24,
}  # fmt: skip
PATTERNS = ("sliding_layers", "rope_layers", "expert_layers", "linear_layers")  # fields with an entry for each layer


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched beyond the pretrained length.

    linear: Chen et al. 2023, arXiv:2306.15595; yarn: Peng et al. 2023, arXiv:2309.00071; llama3: its report, section 3.4.
    dynamic changes frequencies beyond max_seq_len alone, which no sequence here passes, so it computes as default.
    """

    rope_type: str = "default"  # default: none; linear: positions / factor; llama3, yarn: low frequencies / factor
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original / high are kept
    original_max_seq_len: int = 8192
    beta_fast: float = 32.0  # yarn: dimensions that turn more often than this in the original length are kept
    beta_slow: float = 1.0  # yarn: those that turn less often are divided by factor
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    truncate: bool = True  # yarn: the bounds between them are whole dimensions
    mscale: float = (
        0.0  # yarn, DeepSeek's: what attention_factor was made from, and with a latent the scores' factor too
    )
    mscale_all_dim: float = 0.0

    @property
    def score_factor(self) -> float:
        """What latent attention multiplies scores by, beyond 1 / sqrt(d_head): mscale of all dimensions, squared."""
        if self.rope_type != "yarn" or not self.mscale_all_dim or self.factor <= 1:
            return 1.0
        return (0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0) ** 2

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type {self.rope_type!r} is not supported; known are {', '.join(ROPE_TYPES)}")
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_seq_len",
            "beta_fast",
            "beta_slow",
            "attention_factor",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r} must be > 0 and finite")
        for name in ("mscale", "mscale_all_dim"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)!r} must be >= 0 and finite")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be less than high_freq_factor={self.high_freq_factor}"
            )


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
    rope_scaling: RopeScaling = RopeScaling()
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
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff", "max_seq_len"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number >= 1")
            if value > LARGEST[name]:
                raise ValueError(
                    f"{name}={value} is more than {LARGEST[name]:,}, beyond any model that graft can build"
                )
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}={getattr(self, name)!r} must be > 0 and finite")
        if self.sliding_window is not None and not 1 <= self.sliding_window <= LARGEST["max_seq_len"]:
            raise ValueError(f"sliding_window={self.sliding_window} must be a whole number >= 1, or none")
        if self.sliding_layers is not None and self.sliding_window is None:
            raise ValueError("sliding_layers is given without sliding_window; set the window, or leave both out")
        self._check_gemma()
        self._check_latent()
        if type(self.n_predict) is not int or not 0 <= self.n_predict < self.max_seq_len - 1:
            raise ValueError(f"n_predict={self.n_predict!r} must be a whole number from 0, and below max_seq_len - 1")
        if not (math.isfinite(self.predict_loss) and self.predict_loss >= 0):
            raise ValueError(f"predict_loss={self.predict_loss!r} must be >= 0 and finite")
        if self.expert_layers is not None and not self.n_experts:
            raise ValueError("expert_layers is given without n_experts; set it, or leave both out")
        self._check_linear()
        for name in PATTERNS:
            layers = getattr(self, name)
            if layers is not None and len(layers) != self.n_layers:
                raise ValueError(f"{name} names {len(layers)} layers, n_layers={self.n_layers}; name each layer once")
        if self.n_experts:
            self._check_experts()
        if self.qk_norm_joint and not self.qk_norm:
            raise ValueError("qk_norm_joint says how qk_norm is taken; set qk_norm=true, or leave it out")
        if self.n_heads % self.n_kv_heads:
            fits = [k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            shown = ", ".join(map(str, fits[:12])) + (", ..." if len(fits) > 12 else "")
            raise ValueError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}; use one of {shown}"
            )
        if self.d_head % 2:
            raise ValueError(f"d_head={self.d_head} is odd; RoPE rotates pairs, use an even d_head")

    def _check_gemma(self) -> None:
        for name in ("attention_softcap", "logit_softcap", "query_pre_attn_scalar", "rope_local_theta"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r} must be > 0 and finite, or none")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not known; choose {' or '.join(ACTIVATIONS)}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r} is not known; choose {', '.join(POSITIONS)}")
        if self.activation == "relu" and self.gated:
            raise ValueError("activation=relu is of feed-forward layers without a gate; set gated=false, or take silu")
        if not self.gated and self.n_experts:
            raise ValueError("gated=false is not covered for experts; leave it or n_experts out")
        if self.layer_norm and self.offset_norm:
            raise ValueError("layer_norm and offset_norm are two kinds of norms; choose one")
        if self.activation != "silu" and self.n_experts:
            raise ValueError(f"activation={self.activation} is not covered for experts, only silu")
        if self.sandwich_norm + self.post_norm + self.add_norm > 1:
            raise ValueError("sandwich_norm, post_norm and add_norm are places of the norms; choose one")
        if self.rope_local_theta is not None and self.sliding_window is None:
            raise ValueError("rope_local_theta is of layers with a window; set sliding_window, or leave both out")

    def _check_linear(self) -> None:
        for name in ("n_linear_k_heads", "n_linear_v_heads", "d_linear_k", "d_linear_v", "linear_conv"):
            value, least = getattr(self, name), 2 if name == "linear_conv" else 1
            if value is not None and (type(value) is not int or not least <= value <= LARGEST[name]):
                raise ValueError(f"{name}={value!r} must be a whole number from {least} to {LARGEST[name]:,}")
        if self.linear.n_v_heads % self.linear.n_k_heads:
            raise ValueError(
                f"n_linear_v_heads={self.linear.n_v_heads} is not divisible by n_linear_k_heads={self.linear.n_k_heads}; "
                "each key head serves the same number of value heads"
            )
        if self.linear_layers is not None and (self.post_norm or self.sandwich_norm or self.add_norm):
            raise ValueError(
                "linear_layers is not covered with post_norm, sandwich_norm or add_norm; leave one of them out"
            )
        fits = 0 < self.rope_fraction <= 1 and self.d_rotary >= 2 and self.d_rotary % 2 == 0
        if self.d_head % 2 == 0 and not fits:
            raise ValueError(
                f"rope_fraction={self.rope_fraction} of d_head={self.d_head} turns {self.d_rotary} dimensions; RoPE turns pairs, "
                "an even number from 2 to d_head"
            )

    def _check_latent(self) -> None:
        if self.d_latent is None:
            given = [name for name in ("d_query_latent", "d_rope", "d_value") if getattr(self, name)]
            if given:
                raise ValueError(f"{given[0]} is given without d_latent; set the latent's width, or leave both out")
            return
        for name, least in (("d_latent", 1), ("d_query_latent", 1), ("d_value", 1), ("d_rope", 2)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value <= LARGEST["d_model"]):
                raise ValueError(f"{name}={value!r} must be a whole number from {least} to {LARGEST['d_model']:,}")
        if self.d_rope % 2 or self.d_rope >= self.d_head:
            raise ValueError(
                f"d_rope={self.d_rope} must be even and less than d_head={self.d_head}, which holds it and the part without RoPE"
            )
        if self.value_width > self.d_head:
            raise ValueError(
                f"d_value={self.d_value} is more than d_head={self.d_head}; kernels take values up to that width"
            )
        if self.n_kv_heads != self.n_heads:
            raise ValueError(
                f"n_kv_heads={self.n_kv_heads}: with d_latent every head has its own keys; use n_heads={self.n_heads}"
            )
        others = (
            self.rope_local_theta is not None
            or self.attention_gate
            or self.rope_fraction != 1
            or self.positions != "rope"
        )
        if self.qk_norm or others:
            raise ValueError(
                "qk_norm, rope_local_theta, attention_gate, rope_fraction and positions are not covered with d_latent; leave "
                "them out (qk_norm=false)"
            )

    def _check_experts(self) -> None:
        for name, least in (("n_experts", 2), ("d_shared_expert", 0), ("d_expert", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value <= LARGEST[name]):
                raise ValueError(f"{name}={value!r} must be a whole number from {least} to {LARGEST[name]:,}")
        if not 1 <= self.n_experts_per_token <= self.n_experts:
            raise ValueError(
                f"n_experts_per_token={self.n_experts_per_token} must lie between 1 and n_experts={self.n_experts}"
            )
        if self.router not in ("softmax", "sigmoid"):
            raise ValueError(f"router={self.router!r} is not known; choose softmax or sigmoid")
        if self.bias_rate and not self.router_bias:
            raise ValueError(
                f"bias_rate={self.bias_rate} moves the router's bias; set router_bias=true, or leave it out"
            )
        self._check_groups()
        for name in ("balance_loss", "router_z_loss", "bias_rate", "routed_scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)!r} must be >= 0 and finite")

    def _check_groups(self) -> None:
        n, most = self.n_expert_groups, self.n_groups_per_token
        if n < 1 or self.n_experts % n:
            raise ValueError(f"n_experts={self.n_experts} is not divisible into n_expert_groups={n}; choose a divisor")
        if not 1 <= most <= n:
            raise ValueError(f"n_groups_per_token={most} must lie between 1 and n_expert_groups={n}")
        size = self.n_experts // n
        if most * size < self.n_experts_per_token:
            raise ValueError(
                f"n_experts_per_token={self.n_experts_per_token} is more than the {most * size} experts of "
                f"n_groups_per_token={most} groups; raise it"
            )
        if self.router_bias and n > 1 and size < 2:
            raise ValueError(f"n_expert_groups={n} leaves {size} expert a group; a group is scored by its two best")

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


def with_sizes(config: ModelConfig, **sizes: object) -> ModelConfig:
    """Replace sizes; what follows from a replaced one follows it, unless it is given too: d_head = d_model / n_heads,
    n_kv_heads by the same sharing, d_ff = 8/3 d_model. A pattern of fewer layers repeats.

    Raises ValueError when d_model is not divisible by n_heads and no d_head is given, and for a pattern that doesn't divide
    the layers.
    """
    n_layers = sizes.get("n_layers", config.n_layers)
    for name in PATTERNS:
        pattern = sizes.get(name)
        if isinstance(pattern, tuple) and pattern and isinstance(n_layers, int) and len(pattern) < n_layers:
            if n_layers % len(pattern):
                raise ValueError(
                    f"{name} is a pattern of {len(pattern)} layers, which does not divide n_layers={n_layers}; use a multiple of it"
                )
            sizes[name] = pattern * (n_layers // len(pattern))
    if "d_head" not in sizes and ("d_model" in sizes or "n_heads" in sizes):
        d_model, n_heads = sizes.get("d_model", config.d_model), sizes.get("n_heads", config.n_heads)
        if not (isinstance(d_model, int) and isinstance(n_heads, int) and d_model > 0 and n_heads > 0):
            raise ValueError(f"d_model={d_model!r} and n_heads={n_heads!r} must be whole numbers >= 1")
        if d_model % n_heads:
            below, above = d_model // n_heads * n_heads, -(-d_model // n_heads) * n_heads
            choice = f"{below} or {above}" if below else str(above)
            raise ValueError(f"d_model={d_model} is not divisible by n_heads={n_heads}; use d_model {choice}")
        sizes["d_head"] = d_model // n_heads
    if sizes.get("d_latent") is not None:  # every head has its own keys, and no norm of them
        sizes = {"n_kv_heads": sizes.get("n_heads", config.n_heads), "qk_norm": False} | sizes
    if "n_heads" in sizes and "n_kv_heads" not in sizes:
        # Keep the sharing ratio where it divides, else give each query head its own keys.
        n_heads = sizes["n_heads"]
        assert isinstance(n_heads, int)
        share = config.n_heads // config.n_kv_heads
        sizes["n_kv_heads"] = n_heads // share if n_heads % share == 0 else n_heads
    if "d_model" in sizes and "d_ff" not in sizes:
        gated = sizes.get("gated", config.gated)
        sizes["d_ff"] = gated_width(sizes["d_model"]) if gated else 4 * sizes["d_model"]  # pyright: ignore  # pyright: ignore[reportArgumentType]
    return replace(config, **sizes)  # pyright: ignore[reportArgumentType]


def gated_width(d_model: int) -> int:
    """8/3 D up to a multiple of 64: three matrices of it cost what two of 4 D did (arXiv:2002.05202, section 2)."""
    return -(-8 * d_model // (3 * 64)) * 64


def _small(n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, max_seq_len: int) -> ModelConfig:
    d_head, d_ff = d_model // n_heads, gated_width(d_model)
    return ModelConfig(1, d_model, n_layers, n_heads, n_kv_heads, d_head, d_ff, max_seq_len)


def _llama(n_layers: int, d_model: int, n_heads: int, d_ff: int, **other: object) -> ModelConfig:
    base = ModelConfig(
        32_000, d_model, n_layers, n_heads, n_heads, d_model // n_heads, d_ff, 2048, qk_norm=False, tie_embeddings=False
    )
    return replace(base, **other)  # pyright: ignore[reportArgumentType]


def _qwen3(n_layers: int, d_model: int, n_heads: int, d_ff: int, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        151_936, d_model, n_layers, n_heads, 8, 128, d_ff, 40_960, rope_theta=1e6, tie_embeddings=tied
    )  # fmt: skip


# The small ones are trained from scratch, so their vocab_size comes from the tokenizer.
# The large ones are the published shapes: for planning memory and time, or random weights on a GPU.
PRESETS: dict[str, ModelConfig] = {
    "nano": _small(4, 128, 4, 2, 256),
    "micro": _small(6, 256, 8, 4, 512),
    "mini": _small(8, 512, 8, 4, 1024),
    "small": _small(12, 768, 12, 4, 1024),
    "medium": _small(24, 1024, 16, 8, 2048),
    "llama-7b": _llama(32, 4096, 32, 11_008),
    "llama-13b": _llama(40, 5120, 40, 13_824),
    "llama-33b": _llama(60, 6656, 52, 17_920),
    "llama-65b": _llama(80, 8192, 64, 22_016),
    "llama-2-70b": _llama(80, 8192, 64, 28_672, n_kv_heads=8, max_seq_len=4096, norm_eps=1e-5),
    "llama-3-8b": _llama(
        32, 4096, 32, 14_336, n_kv_heads=8, vocab_size=128_256, max_seq_len=8192, rope_theta=5e5, norm_eps=1e-5
    ),
    "llama-3-70b": _llama(
        80, 8192, 64, 28_672, n_kv_heads=8, vocab_size=128_256, max_seq_len=8192, rope_theta=5e5, norm_eps=1e-5
    ),
    "llama-3.1-8b": _llama(
        32, 4096, 32, 14_336, n_kv_heads=8, vocab_size=128_256, max_seq_len=131_072, rope_theta=5e5, norm_eps=1e-5
    ),  # without its RoPE scaling, which changes no size
    "smollm2-135m": _llama(
        30,
        576,
        9,
        1536,
        n_kv_heads=3,
        vocab_size=49_152,
        max_seq_len=8192,
        rope_theta=1e5,
        norm_eps=1e-5,
        tie_embeddings=True,
    ),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12_288, tied=False),
    "qwen3-14b": _qwen3(40, 5120, 40, 17_408, tied=False),
    "qwen3-32b": _qwen3(64, 5120, 64, 25_600, tied=False),
}
# The shapes of 2017 (arXiv:1706.03762, table 3, base, its decoder without the encoder's half) and of GPT-2.
PRESETS["transformer-2017"] = ModelConfig(
    1, 512, 6, 8, 8, 64, 2048, 512, norm_eps=1e-5, qk_norm=False, add_norm=True, layer_norm=True, positions="sinusoidal",
    gated=False, activation="relu", scale_embeddings=True, attention_out_bias=True, attention_bias=True, mlp_bias=True,
)  # fmt: skip
PRESETS["gpt2"] = ModelConfig(
    50_257, 768, 12, 12, 12, 64, 3072, 1024, norm_eps=1e-5, qk_norm=False, layer_norm=True, positions="learned", gated=False,
    activation="gelu_tanh", attention_out_bias=True, attention_bias=True, mlp_bias=True,
)  # fmt: skip
PRESETS["llama-70b"] = PRESETS["llama-2-70b"]


def preset(name: str) -> ModelConfig:
    """A preset by name; raises ValueError that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]
