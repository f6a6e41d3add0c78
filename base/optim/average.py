"""Exponential average of the weights beside any optimizer (Polyak & Juditsky 1992; Tarvainen & Valpola 2017, arXiv:1703.01780)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .groups import put_back
from .optimizer import Optimizer


class Averaged:
    """An optimizer that also keeps average <- d * average + (1 - d) * weights after each update, in float32.

    d is decay, but at most (1 + n) / (10 + n) at update n, so that the start is forgotten soon; before the first update the
    average is the weights.
    """

    def __init__(self, inner: Optimizer, *, decay: float) -> None:
        self.inner, self.decay = inner, decay
        self.n_updates = 0
        self.averages = [parameter.detach().float().clone() for _, parameter in inner.named]

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        """What the optimizer trains."""
        return self.inner.named

    @torch.no_grad()
    def step(self, learning_rate: float | None = None) -> None:
        """One update, and the averages follow."""
        self.inner.step(learning_rate)
        self.n_updates += 1
        d = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        for average, (_, parameter) in zip(self.averages, self.named, strict=True):
            average.lerp_(parameter.float(), 1 - d)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.inner.zero_grad()

    @torch.no_grad()
    def exchange_(self) -> None:
        """Put the averages into the parameters and the parameters' values into the averages' place, one by one.

        Twice is none of it for float32 parameters.
        """
        for average, (_, parameter) in zip(self.averages, self.named, strict=True):
            kept = parameter.float().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state and the averages, by name."""
        own = {f"{name}.average": a for (name, _), a in zip(self.named, self.averages, strict=True)}
        return self.inner.state_tensors() | own | {"n_steps_averaged": torch.tensor(self.n_updates)}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave. Raises ValueError as the optimizer does."""
        n_averaged = torch.tensor(0)
        put_back(n_averaged, state, "n_steps_averaged")
        self.inner.load_state_tensors(state)
        for average, (name, _) in zip(self.averages, self.named, strict=True):
            put_back(average, state, f"{name}.average")
        self.n_updates = int(n_averaged)


def averages_in(optimizer: object) -> list[Averaged]:
    """The averages that an optimizer keeps, also where it wraps others (`inner`, or `parts` by name)."""
    if isinstance(optimizer, Averaged):
        return [optimizer]
    parts: Mapping[str, object] = getattr(optimizer, "parts", {})
    inside: Sequence[object] = [getattr(optimizer, "inner", None), *parts.values()]
    return [found for one in inside if one is not None for found in averages_in(one)]


def exchange_averages_(optimizer: object) -> None:
    """Averages into the model and the weights into their place, on every rank."""
    for one in averages_in(optimizer):
        one.exchange_()
    publish: Callable[[], None] | None = getattr(optimizer, "publish_", None)
    if publish is not None:
        publish()


@contextmanager
def averaged_weights(optimizer: object) -> Iterator[None]:
    """Within the block the model has the averages."""
    exchange_averages_(optimizer)
    try:
        yield
    finally:
        exchange_averages_(optimizer)
