"""The memory of one rank of a mesh: graft's own prediction of a step over the rank's share of the model and the batch."""

from dataclasses import replace
from functools import cache

from ...base.cluster.layout import Layout
from ...base.model.config import ModelConfig
from ...base.model.config_checks import PATTERNS
from .predict import MemoryEstimate, estimate
from .settings import MemorySettings


def rank_memory(config: ModelConfig, layout: Layout, *, n_micro: int, seq_len: int, dtype: str = "bfloat16") -> int:
    """Peak bytes of the rank that needs most, with graft's float32 weights, gradients and AdamW.

    The step of the rank's layers, heads, columns and tokens runs on tensors of shapes (predict.py); then ZeRO's stage divides
    the state, and a pipeline's first stage keeps the activations of as many micro-batches as there are stages before their
    backward passes (Narayanan et al. 2021, arXiv:2104.04473, section 2.2). An upper bound where tp > 1 without recomputation,
    since activations that tensor parallel's ranks could divide by positions are counted whole. Communication buffers are not
    counted.
    """
    several = n_micro > 1  # gradients are there while the next micro-batch runs
    step = _step(share(config, layout), layout.micro_batch, several, seq_len // layout.cp, layout.recompute, dtype)
    n, at_peak = layout.copies, step.at_peak
    kept = sum(step.activations) / (layout.tp if layout.recompute else 1)
    peak = step.peak_bytes + kept * (in_flight(layout, n_micro) - 1)
    if layout.recompute:
        peak -= at_peak.get("activations", 0) * (1 - 1 / layout.tp)
    if layout.zero >= 1:
        peak -= step.optimizer * (1 - 1 / n)
    if layout.zero >= 2:
        peak -= at_peak.get("gradients", 0) * (1 - 1 / n)
    if layout.zero == 3:  # two layers' weights are gathered at a time, in the arithmetic's dtype
        per_stage = config.n_layers // layout.pp
        gathered = step.weights / 2 * min(1.0, 2 / per_stage)
        casts = at_peak.get("casts", 0)
        peak += min(gathered, casts or gathered) - casts - step.weights * (1 - 1 / n)
    return round(peak)


def share(config: ModelConfig, layout: Layout) -> ModelConfig:
    """The sizes that one rank computes with: of its stage, its heads and columns, its experts.

    Of embedding and head a stage of several has one.
    """
    c, tp = config, layout.tp
    n_layers = c.n_layers // layout.pp
    patterns = {name: pattern[:n_layers] for name in PATTERNS if (pattern := getattr(c, name)) is not None}
    experts = {}
    if c.n_experts:
        n_experts = max(c.n_experts // layout.ep, 2, c.n_experts_per_token)
        experts = {"n_experts": n_experts, "d_expert": c.expert_width // tp, "d_shared_expert": c.d_shared_expert // tp}
    return replace(
        c,
        n_layers=n_layers,
        n_heads=c.n_heads // tp,
        n_kv_heads=c.n_kv_heads // tp,
        d_ff=c.d_ff // tp,
        vocab_size=c.vocab_size // tp,
        tie_embeddings=c.tie_embeddings or layout.pp > 1,
        **patterns,
        **experts,
    )


def in_flight(layout: Layout, n_micro: int) -> float:
    """Micro-batches whose activations the first stage keeps at most."""
    if layout.pp == 1:
        return 1
    interleaved = 1 + (layout.pp - 1) / (layout.pp * layout.chunks) if layout.chunks > 1 else 1
    return min(n_micro, layout.pp * interleaved)


@cache
def _step(
    config: ModelConfig, micro_batch: int, several: bool, seq_len: int, recompute: bool, dtype: str
) -> MemoryEstimate:
    settings = MemorySettings(
        method="full",
        batch_size=micro_batch * (2 if several else 1),
        micro_batch=micro_batch,
        seq_len=seq_len,
        dtype=dtype,
        checkpointing=recompute,
    )
    return estimate(config, settings, device="cuda")
