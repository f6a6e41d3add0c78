"""The ranks of a run as a grid with named axes: which ranks share a batch, and over which of them what is summed.

`mesh=dp:2,tp:2` are four ranks, two by two. An axis without a size takes the ranks that are left: `mesh=dp`, the default, is
plain data parallelism over all ranks.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..model.config import ModelConfig
from ..run import TrainConfig
from .ranks import Ranks

T = TypeVar("T")

# From the outermost, whose neighbours may be far apart, to the innermost, which talks most and belongs on one machine.
AXES = {
    "pp": "pipeline parallel: layers",
    "dp": "data parallel: sequences",
    "fsdp": "fully sharded data parallel: sequences, and weights, gradients and optimizer state",
    "ep": "expert parallel: sequences, and a mixture's experts",
    "cp": "context parallel: positions of a sequence",
    "tp": "tensor and sequence parallel: heads, feed-forward columns, vocabulary",
}
BATCH_AXES = ("dp", "fsdp", "ep")  # their ranks read different sequences
LOSS_AXES = (*BATCH_AXES, "cp")  # their ranks have different parts of a step's labels


@dataclass(frozen=True)
class MeshShape:
    """How many ranks each axis has; 1: the axis isn't there."""

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1

    def __str__(self) -> str:
        return ",".join(f"{axis}:{self.size(axis)}" for axis in AXES if self.size(axis) > 1) or "dp:1"

    def size(self, *axes: str) -> int:
        """Ranks along these axes together."""
        return math.prod(getattr(self, axis) for axis in axes)

    @property
    def n(self) -> int:
        """Ranks of the whole mesh."""
        return self.size(*AXES)


def parse_mesh(text: str, n_ranks: int) -> MeshShape:
    """'dp:2,tp:2' -> MeshShape(dp=2, tp=2) for a run of `n_ranks`. Raises ValueError for what doesn't fill them exactly."""
    sizes: dict[str, int] = {}
    rest: list[str] = []
    for item in text.split(","):
        axis, colon, size = (part.strip() for part in item.partition(":"))
        if axis not in AXES:
            near = difflib.get_close_matches(axis, AXES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(AXES)}"
            raise ValueError(f"mesh={text!r}: unknown axis {axis!r}; {hint}")
        if axis in sizes or axis in rest:
            raise ValueError(f"mesh={text!r} names {axis} twice; keep one of them")
        if not colon:
            rest.append(axis)
        elif not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh={text!r}: {axis}:{size} is no number of ranks; write for example {axis}:2")
        else:
            sizes[axis] = int(size)
    if len(rest) > 1:
        raise ValueError(
            f"mesh={text!r}: {' and '.join(rest)} have no size; only one axis can take the ranks that are left"
        )
    named = math.prod(sizes.values())
    if rest and n_ranks % named == 0:
        sizes[rest[0]] = n_ranks // named
    elif rest or named != n_ranks:
        raise ValueError(_other_number(text, named, n_ranks, has_rest=bool(rest)))
    return MeshShape(**sizes)


def _other_number(text: str, named: int, n_ranks: int, *, has_rest: bool) -> str:
    """What to do about a mesh that is not of `n_ranks`."""
    if n_ranks == 1:
        return (
            f"mesh={text!r} needs {named} processes and there is one; start it with torchrun --nproc-per-node {named} "
            "-m graft ..., or set mesh=dp"
        )
    if has_rest:
        return f"mesh={text!r}: {n_ranks} ranks can't be divided by {named}; start {named} or a multiple of it"
    return f"mesh={text!r} has {named} ranks, and {n_ranks} were started; start {named}, or change the mesh"


# --- what doesn't fit ----------------------------------------------------------------------------------------------


def check_mesh(shape: MeshShape, config: TrainConfig, model: ModelConfig | None) -> None:
    """Raise ValueError for axes that this model, batch or ZeRO stage can't be divided by; each message says what fits."""
    if shape.tp > 1 and shape.size("pp", "ep") > 1:
        raise ValueError(
            f"mesh={shape}: tp divides neither stages of a pipeline nor experts; use cp or dp beside pp and ep"
        )
    if config.zero and shape.fsdp > 1 and (shape.dp > 1 or config.zero < 3):
        raise ValueError(
            f"zero={config.zero} with mesh={shape}: fsdp is ZeRO stage 3 over its own axis, dp beside it keeps copies; "
            "leave zero out, or leave fsdp out"
        )
    if meets_in_micro_batches(shape, config):
        n = shape.size(*BATCH_AXES)
        if config.batch_size % n:
            near = max(1, config.batch_size // n) * n
            raise ValueError(
                f"batch_size={config.batch_size} is not divisible by the {n} ranks of mesh={shape} that read different "
                f"sequences; use {near} or {near + n}"
            )
    if shape.pp > 1:
        _check_pipeline(shape, config, model)
    elif config.stages_per_rank > 1:
        raise ValueError(
            f"stages_per_rank={config.stages_per_rank} is of a pipeline, and mesh={shape} has none; add pp, or set it to 1"
        )
    if model is not None:
        _check_model(shape, model)


def _check_pipeline(shape: MeshShape, config: TrainConfig, model: ModelConfig | None) -> None:
    """Raise ValueError when a pipeline's stages can't be filled with layers or with rows."""
    n_stages = shape.pp * config.stages_per_rank
    if stage(shape, config) >= 2:
        raise ValueError(
            f"mesh={shape} with zero={config.zero}: a pipeline's ranks keep their weights and gradients whole; "
            "use zero=0 or 1, and dp in place of fsdp"
        )
    if model is not None and model.n_layers % n_stages:
        fits = [n for n in range(2, model.n_layers + 1) if model.n_layers % n == 0]
        raise ValueError(
            f"mesh={shape}: n_layers={model.n_layers} can't be divided by {n_stages} stages (pp x stages_per_rank); "
            f"{', '.join(map(str, fits))} stages fit"
        )
    if config.recompute_layers is not None:
        raise ValueError(
            f"mesh={shape}: recompute_layers={config.recompute_layers} counts layers from the first one, which a pipeline's "
            "stages don't; leave it and memory_budget out, or leave pp out"
        )
    rows = config.batch_size // shape.size(*BATCH_AXES)
    if rows < n_stages:
        raise ValueError(
            f"mesh={shape}: a step of batch_size={config.batch_size} has {rows} sequences for each pipeline of {n_stages} "
            f"stages; use batch_size {n_stages * shape.size(*BATCH_AXES)} or more, or fewer stages"
        )


def _check_model(shape: MeshShape, model: ModelConfig) -> None:
    """Raise ValueError for sizes of the model that an axis doesn't divide."""
    for axis, parts in (
        ("tp", {"n_heads": model.n_heads, "n_kv_heads": model.n_kv_heads, "d_ff": model.d_ff}),
        ("ep", {"n_experts": model.n_experts}),
    ):
        size = shape.size(axis)
        for name, value in parts.items():
            if size > 1 and (value % size or not value):
                raise ValueError(
                    f"mesh={shape}: {name}={value} can't be divided by {axis}:{size}; {_fits(axis, parts)}"
                )
    if shape.cp > 1 and model.n_linear_layers:
        raise ValueError(
            f"mesh={shape}: {model.n_linear_layers} of {model.n_layers} layers read each sequence from its start on, with a "
            "state in place of attention, so that cp can't divide it; use dp or fsdp"
        )
    if shape.size("pp", "cp") > 1 and model.n_predict:
        raise ValueError(
            f"mesh={shape}: n_predict={model.n_predict} needs the tokens behind each position and the last layer's states in one "
            "place; use dp or fsdp"
        )
    along = shape.size("cp", "tp")
    if model.max_seq_len % along:
        near = max(1, model.max_seq_len // along) * along
        raise ValueError(
            f"mesh={shape}: max_seq_len={model.max_seq_len} can't be divided by the {along} ranks that share a sequence "
            f"(cp and tp); use {near} or {near + along}"
        )


def _fits(axis: str, parts: dict[str, int]) -> str:
    """The sizes of an axis that divide all of its parts."""
    common = math.gcd(*parts.values())
    sizes = [size for size in range(2, common + 1) if common % size == 0]
    names = ", ".join(f"{name}={value}" for name, value in parts.items())
    return f"{axis} of {', '.join(map(str, sizes[:8]))} fit {names}" if sizes else f"no {axis} above 1 fits {names}"


def stage(shape: MeshShape, config: TrainConfig) -> int:
    """The ZeRO stage: 0 keeps all of weights, gradients and state on every rank, 3 divides all three."""
    if shape.fsdp > 1:
        return 3
    return config.zero if shape.dp > 1 else 0


def meets_in_micro_batches(shape: MeshShape, config: TrainConfig) -> bool:
    """Whether ranks with different sequences wait for each other in every micro-batch, so that each needs equally many."""
    return stage(shape, config) >= 2 or shape.size("ep", "pp") > 1


def is_copied(shape: MeshShape, config: TrainConfig) -> bool:
    """Whether every rank holds all of weights, gradients and state."""
    return shape.n == shape.dp and stage(shape, config) == 0


def holds_model(shape: MeshShape, config: TrainConfig) -> bool:
    """Whether every rank holds all of the weights."""
    return shape.n == shape.size("dp", "cp") and stage(shape, config) < 3


# --- the ranks -----------------------------------------------------------------------------------------------------


class Mesh:
    """This process in its mesh: what it reads of a step, and sums over the ranks along some axes.

    Every rank makes it at the same moment: groups of ranks are made for the axes.
    """

    def __init__(self, shape: MeshShape, ranks: Ranks, device: str = "cpu") -> None:
        assert shape.n == ranks.n
        self.shape, self.ranks = shape, ranks
        self.axes = tuple(axis for axis in AXES if shape.size(axis) > 1)
        self.device_mesh: DeviceMesh | None = None
        if ranks.n > 1:
            sizes = tuple(shape.size(axis) for axis in self.axes)
            self.device_mesh = init_device_mesh(device.partition(":")[0], sizes, mesh_dim_names=self.axes)
        self._groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
        for axes in _groups():  # at once, so that no rank makes a group that others make later
            self.group(*axes)

    def along(self, *axes: str) -> DeviceMesh | None:
        """The part of the device mesh that this rank shares along `axes`; None where it is alone."""
        there = tuple(axis for axis in self.axes if axis in axes)
        return self.device_mesh[there] if there and self.device_mesh is not None else None

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along `axes` only; None where it is alone. All ranks ask in one order."""
        there = tuple(axis for axis in self.axes if axis in axes)
        part = self.along(*there)
        if part is None:
            return None
        if there not in self._groups:
            self._groups[there] = part.get_group() if len(there) == 1 else part._flatten("_".join(there)).get_group()
        return self._groups[there]

    def index(self, *axes: str) -> int:
        """This rank's position among those along `axes`, in the order of AXES, from 0."""
        position = 0
        for axis in self.axes:
            if axis in axes:
                assert self.device_mesh is not None
                position = position * self.shape.size(axis) + self.device_mesh.get_local_rank(axis)
        return position

    @cached_property
    def readers(self) -> Ranks:
        """This rank among those that read different sequences."""
        return Ranks(self.index(*BATCH_AXES), self.shape.size(*BATCH_AXES))

    def share(self, micro_batches: Sequence[T]) -> list[T]:
        """This rank's micro-batches of a step: those that are its reader's turn."""
        return self.readers.share(micro_batches)

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over the ranks that hold different labels; the others hold the same."""
        group = self.group(*LOSS_AXES)
        return list(numbers) if group is None else self.ranks.sum(*numbers, group=group)


def _groups() -> Iterator[tuple[str, ...]]:
    """Axes over which ranks may have to sum: the ranks of a pipeline need not have the same kinds of weights."""
    yield from ((axis,) for axis in AXES)
    yield BATCH_AXES
    for divided in ((), ("ep",)):  # along which a weight is dealt out
        for summed in ((), ("dp",), ("dp", "fsdp")):  # by something else
            axes = tuple(axis for axis in LOSS_AXES if axis not in (*divided, *summed))
            yield from (axes, (*axes, "tp"))


def make_mesh(config: TrainConfig, model: ModelConfig | None, ranks: Ranks, device: str = "cpu") -> Mesh:
    """The config's mesh over these ranks, checked. Raises ValueError that says what fits."""
    shape = parse_mesh(config.mesh, ranks.n)
    check_mesh(shape, config, model)
    return Mesh(shape, ranks, device)
