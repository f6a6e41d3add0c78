"""Bytes that a rank sends to others in a step: counted while it runs, and as a formula of the mesh.

Collectives are counted as rings send them (Patarasu & Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002): a gather of x bytes
by n ranks and a scatter of the sum of x bytes each send (n - 1) / n x, an all-reduce both. The few numbers that ranks agree on
(labels, norms, whether to stop) are left out: tensors of at most SMALL numbers in 64 bits.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..model.config import ModelConfig
from ..run import TrainConfig
from .mesh import MeshShape, stage

SMALL = 8


class SentBytes(TorchDispatchMode):
    """Counts what this rank's collectives send while the mode is on, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {}
        self.unknown: Counter[str] = Counter()  # collectives that are not counted

    @property
    def total(self) -> int:
        return round(sum(self.sent.values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional"):
            self._count(name.partition(".")[0], args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, n_bytes: float) -> None:
        self.sent[kind] = self.sent.get(kind, 0.0) + n_bytes

    def _count(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensors = [leaf for leaf in tree_iter((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        is_small = all(t.numel() <= SMALL and t.element_size() == 8 for t in tensors)
        if is_small or name in ("wait_tensor", "_wrap_tensor_autograd", "barrier"):
            return
        n = _n_ranks(args, kwargs)
        largest = max(t.numel() * t.element_size() for t in tensors)
        share = (n - 1) / n
        match name:
            case "allreduce_" | "all_reduce":
                self._add("all-reduce", 2 * share * largest)
            case "_allgather_base_" | "_reduce_scatter_base_":
                self._add("all-gather" if "gather" in name else "reduce-scatter", share * largest)
            case "all_gather_into_tensor":
                self._add("all-gather", (n - 1) * largest)  # the argument is one rank's part
            case "reduce_scatter_tensor":
                self._add("reduce-scatter", share * largest)
            case "gather_" | "scatter_":  # to or from one rank: (n - 1) parts, of which a rank sends 1 / n on average
                part = args[1][0] if name == "gather_" else args[0][0]
                self._add(
                    "to an owner" if name == "gather_" else "from an owner", share * part.numel() * part.element_size()
                )
            case _:
                self.unknown[name] += 1


def _n_ranks(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Ranks of the group that a collective is called with."""
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import _resolve_process_group

    for leaf in tree_iter((args, dict(kwargs))):
        if isinstance(leaf, torch.ScriptObject):
            try:
                return ProcessGroup.unbox(leaf).size()
            except (RuntimeError, TypeError):  # a reduce operation
                continue
    names = [leaf for leaf in tree_iter((args, dict(kwargs))) if isinstance(leaf, str)]
    return _resolve_process_group(names[-1]).size()  # pyright: ignore[reportArgumentType]


# --- the formula ---------------------------------------------------------------------------------------------------


def predict_sent_bytes(
    config: ModelConfig,
    train: TrainConfig,
    shape: MeshShape,
    parameters: Mapping[str, Sequence[int]],
    owned: Collection[str] = (),  # matrices that one rank updates whole (owners.py); not covered together with tp
) -> int:
    """What a rank sends in a step of a float32 model; `parameters` are the whole model's shapes by name.

    With P parameters of a tensor-parallel rank, rows padded to a multiple of n, and m micro-batches a rank:
    copies 2 (n-1)/n 4P; stage 1 twice (n-1)/n 4P; stage 2 (m + 1) (n-1)/n 4P; stage 3 m (n-1)/n 4 (2 layers + rest + P), since
    layers are gathered for both passes; tp m (tp-1)/tp (8 layers + 4) activations (11 for 8 with recomputation), 24 bytes a token
    of the loss, and its norms.
    """
    zero = stage(shape, train)
    n = shape.fsdp if shape.fsdp > 1 else shape.dp
    readers = shape.size("dp", "fsdp")
    micro = min(train.micro_batch, train.batch_size // readers)
    m = -(-train.batch_size // (readers * micro))
    layers = whole = norms = everything = 0
    for name, size in parameters.items():
        local = _local_shape(name, size, shape.tp)
        padded = n * -(-local[0] // n) * (torch.Size(local[1:]).numel())
        whole += padded
        layers += padded if ".layers." in name else 0
        everything += torch.Size(local).numel()
        if len(size) == 1:
            norms += torch.Size(local).numel()
    ring = (n - 1) / n
    if zero == 0:
        sent = 2 * ring * 4 * (everything - (norms if shape.tp > 1 else 0))
    else:
        sent = ring * 4 * {1: 2 * whole, 2: (m + 1) * whole, 3: m * (2 * layers + (whole - layers) + whole)}[zero]
    if zero == 3 and shape.fsdp > 1 and shape.dp > 1:  # the copies' sums, of each micro-batch
        sent += m * 2 * (shape.dp - 1) / shape.dp * 4 * whole / n
    if shape.tp > 1:
        sent += _tensor_parallel(
            config, shape, tokens=micro * config.max_seq_len, m=m, checkpointing=train.checkpointing
        )
        along = shape.tp * (shape.dp if zero == 0 else 1)  # norms have parts of a sum on the ranks of both axes
        held = sum(-(-size[0] // n) if zero else size[0] for size in parameters.values() if len(size) == 1)
        sent += 2 * (along - 1) / along * 4 * held
    if zero:  # an owner's gradient comes and its weights go in parts of 1 / n; on average over ranks
        assert not owned or shape.tp == 1
        rows = {
            name: n * -(-size[0] // n) * torch.Size(size[1:]).numel()
            for name, size in parameters.items()
            if name in owned
        }
        sent += 2 * ring * 4 * sum(rows.values()) / n
    return round(sent)


def _tensor_parallel(config: ModelConfig, shape: MeshShape, *, tokens: int, m: int, checkpointing: bool) -> float:
    """Activations and the loss's numbers, of m micro-batches of so many tokens."""
    share = (shape.tp - 1) / shape.tp
    activations = 4 * tokens * config.d_model
    # Of each of two blocks a layer: in and out, forward and backward; recomputation, which stops before the last one's output.
    blocks = (11 if checkpointing else 8) * config.n_layers
    return m * share * ((blocks + 4) * activations + 2 * 3 * 4 * tokens)


def _local_shape(name: str, size: Sequence[int], tp: int) -> list[int]:
    """A matrix's shape on a tensor-parallel rank; norms are whole."""
    if tp == 1 or len(size) == 1:
        return list(size)
    by_column = name.endswith(("o_proj.weight", "down_proj.weight"))
    return [size[0], size[1] // tp] if by_column else [-(-size[0] // tp), size[1]]
