"""Which layout of a run over many GPUs is fastest, of those that fit into their memory, and what holds each back."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...base.cluster.layout import Layout, layouts
from ...base.cluster.states import zero_bytes
from ...base.cluster.step_time import LINKS, StepTime, model_flops, rank_params, step_time
from ...base.model.config import ModelConfig
from ...base.plan import DEVICES, Device
from .rank_share import in_flight, rank_memory
from .units import say_bytes

USABLE = 0.92  # of a GPU's memory: the rest is the context, the libraries' buffers and gaps
LEAST_LOSS = 0.1  # of the step: what costs less doesn't bind, compute does
BATCH_TOKENS = 4_000_000  # a step, where nothing is said: about what GPT-3 and Llama 2 read


@dataclass(frozen=True)
class FoundLayout:
    """A layout that fits, and what it does."""

    layout: Layout
    time: StepTime
    memory_bytes: int  # peak of the rank that needs most
    mfu: float  # model FLOPs utilization: recomputation isn't work
    tokens_per_s: float
    seconds: float  # of the whole run
    bound_by: str  # compute, network, bubble or memory: what costs the most time beside the model's own work

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"time": self.time.to_dict(), "mesh": self.layout.mesh}


def find_layouts(
    config: ModelConfig,
    *,
    n_gpus: int,
    n_tokens: float,
    batch: int,
    seq_len: int,
    device: str = "h100",
    mfu: float | None = None,  # of a rank's own work, measured; None: by base/cluster/step_time.py
    best: int = 10,
    on_try: Callable[[Layout], None] | None = None,
) -> list[FoundLayout]:
    """The fastest layouts that fit, the fastest first; one a mesh, with its best ZeRO stage, micro-batch and schedule.

    Memory is predicted for the fastest candidates in turn until enough have fitted. Raises ValueError when nothing divides or
    nothing fits, with the nearest.
    """
    gpu, links = _known(device)
    if n_gpus < 1 or batch < 1 or not seq_len >= 1:
        raise ValueError(f"gpus={n_gpus}, batch={batch} and seq_len={seq_len} must be >= 1")
    timed = [
        (step_time(config, one, batch=batch, seq_len=seq_len, gpu=gpu, links=links, mfu=mfu), one)
        for one in layouts(config, n_gpus, batch=batch, seq_len=seq_len)
    ]
    if not timed:
        raise ValueError(
            f"no mesh of {n_gpus} GPUs divides {config.n_heads} heads, {config.n_kv_heads} kv heads, {config.n_layers} layers and "
            f"a batch of {batch} sequences without a rest; choose --batch as a multiple of the GPUs, or another number of them"
        )
    # Of equal times the simpler: fewer stages, no recomputation.
    timed.sort(key=lambda pair: (pair[0].total, pair[1].zero, pair[1].recompute, pair[1].pp, pair[1].tp))
    usable = gpu.memory_bytes * USABLE
    found: list[FoundLayout] = []
    meshes: set[str] = set()
    least = float("inf")
    for time, one in timed:
        if one.mesh in meshes:
            continue
        bound = _least_bytes(config, one, one.micro_batches(batch), seq_len)
        least = min(least, bound)
        if bound > usable:
            continue
        if on_try is not None:
            on_try(one)
        memory = rank_memory(config, one, n_micro=one.micro_batches(batch), seq_len=seq_len)
        least = min(least, memory) if least > usable else least
        if memory > usable:
            continue
        meshes.add(one.mesh)
        per_s = batch * seq_len / time.total
        utilization = model_flops(config, batch, seq_len) / time.total / n_gpus / gpu.flops
        without = replace(one, recompute=False)
        lost = (
            time.total - step_time(config, without, batch=batch, seq_len=seq_len, gpu=gpu, links=links, mfu=mfu).total
        )
        found.append(FoundLayout(one, time, memory, utilization, per_s, n_tokens / per_s, _bound(time, lost)))
        if len(found) == best:
            break
    if not found:
        raise ValueError(
            f"nothing fits into {say_bytes(usable)} of each {gpu.name}: the layout that needs least takes "
            f"{say_bytes(least)}; use more GPUs, a smaller batch or shorter sequences"
        )
    return found


def default_batch(n_gpus: int, seq_len: int) -> int:
    """Sequences of about BATCH_TOKENS, a multiple of the GPUs where that is no more than double."""
    wanted = max(1, BATCH_TOKENS // seq_len)
    return 2 ** round(math.log2(wanted)) if n_gpus > wanted else -(-wanted // n_gpus) * n_gpus


def _least_bytes(config: ModelConfig, layout: Layout, n_micro: int, seq_len: int) -> float:
    """Less than rank_memory, and at once: the state, and of each layer's activations only the largest."""
    state = zero_bytes(rank_params(config, layout), layout.copies, layout.zero)
    width = config.d_model / layout.tp
    if not layout.recompute:
        width = (
            4 * config.d_model
            + ((config.n_heads + 2 * config.n_kv_heads) * config.d_head + 3 * config.d_ff) / layout.tp
        )
    tokens = layout.micro_batch * seq_len / layout.cp
    return state + in_flight(layout, n_micro) * config.n_layers / layout.pp * tokens * width * 2


def _known(device: str) -> tuple[Device, Any]:
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; known are {', '.join(DEVICES)}")
    return DEVICES[device], LINKS[device]


def _bound(time: StepTime, recomputation: float) -> str:
    """What costs the most time beside the model's own work; memory binds by the recomputation that it forces."""
    losses = {"network": time.network, "bubble": time.bubble, "memory": recomputation}
    name = max(losses, key=losses.__getitem__)
    return name if losses[name] >= LEAST_LOSS * time.total else "compute"
