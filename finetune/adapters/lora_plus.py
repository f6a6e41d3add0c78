"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354, section 4): B learns `ratio` times as fast as A, with any optimizer."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ...base.training.optimizers import Optimizer


class TwoRates:
    """Two optimizers as one: the parameters of the second have `ratio` times the learning rate (decoupled decay included)."""

    def __init__(
        self,
        parameters: Sequence[tuple[str, Tensor]],
        make: Callable[[Sequence[tuple[str, Tensor]]], Optimizer],
        *,
        ratio: float,
        learning_rate: float,
    ) -> None:
        self.ratio, self.learning_rate = ratio, learning_rate
        fast = [(name, p) for name, p in parameters if name.endswith(".lora_b")]
        slow = [(name, p) for name, p in parameters if not name.endswith(".lora_b")]
        self.parts = {"a": make(slow), "b": make(fast)}

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        """All parameters, those of the usual rate first."""
        return [*self.parts["a"].named, *self.parts["b"].named]

    def step(self, learning_rate: float | None = None) -> None:
        """One update; the rate is A's."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        self.parts["a"].step(rate)
        self.parts["b"].step(rate * self.ratio)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts.values():
            part.zero_grad()

    def state_tensors(self) -> dict[str, Tensor]:
        """Both optimizers' state, names begun with "a." and "b."."""
        return {f"{key}.{name}": t for key, part in self.parts.items() for name, t in part.state_tensors().items()}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave. Raises ValueError as the optimizers do."""
        for key, part in self.parts.items():
            start = f"{key}."
            part.load_state_tensors({n.removeprefix(start): t for n, t in state.items() if n.startswith(start)})
