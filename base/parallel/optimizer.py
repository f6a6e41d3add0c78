"""An optimizer whose tensors are this rank's pieces of the parameters."""

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from ..optim.optimizer import Optimizer
from .owners import Owners
from .sharding import Piece, Sharding


class ShardedOptimizer:
    """Updates this rank's pieces by an optimizer that knows of no ranks, and makes the model whole again after it."""

    def __init__(
        self,
        sharding: Sharding,
        make: Callable[[Sequence[tuple[str, Tensor]]], Optimizer],
        *,
        whole: Collection[str] = (),  # names of matrices that the optimizer can't update piece by piece
    ) -> None:
        self.sharding = sharding
        divided = [piece for piece in sharding.pieces if piece.name in whole and piece.splits]
        self.owners = Owners(sharding.mesh, divided)
        owned = {piece.name for piece in divided}
        mine = dict(self.owners.mine)
        tensors = {piece.name: mine.get(piece.name, piece.local) for piece in sharding.pieces}
        self.inner = make([(name, tensor) for name, tensor in tensors.items() if name not in owned or name in mine])
        self.pieces: dict[str, Piece] = {piece.name: piece for piece in sharding.pieces}

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        """What this rank updates, by the parameters' names."""
        return self.inner.named

    def step(self, learning_rate: float | None = None) -> None:
        """One update from the pieces' gradients."""
        self.owners.gather_gradients()
        self.inner.step(learning_rate)
        self.publish_()

    def publish_(self) -> None:
        """Bring what was written into `named` to the model and the other ranks."""
        self.owners.scatter_()
        self.sharding.publish_()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.inner.zero_grad()
        self.owners.zero_grad()
        for piece in self.sharding.pieces:
            piece.local.grad = piece.parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """This rank's part of the optimizer's state."""
        return self.inner.state_tensors()

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave on this rank."""
        self.inner.load_state_tensors(state)

    def box(self, name: str) -> tuple[tuple[int, int], ...]:
        """Which part of parameter `name` this rank's tensor in `named` is: [start, end) in each dimension."""
        piece = self.pieces[name]
        return tuple((0, size) for size in piece.shape) if self._owns(name) else piece.box

    def writes(self, name: str) -> bool:
        """Whether it is this rank that writes its tensor of parameter `name`: of ranks that hold the same numbers one does."""
        piece, mesh = self.pieces[name], self.sharding.mesh
        parts = {*piece.only_on, *(split.axis for split in piece.splits)}
        return not piece.is_spare and mesh.index(*(axis for axis in mesh.axes if axis not in parts)) == 0

    def _owns(self, name: str) -> bool:
        return any(one.piece.name == name for one in self.owners.matrices)
