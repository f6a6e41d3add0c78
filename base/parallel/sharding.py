"""What of each parameter lies on which rank: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 5) and FSDP over an axis.

Stage 1 divides the optimizer's state: gradients are reduce-scattered once a step, each rank updates its rows of every parameter
and gathers the others'. Stage 2 divides the gradients too: each is reduce-scattered as soon as a backward pass has it. Stage 3
divides the weights as well, by torch's fully_shard (Zhao et al. 2023, arXiv:2304.11277), which gathers a layer while it runs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.multi_token import Predictor
from ..model.transformer import Transformer
from ..run import TrainConfig
from .mesh import LOSS_AXES, Mesh, stage
from .part import Part, divide_model_
from .ranks import buckets, naming_lost_ranks

if TYPE_CHECKING:  # importing it takes as long as importing torch, and only stage 3 and tensor parallel need it
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """One division of a tensor: along `dim` into `n` runs as torch.chunk makes them, of which this rank has number `index`."""

    axis: str  # of the mesh
    dim: int
    n: int
    index: int

    def width(self, size: int) -> int:
        """Length of every run but the last ones."""
        return -(-size // self.n)

    def bounds(self, size: int) -> tuple[int, int]:
        """This rank's run of `size` numbers: [start, end)."""
        width = self.width(size)
        return min(self.index * width, size), min((self.index + 1) * width, size)


@dataclass(eq=False)
class Piece:
    """What this rank trains of one parameter."""

    name: str
    parameter: Tensor  # the module's own: whole, or a DTensor of this rank's part
    local: Tensor  # what the optimizer updates; a view of the parameter's memory
    shape: tuple[int, ...]  # of the whole parameter
    splits: tuple[Split, ...] = ()  # each divides what the one before it left
    partial: tuple[str, ...] = ()  # axes over which the gradient after the backward pass is still to be summed
    only_on: tuple[str, ...] = ()  # axes along which other ranks don't have the parameter at all
    is_spare: bool = False  # but one does (pipeline parallel's tied embeddings), which counts it and writes it
    box: tuple[tuple[int, int], ...] = field(init=False)  # [start, end) in each dimension of the whole

    def __post_init__(self) -> None:
        box = [(0, size) for size in self.shape]
        for split in self.splits:
            start, end = box[split.dim]
            low, high = split.bounds(end - start)
            box[split.dim] = (start + low, start + high)
        self.box = tuple(box)
        assert tuple(end - start for start, end in box) == tuple(self.local.shape), self.name

    def copies(self, mesh: Mesh) -> float:
        """How many ranks hold the same numbers; infinitely many of a spare, so that a sum over ranks has each number once."""
        if self.is_spare:
            return math.inf
        return mesh.shape.n // mesh.shape.size(*self.only_on, *(split.axis for split in self.splits))


class Sharding:
    """The pieces of a model's trained parameters on this rank, and the sums over ranks that complete their gradients.

    Is to the loop what Ranks is where every rank holds everything.
    """

    def __init__(self, mesh: Mesh, pieces: Sequence[Piece], *, zero: int = 0, part: Part | None = None) -> None:
        self.mesh, self.pieces, self.zero = mesh, list(pieces), zero
        self.part = part or Part()
        self._in_flight: tuple[Piece, Tensor, Tensor, dist.Work] | None = None
        if zero == 2:
            for piece in self.pieces:
                self._scatter_when_ready(piece)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the log and speaks to the user."""
        return self.mesh.ranks.is_first

    def share(self, micro_batches: Sequence[T]) -> list[T]:
        """This rank's micro-batches of a step, of each its positions."""
        return [self.part.own(batch) for batch in self.mesh.share(micro_batches)]

    def place(self, i: int) -> int:
        """The position in the step of this rank's i-th micro-batch."""
        return self.mesh.readers.place(i)

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over the ranks that hold different labels."""
        return self.mesh.sum(*numbers)

    def most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return self.mesh.ranks.most(number)

    @torch.no_grad()
    def finish_gradients(self, named: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """Complete each piece's gradient after the step's last backward pass; returns the pieces, with `.grad`.

        A parameter without a gradient counts as zeros. The parameters' own gradients are dropped or become the pieces'.
        """
        del named  # the pieces, or what an optimizer has in place of them
        with naming_lost_ranks(self.mesh.ranks):
            if self.zero == 1:
                self._scatter_gradients()
            elif self.zero == 2:
                self._land()
            for piece in self.pieces:
                if self.zero not in (1, 2):
                    piece.local.grad, piece.parameter.grad = _gradient(piece.parameter), None
                elif piece.local.grad is None:
                    piece.local.grad = torch.zeros_like(piece.local)
            self._sum_partial()
        return [piece.local for piece in self.pieces]

    def _sum_partial(self) -> None:
        """All-reduce the gradients over each piece's `partial` axes, those of equal axes together."""
        for axes in sorted({piece.partial for piece in self.pieces}):
            group = self.mesh.group(*axes)
            if group is None:
                continue
            gradients = [_gradient(piece.local) for piece in self.pieces if piece.partial == axes]
            for bucket in buckets(gradients):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                dist.all_reduce(flat, group=group)
                for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(part.view_as(gradient))

    # --- stages 1 and 2 --------------------------------------------------------------------------------------------

    def _scatter_gradients(self) -> None:
        """Stage 1: reduce-scatter the gradients of the whole parameters, bucket by bucket."""
        for pieces in self._buckets():
            rows = torch.cat(
                [_rows(_gradient(piece.parameter), piece) for piece in pieces], 1
            )  # (n, numbers of a rank)
            for piece in pieces:
                piece.parameter.grad = None
            mine = torch.empty_like(rows[0])
            reduce_scatter(mine, rows.flatten(), group=self._group(pieces[0]))
            for piece, part in zip(pieces, mine.split([_width(piece) for piece in pieces]), strict=True):
                piece.local.grad = part[: piece.local.numel()].view_as(piece.local).clone()

    def _scatter_when_ready(self, piece: Piece) -> None:
        """Stage 2: reduce-scatter a parameter's gradient when the backward pass has it, while the pass goes on."""

        def launch(parameter: Tensor) -> None:
            with torch.no_grad(), naming_lost_ranks(self.mesh.ranks):
                self._land()
                rows = _rows(_gradient(parameter), piece)
                parameter.grad = None
                mine = torch.empty_like(rows[0])
                work = reduce_scatter(mine, rows.flatten(), group=self._group(piece), async_op=True)
                assert work is not None
                self._in_flight = piece, mine, rows, work

        assert isinstance(piece.parameter, nn.Parameter)
        piece.parameter.register_post_accumulate_grad_hook(launch)

    def _land(self) -> None:
        """Wait for the gradient that is under way, and add it to its piece's."""
        if self._in_flight is None:
            return
        piece, mine, _, work = self._in_flight
        self._in_flight = None
        work.wait()
        part = mine[: piece.local.numel()].view_as(piece.local)
        piece.local.grad = part if piece.local.grad is None else piece.local.grad.add_(part)

    @torch.no_grad()
    def publish_(self) -> None:
        """After an update, stages 1 and 2: put every rank's rows in place of the old ones."""
        if self.zero not in (1, 2):
            return
        with naming_lost_ranks(self.mesh.ranks):
            for pieces in self._buckets():
                mine = torch.cat([_padded(piece.local.flatten(), _width(piece)) for piece in pieces])
                every = mine.new_empty(pieces[0].splits[-1].n, len(mine))
                all_gather(every.view(-1), mine, group=self._group(pieces[0]))
                for piece, part in zip(pieces, every.split([_width(piece) for piece in pieces], 1), strict=True):
                    whole = _whole(piece)
                    whole.copy_(part.reshape(-1)[: whole.numel()].view_as(whole))

    def _buckets(self) -> Iterator[list[Piece]]:
        """The pieces in the groups in which they travel."""
        by_tensor = {id(piece.parameter): piece for piece in self.pieces}
        for bucket in buckets([piece.parameter for piece in self.pieces]):
            yield [by_tensor[id(parameter)] for parameter in bucket]

    def _group(self, piece: Piece) -> dist.ProcessGroup | None:
        return self.mesh.group(piece.splits[-1].axis)

    # --- the norm --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all ranks' gradients together, () float32; the same bits everywhere."""
        norms = torch.stack(torch._foreach_norm([_gradient(p) for p in parameters], 2, dtype=torch.float32)).double()
        copies = torch.tensor([piece.copies(self.mesh) for piece in self.pieces], device=norms.device)
        [square] = self.mesh.ranks.sum(float((norms.square() / copies).sum()))
        return torch.tensor(square**0.5, dtype=torch.float32, device=norms.device)


def shard(model: nn.Module, config: TrainConfig, mesh: Mesh) -> Sharding:
    """Divide a model's trained parameters as the config says; changes the model in place at stage 3."""
    part = divide_model_(model, config, mesh)
    zero = stage(mesh.shape, config)
    if mesh.shape.tp > 1:
        from .tensor import split_tensors_

        assert isinstance(model, Transformer)
        split_tensors_(model, mesh)
    if zero == 3:
        fully_shard_(model, mesh)
    axis = "fsdp" if mesh.shape.fsdp > 1 else "dp"
    pieces = [
        piece_of(
            *(name, parameter, mesh),
            rows_of=axis if zero in (1, 2) else None,
            summed=axis if zero else None,
            only_on=("pp",) if mesh.shape.pp > 1 else (),
            is_spare=name in part.spare,
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return Sharding(mesh, pieces, zero=zero, part=part)


def piece_of(
    name: str,
    parameter: Tensor,
    mesh: Mesh,
    *,
    rows_of: str | None = None,  # an axis over whose ranks the rows are dealt out, beside what a DTensor says itself
    summed: str | None = None,  # an axis over which something else sums the gradient
    partial: Sequence[str] = LOSS_AXES,  # axes over which the backward pass leaves parts of a sum
    only_on: tuple[str, ...] = (),
    is_spare: bool = False,
) -> Piece:
    """What this rank trains of a parameter."""
    splits = list(_splits_of(parameter)) if is_dtensor(parameter) else []
    local = local_part(parameter).detach()
    if rows_of is not None:
        splits.append(Split(rows_of, 0, mesh.shape.size(rows_of), mesh.index(rows_of)))
        start, end = splits[-1].bounds(local.shape[0])
        local = local[start:end]
    done = {summed, *([] if summed != "fsdp" else ["dp"])}  # torch's fully_shard sums over the copies too
    if not any("tp" in (tensor.device_mesh.mesh_dim_names or ()) for tensor in [parameter] if is_dtensor(tensor)):
        partial = (*partial, "tp")  # norms: each rank has a part of the sequence, or of the heads
    done |= {split.axis for split in splits}  # an expert's owner has all ranks' tokens for it
    axes = tuple(axis for axis in mesh.axes if axis in partial and axis not in done)
    return Piece(
        *(name, parameter, local, tuple(parameter.shape), tuple(splits)),
        partial=axes,
        only_on=only_on,
        is_spare=is_spare,
    )


def _splits_of(parameter: "DTensor") -> Iterator[Split]:
    """A DTensor's divisions in the order in which they were made: expert and tensor parallel's first, then the data axes'."""
    device_mesh = parameter.device_mesh
    names = device_mesh.mesh_dim_names
    assert names is not None
    for dimension in sorted(range(len(names)), key=lambda i: names[i] not in ("ep", "tp")):
        placement = parameter.placements[dimension]
        dim = getattr(
            placement, "dim", None
        )  # of Shard, and of what fully_shard makes of a tensor that is sharded already
        if dim is not None:
            yield Split(names[dimension], dim, device_mesh.size(dimension), device_mesh.get_local_rank(dimension))


def fully_shard_(model: nn.Module, mesh: Mesh) -> None:
    """torch's fully_shard over each layer and what is left, so that at most a layer or two are whole at a time.

    Of a predictor of further tokens its layer alone: its norm also runs outside its forward pass.
    """
    from torch.distributed.fsdp import fully_shard

    axis = "fsdp" if mesh.shape.fsdp > 1 else "dp"
    device_mesh = mesh.along("dp", "fsdp") if axis == "fsdp" else mesh.along("dp")
    layers = [layer for group in model.modules() if isinstance(group, nn.ModuleList) for layer in group]
    units = [layer.layer if isinstance(layer, Predictor) else layer for layer in layers]
    for module in [*units, model]:
        sharded = fully_shard(module, mesh=device_mesh, reshard_after_forward=module is not model)
        sharded.set_force_sum_reduction_for_comms(True)  # pyright: ignore[reportAttributeAccessIssue] (gloo has no scaled sums)
        sharded.set_gradient_divide_factor(1.0)  # pyright: ignore[reportAttributeAccessIssue] (the loss is divided by the whole step's labels already)


def reduce_scatter(
    output: Tensor, rows: Tensor, *, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """torch's, which 2.13 renamed."""
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return function(output, rows, group=group, async_op=async_op)


def all_gather(output: Tensor, part: Tensor, *, group: dist.ProcessGroup | None) -> None:
    """torch's, which 2.13 renamed."""
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    function(output, part, group=group)


# --- tensors of a rank ---------------------------------------------------------------------------------------------


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether this is a rank's part of a distributed tensor; asked without importing that class."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient as this rank has it, zeros where there is none; of a DTensor its own part."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(local_part(parameter))
    if is_dtensor(gradient):
        assert is_dtensor(parameter)
        return gradient.redistribute(placements=parameter.placements).to_local()
    return gradient


def _whole(piece: Piece) -> Tensor:
    """The tensor that the piece's rows were taken from."""
    return local_part(piece.parameter)


def _width(piece: Piece) -> int:
    """Numbers of a rank in what travels: whole rows, as many as the fullest rank has."""
    whole = _whole(piece)
    return piece.splits[-1].width(whole.shape[0]) * (whole.numel() // max(1, whole.shape[0]))


def _padded(flat: Tensor, length: int) -> Tensor:
    """`flat` with zeros behind it."""
    return flat if len(flat) == length else torch.cat([flat, flat.new_zeros(length - len(flat))])


def _rows(whole: Tensor, piece: Piece) -> Tensor:
    """Every rank's rows of a tensor, (n, numbers of a rank)."""
    n, width = piece.splits[-1].n, _width(piece)
    return _padded(whole.flatten(), n * width).view(n, width)
