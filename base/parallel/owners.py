"""Matrices that an optimizer needs whole (Muon, SOAP), each updated by one of the ranks that hold its pieces.

An owner has the whole matrix and its optimizer state; a step gathers the gradient's pieces to it and scatters the new weights back.
Owners are dealt by size, so that memory and work are spread over the ranks (Liu et al. 2025, arXiv:2502.16982, section 2.3,
gathers to every rank instead).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Mesh
from .ranks import naming_lost_ranks
from .sharding import Piece, Split


@dataclass(eq=False)
class Owned:
    """A matrix, and which of the ranks along its splits' axes owns it."""

    piece: Piece
    owner: tuple[int, ...]  # the owner's index along each split's axis
    whole: Tensor | None  # on the owner; None elsewhere

    @property
    def is_mine(self) -> bool:
        return self.whole is not None


class Owners:
    """The matrices among `pieces` that are divided, with their owners. Every rank makes it with the same pieces in one order."""

    def __init__(self, mesh: Mesh, pieces: Sequence[Piece]) -> None:
        self.mesh = mesh
        self.matrices: list[Owned] = []
        loads: dict[tuple[str, ...], list[int]] = {}  # numbers that each rank of a group owns
        with torch.no_grad(), naming_lost_ranks(mesh.ranks):
            for piece in pieces:
                axes = tuple(split.axis for split in piece.splits)
                load = loads.setdefault(axes, [0] * mesh.shape.size(*axes))
                number = load.index(min(load))
                load[number] += torch.Size(piece.shape).numel()
                owner = _index_of(number, [split.n for split in piece.splits])
                whole = self._gathered(piece, owner, piece.local)
                self.matrices.append(Owned(piece, owner, None if whole is None else whole.contiguous()))

    @property
    def mine(self) -> list[tuple[str, Tensor]]:
        """The whole matrices that this rank updates, by name."""
        return [(one.piece.name, one.whole) for one in self.matrices if one.whole is not None]

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Give each owner its matrix's whole gradient; the pieces' own are dropped."""
        with naming_lost_ranks(self.mesh.ranks):
            for one in self.matrices:
                gradient = one.piece.local.grad
                assert gradient is not None
                whole = self._gathered(one.piece, one.owner, gradient)
                one.piece.local.grad = None
                if one.whole is not None:
                    one.whole.grad = whole

    @torch.no_grad()
    def scatter_(self) -> None:
        """Bring the owners' matrices back to the pieces."""
        with naming_lost_ranks(self.mesh.ranks):
            for one in self.matrices:
                self._scatter(one)

    def zero_grad(self) -> None:
        """Drop the whole gradients."""
        for one in self.matrices:
            if one.whole is not None:
                one.whole.grad = None

    def _gathered(self, piece: Piece, owner: tuple[int, ...], local: Tensor) -> Tensor | None:
        """The pieces of all ranks as one tensor, on the owner alone. The last division is undone first."""
        part: Tensor | None = local
        for split, target, size in reversed(list(zip(piece.splits, owner, _sizes(piece), strict=True))):
            if part is None:
                return None
            padded = _padded(part, split.dim, split.width(size))
            parts = [torch.empty_like(padded) for _ in range(split.n)] if split.index == target else None
            dist.gather(padded, parts, group=self.mesh.group(split.axis), group_dst=target)
            part = torch.cat(parts, split.dim).narrow(split.dim, 0, size) if parts is not None else None
        return part

    def _scatter(self, one: Owned) -> None:
        part = one.whole
        for i, (split, target, size) in enumerate(zip(one.piece.splits, one.owner, _sizes(one.piece), strict=True)):
            if any(s.index != t for s, t in zip(one.piece.splits[i + 1 :], one.owner[i + 1 :], strict=True)):
                continue  # another rank of the later axes stands for this one here
            parts = None
            width = split.width(size)
            if part is not None:
                parts = [_padded(part.narrow(split.dim, *run), split.dim, width) for run in _runs(split, size)]
            shape = list(_shape_before(one.piece, i))
            shape[split.dim] = width
            mine = one.piece.local.new_empty(shape)
            dist.scatter(mine, parts, group=self.mesh.group(split.axis), group_src=target)
            start, end = split.bounds(size)
            part = mine.narrow(split.dim, 0, end - start)
        assert part is not None
        one.piece.local.copy_(part)


def _index_of(number: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Number 5 of (2, 3) -> (1, 2)."""
    index = []
    for size in reversed(sizes):
        number, last = divmod(number, size)
        index.append(last)
    return tuple(reversed(index))


def _sizes(piece: Piece) -> list[int]:
    """What each split divides: the length of its dimension before it."""
    return [_shape_before(piece, i)[split.dim] for i, split in enumerate(piece.splits)]


def _shape_before(piece: Piece, i: int) -> tuple[int, ...]:
    """The shape on this rank of what split i divides."""
    shape = list(piece.shape)
    for split in piece.splits[:i]:
        start, end = split.bounds(shape[split.dim])
        shape[split.dim] = end - start
    return tuple(shape)


def _runs(split: Split, size: int) -> list[tuple[int, int]]:
    """(start, length) of every rank's run."""
    width = split.width(size)
    return [(min(i * width, size), max(0, min(width, size - i * width))) for i in range(split.n)]


def _padded(part: Tensor, dim: int, width: int) -> Tensor:
    """`part` with zeros up to `width` along `dim`, contiguous."""
    if part.shape[dim] == width:
        return part.contiguous()
    shape = list(part.shape)
    shape[dim] = width - part.shape[dim]
    return torch.cat([part, part.new_zeros(shape)], dim)
