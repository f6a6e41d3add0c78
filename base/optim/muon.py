"""Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025, arXiv:2502.16982).

The momentum of each hidden weight matrix is replaced by the nearest semi-orthogonal matrix (polynomials.py), so that every
direction moves alike. Embeddings, the head, norms and biases go to AdamW.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .adamw import AdamW
from .groups import Choice, decays, put_back, same_rate
from .polynomials import orthogonalize, quintics

UPDATE_RMS = 0.2  # root mean square of an update with learning rate 1, about AdamW's (arXiv:2502.16982, section 2.2)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """The choice for parameters whose roles nobody tells."""
    del name
    return parameter.ndim == 2


class Muon:
    """Muon for hidden matrices, AdamW for the rest, as one optimizer with one learning rate.

    An orthogonal update of (out, in) has root mean square 1/sqrt(max(out, in)); it is scaled by 0.2 * sqrt(max(out, in)) to
    the root mean square of an AdamW update, so that AdamW's learning rate and decay serve both (arXiv:2502.16982, eq. 4).

    `normalize_rows` is NorMuon (Li et al. 2025, arXiv:2510.05491, algorithm 1): each row of the orthogonal matrix, the weights
    of one neuron, is divided by the root of its running mean square, and the whole is brought to the same 0.2 exactly.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        *,
        learning_rate: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),  # of AdamW; the second is the rows' mean square's too
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay: Choice = decays,  # factor of weight_decay
        rate: Choice = same_rate,  # factor of the learning rate
        hidden: Callable[
            [str, Tensor], bool
        ] = is_matrix,  # which parameters are orthogonalized (base/model/init.py: HIDDEN)
        polynomial: str = "best",  # or jordan
        iterations: int = 3,
        normalize_rows: bool = False,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1)")
        self.named = list(parameters)
        self.learning_rate, self.momentum, self.beta2 = learning_rate, momentum, betas[1]
        self.polynomials = quintics(polynomial, iterations)
        self.hidden = [(name, p) for name, p in self.named if hidden(name, p)]
        rest = [(name, p) for name, p in self.named if not hidden(name, p)]
        if not self.hidden or not rest:
            raise ValueError("muon needs hidden matrices and other parameters; use optimizer adamw")
        self.adamw = AdamW(
            rest, learning_rate=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, decay=decay, rate=rate
        )
        self.groups = [(rate(name, p), weight_decay * decay(name, p)) for name, p in self.hidden]
        self.momenta = [torch.zeros_like(p, dtype=torch.float32) for _, p in self.hidden]
        self.row_squares = [  # (..., out, 1)
            torch.zeros_like(p[..., :1], dtype=torch.float32) for _, p in (self.hidden if normalize_rows else [])
        ]

    @torch.no_grad()
    def step(self, learning_rate: float | None = None) -> None:
        """One update in place from the parameters' .grad, at this learning rate."""
        lr = self.learning_rate if learning_rate is None else learning_rate
        self.adamw.step(lr)
        for members in self._alike():
            gradients = torch.stack([g.float() for i in members if (g := self.hidden[i][1].grad) is not None])
            momenta = torch.stack([self.momenta[i] for i in members])
            momenta.lerp_(gradients, 1 - self.momentum)
            updates = orthogonalize(gradients.lerp_(momenta, self.momentum), self.polynomials)  # Nesterov's look-ahead
            updates = self._normalized(updates, members)
            rate, decay = lr * self.groups[members[0]][0], self.groups[members[0]][1]
            for i, update, momentum in zip(members, updates, momenta, strict=True):
                self.momenta[i].copy_(momentum)
                parameter = self.hidden[i][1]
                parameter.mul_(1 - rate * decay).add_(update.to(parameter.dtype), alpha=-rate)

    def _normalized(self, updates: Tensor, members: list[int]) -> Tensor:  # (n, ..., out, in)
        """The updates at the size of AdamW's; with normalize_rows also each row by its own history."""
        if not self.row_squares:
            return updates.mul_(UPDATE_RMS * max(updates.shape[-2:]) ** 0.5)
        squares = torch.stack([self.row_squares[i] for i in members])
        squares.lerp_(updates.square().mean(-1, keepdim=True), 1 - self.beta2)
        for i, square in zip(members, squares, strict=True):
            self.row_squares[i].copy_(square)
        updates = updates / (squares.sqrt() + 1e-10)
        rms = updates.square().mean(dim=(-2, -1), keepdim=True).sqrt()
        return updates.mul_(UPDATE_RMS / (rms + 1e-10))

    def _alike(self) -> list[list[int]]:
        """Indices of the hidden matrices with a gradient, by shape, rate and decay: one batched product serves a group."""
        groups: dict[object, list[int]] = {}
        for i, (_, parameter) in enumerate(self.hidden):
            if parameter.grad is not None:
                groups.setdefault((tuple(parameter.shape), self.groups[i]), []).append(i)
        return list(groups.values())

    def zero_grad(self) -> None:
        """Drop the gradients, so that their memory is free until the next backward pass."""
        for _, parameter in self.named:
            parameter.grad = None

    def _own(self) -> dict[str, Tensor]:
        """The hidden matrices' state by name, not copied."""
        own = {f"{name}.momentum": m for (name, _), m in zip(self.hidden, self.momenta, strict=True)}
        return own | {f"{name}.row_square": s for (name, _), s in zip(self.hidden, self.row_squares, strict=False)}

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that resume needs, by name."""
        return self.adamw.state_tensors() | self._own()

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave. Raises ValueError when a parameter is missing or has another shape."""
        self.adamw.load_state_tensors(state)
        for key, target in self._own().items():
            put_back(target, state, key)
