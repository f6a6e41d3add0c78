"""An optimizer whose tensors are this rank's pieces of the parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from .sharding import Sharding


class Inner(Protocol):
    """What is asked of the optimizer of the pieces; base/training/optimizers.py: Optimizer."""

    @property
    def named(self) -> list[tuple[str, Tensor]]: ...
    def step(self, learning_rate: float | None = None) -> None: ...
    def zero_grad(self) -> None: ...
    def state_tensors(self) -> dict[str, Tensor]: ...
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None: ...


class ShardedOptimizer:
    """Updates this rank's pieces by an optimizer that knows of no ranks, and makes the model whole again after it."""

    def __init__(self, sharding: Sharding, make: Callable[[Sequence[tuple[str, Tensor]]], Inner]) -> None:
        self.sharding = sharding
        self.inner = make([(piece.name, piece.local) for piece in sharding.pieces])

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        """What this rank updates, by the parameters' names."""
        return self.inner.named

    def step(self, learning_rate: float | None = None) -> None:
        """One update from the pieces' gradients."""
        self.inner.step(learning_rate)
        self.publish_()

    def publish_(self) -> None:
        """Bring what was written into `named` to the model and the other ranks."""
        self.sharding.publish_()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.inner.zero_grad()
        for piece in self.sharding.pieces:
            piece.local.grad = piece.parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """This rank's part of the optimizer's state."""
        return self.inner.state_tensors()

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave on this rank."""
        self.inner.load_state_tensors(state)
