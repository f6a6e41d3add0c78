"""How long a training step takes in a layout: products, memory traffic, messages and the pipeline's idle time.

A model of first principles with four constants: the shares of the data sheets' rates that are reached in practice. They are
fitted once to the ten layouts of Narayanan et al. 2021 (arXiv:2104.04473, table 1: all within 5%); the six of its table 2
that were left out of the fit come within 4%, and its three with ZeRO-3 within 5% once HIDDEN was set after them. Llama 3's
405B on 8,192 and 16,384 H100 (arXiv:2407.21783, table 4) is predicted 7% too fast with a part of one layer, and 25% too fast
at 131,072 tokens with 16 ranks a sequence.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from ..model.config import ModelConfig
from ..plan import Device, attention_flops_per_token, flops_per_token
from .layout import GPUS_A_NODE, Layout
from .states import GRAFT, StateBytes


@dataclass(frozen=True)
class Links:
    """Bytes a second that a GPU sends, each way."""

    nvlink: float  # to others of its node
    network: float  # its share of the node's adapters


LINKS = {
    "a100": Links(300e9, 25e9),  # NVLink 3; one 200 Gbit/s adapter a GPU (DGX A100)
    "h100": Links(450e9, 50e9),  # NVLink 4; 400 Gbit/s
    "h200": Links(450e9, 50e9),
    "rtx4090": Links(25e9, 3e9),  # PCIe 4 x16; 200 Gbit/s a node of 8
}


@dataclass(frozen=True)
class Reached:
    """Shares of the data sheet's rates that are reached."""

    products: float = 0.68  # of the dense bfloat16 FLOP/s, within a matrix product
    memory: float = 0.90  # of the memory's bytes/s, by elementwise operators
    nvlink: float = 0.90
    network: float = 0.70


# ZeRO-2 and 3 talk in every micro-batch: behind this share of its compute, each rank over its own adapter. After the three
# ZeRO-3 rows of table 2 (175B on 384, 768 and 1,536 A100: 144, 88 and 44 TFLOP/s).
HIDDEN = 2 / 3


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they go to."""

    compute: float  # products and memory traffic, recomputation included
    tensor: float  # tensor parallel's sums
    context: float  # keys and values that travel on, beyond the time of attention
    expert: float  # tokens to their experts and back
    stages: float  # activations between pipeline stages
    bubble: float  # idle while the pipeline fills and empties, and behind a slower last stage
    data: float  # gradients and ZeRO's weights, as far as they don't hide behind compute
    update: float  # the optimizer

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def network(self) -> float:
        """All messages."""
        return self.tensor + self.context + self.expert + self.stages + self.data

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class _Group:
    """Ranks that talk, and how fast."""

    n: int
    rate: float  # bytes a second that each sends

    def gather(self, n_bytes: float) -> float:
        """Seconds of an all-gather or reduce-scatter of n bytes in all, by rings."""
        return n_bytes * (self.n - 1) / self.n / self.rate

    def reduce(self, n_bytes: float) -> float:
        """Seconds of an all-reduce: a reduce-scatter and an all-gather."""
        return 2 * self.gather(n_bytes)


def step_time(
    config: ModelConfig,
    layout: Layout,
    *,
    batch: int,  # sequences a step, of all ranks
    seq_len: int,
    gpu: Device,
    links: Links,
    reached: Reached = Reached(),
    mfu: float | None = None,  # share of the peak that a rank's own work reaches, measured; None: by `reached`
    state: StateBytes = GRAFT,
    fused_attention: bool = True,  # scores stay on the chip, and masked halves aren't computed
    sequence_parallel: bool = True,  # norms and residuals are divided over tensor parallel's ranks too
    node: int = GPUS_A_NODE,
) -> StepTime:
    """Seconds of one step. Raises ValueError when the batch doesn't divide or mfu is outside (0, 1].

    Not covered: slow nodes, input, checkpoints, congestion, load imbalance of experts.
    """
    if mfu is not None and not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu} must lie in (0, 1]; 0.4 to 0.5 is good on GPUs")
    m = layout.micro_batches(batch)
    tokens = layout.micro_batch * seq_len / layout.cp  # of a micro-batch on a rank
    passes = 4 if layout.recompute else 3  # forward, backward as two of it, and again forward
    layer, attention = _layer_seconds(
        config, layout, tokens, seq_len, gpu, reached, mfu, fused_attention, sequence_parallel
    )
    head = _head_seconds(config, layout, tokens, gpu, reached, mfu)
    within, between = links.nvlink * reached.nvlink, links.network * reached.network

    def group(n: int, inner: int, shared: bool = True) -> _Group:
        """n ranks, each `inner` ranks from the next; whether those of one node share its adapters, or each has its own."""
        own = max(1, node // inner) if shared else 1
        return _Group(n, within if n * inner <= node else min(within, own * between))

    per_stage = -(-config.n_layers // layout.pp)  # of the largest
    hidden = tokens * config.d_model * 2  # bytes of a micro-batch's activations between layers
    tensor = per_stage * (passes * 2 - 2) * group(layout.tp, 1).reduce(hidden)
    kv = tokens * 2 * config.n_kv_heads * config.d_head * 2 / layout.tp * (layout.cp - 1)
    ring = kv / group(layout.cp, layout.tp).rate
    context = per_stage * passes * max(0.0, ring - attention)
    n_mixing = _sums(config).n_mixing / layout.pp
    routed = hidden * config.n_experts_per_token / layout.tp
    expert = n_mixing * (passes - 1) * 2 * group(layout.ep, layout.tp * layout.cp).gather(routed)
    own = per_stage * passes * layer
    stage = own + tensor + context + expert
    last = 3 * head
    sends = (
        2 * layout.chunks * hidden / layout.tp / (within if layout.n_gpus <= node else between)
        if layout.pp > 1
        else 0.0
    )
    data, n_own = _data_seconds(config, layout, m, stage + last / layout.pp, group, state)
    idle = (layout.pp - 1) / layout.chunks * (stage + sends) + (m * last * (1 - 1 / layout.pp))
    return StepTime(
        compute=m * (own + last / layout.pp),
        tensor=m * tensor,
        context=m * context,
        expert=m * expert,
        stages=m * sends,
        bubble=idle,
        data=data,
        update=n_own
        * (state.weight + state.gradient + 2 * state.optimizer + state.weight)
        / (gpu.bytes_per_s * reached.memory),
    )


def _layer_seconds(
    config: ModelConfig,
    layout: Layout,
    tokens: float,
    seq_len: int,
    gpu: Device,
    reached: Reached,
    mfu: float | None,
    fused_attention: bool,
    sequence_parallel: bool,
) -> tuple[float, float]:
    """Seconds of a layer's forward pass over a rank's tokens, the mean over layers; and of its attention's products alone."""
    c, tp = config, layout.tp
    products = 2 * _sums(c).active / c.n_layers * tokens / tp
    scores = _attention_flops(c, seq_len) / 3 / c.n_layers * tokens / tp * (1 if fused_attention else 2)
    rate = gpu.flops * (mfu or reached.products)
    if mfu is not None:  # measured on whole steps: memory traffic is in it
        return (products + scores) / rate, scores / rate
    # bfloat16 read and written: norms 8 D, residual additions with dropout 14 D; queries, keys and values laid out anew;
    # the feed-forward's gate, up and product.
    residual = 22 * c.d_model / (tp if sequence_parallel else 1)
    width = c.n_experts_per_token * c.expert_width + c.d_shared_expert if c.n_experts else c.d_ff
    divided = (4 * (c.n_heads + 2 * c.n_kv_heads) * c.d_head + 6 * width) / tp
    # Scores in memory: written, masked and scaled to probabilities, dropout with its mask, read.
    divided += 0 if fused_attention else 13 * c.n_heads * seq_len / tp
    return (products + scores) / rate + tokens * (residual + divided) / (
        gpu.bytes_per_s * reached.memory
    ), scores / rate


def _head_seconds(
    config: ModelConfig, layout: Layout, tokens: float, gpu: Device, reached: Reached, mfu: float | None
) -> float:
    """A third of the seconds that the logits and their loss take, forward and backward."""
    logits = tokens * config.vocab_size / layout.tp
    products = 2 * config.d_model * logits / (gpu.flops * (mfu or reached.products))
    return products + (0.0 if mfu is not None else 6 * logits / (gpu.bytes_per_s * reached.memory))


def _data_seconds(
    config: ModelConfig,
    layout: Layout,
    m: int,
    compute: float,
    group: Callable[[int, int, bool], _Group],
    state: StateBytes,
) -> tuple[float, float]:
    """Seconds of gradients and ZeRO's weights that don't hide behind a micro-batch's compute; parameters that a rank updates."""
    weights = rank_params(config, layout)
    copies = group(layout.copies, layout.tp, True)
    alone = group(layout.copies, layout.tp, False)
    gradients = alone.gather(weights * state.gradient)
    gathered = alone.gather(weights * 2)  # in the arithmetic's dtype
    hides = HIDDEN * compute
    if layout.zero == 3:  # gathered for the forward and the backward pass of each micro-batch
        exposed = m * max(0.0, 2 * gathered + gradients - hides)
    elif layout.zero == 2:
        exposed = m * max(0.0, gradients - hides) + copies.gather(weights * state.weight)
    else:  # summed once a step, after the last backward pass
        exposed = copies.reduce(weights * state.gradient)
    return exposed, weights / (layout.copies if layout.zero else 1)


def rank_params(config: ModelConfig, layout: Layout) -> float:
    """Weights of a rank before ZeRO divides them: of the first stage, which has the embedding, or of the last."""
    sums = _sums(config)
    experts = sums.n_mixing * config.n_experts * 3 * config.d_model * config.expert_width
    embedding = config.vocab_size * config.d_model * (2 if layout.pp == 1 and not config.tie_embeddings else 1)
    return ((sums.params - experts + experts / layout.ep) / layout.pp + embedding) / layout.tp


@dataclass(frozen=True)
class _Sums:
    """Over all layers."""

    params: int
    active: int  # that one token meets
    n_mixing: int  # layers with a mixture of experts


@cache
def _sums(config: ModelConfig) -> _Sums:
    specs = [config.layer(i) for i in range(config.n_layers)]
    return _Sums(
        sum(config.layer_params(spec) for spec in specs),
        sum(config.layer_params(spec, active=True) for spec in specs),
        sum(spec.feed_forward == "experts" for spec in specs),
    )


_attention_flops = cache(attention_flops_per_token)


def model_flops(config: ModelConfig, batch: int, seq_len: int) -> float:
    """FLOPs of a step without recomputation, which a utilization is taken of."""
    return flops_per_token(config, seq_len) * batch * seq_len
