"""SOAP (Vyas et al. 2024, arXiv:2409.11321, algorithm 3): Adam in the eigenbasis of Shampoo's preconditioner.

For a matrix W (m, n) with gradient G, L and R are running means of G G^T and G^T G. Adam's second moment is kept of the
gradient rotated into their eigenvectors, G' = Q_L^T G Q_R, where it is nearest to diagonal; the update is rotated back.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ...kernels.adamw import read_steps
from .adamw import AdamW
from .groups import Choice, decays, put_back, same_rate

Sides = Callable[[str, Tensor], tuple[bool, bool]]


def both_sides(name: str, parameter: Tensor) -> tuple[bool, bool]:
    """The choice for parameters whose roles nobody tells: matrices are rotated on both sides."""
    del name
    return (True, True) if parameter.ndim >= 2 else (False, False)


class Rotated:
    """The state of one matrix, or of a stack of them (..., m, n): moments, and for each side that is rotated the running mean
    of its Gram matrix and that mean's eigenvectors in columns, of the largest eigenvalue first."""

    def __init__(self, name: str, parameter: Tensor, sides: tuple[bool, bool]) -> None:
        self.name, self.parameter = name, parameter
        self.exp_avg = torch.zeros_like(parameter, dtype=torch.float32)
        self.exp_avg_sq = torch.zeros_like(parameter, dtype=torch.float32)  # of the rotated gradient
        self.sides = [side for side, rotated in (("left", sides[0]), ("right", sides[1])) if rotated]
        self.grams, self.bases = (
            {side: self.exp_avg.new_zeros(*parameter.shape[:-2], n, n) for side, n in self._lengths()} for _ in range(2)
        )

    def _lengths(self) -> list[tuple[str, int]]:
        return [(side, self.parameter.shape[-2 if side == "left" else -1]) for side in self.sides]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that resume needs, by name."""
        found = {f"{self.name}.exp_avg": self.exp_avg, f"{self.name}.exp_avg_sq": self.exp_avg_sq}
        for side in self.sides:
            found |= {f"{self.name}.{side}_gram": self.grams[side], f"{self.name}.{side}_basis": self.bases[side]}
        return found

    def rotate(self, x: Tensor) -> Tensor:
        """Q_L^T x Q_R."""
        x = self.bases["left"].mT @ x if "left" in self.bases else x
        return x @ self.bases["right"] if "right" in self.bases else x

    def rotate_back(self, x: Tensor) -> Tensor:
        """Q_L x Q_R^T."""
        x = self.bases["left"] @ x if "left" in self.bases else x
        return x @ self.bases["right"].mT if "right" in self.bases else x

    def start(self, gradient: Tensor) -> None:
        """From the first gradient: the Gram matrices and their eigenvectors."""
        for side in self.sides:
            self.grams[side].copy_(_gram(gradient, side))
            self.bases[side].copy_(torch.linalg.eigh(self.grams[side])[1].flip(-1))

    def direction(
        self, gradient: Tensor, beta1: float, beta2: float, eps: float, *, step: int, refresh: bool
    ) -> Tensor:
        """Adam's direction from this gradient, rotated back; then the gradient enters the Gram matrices.

        `refresh`: the eigenvectors follow by one step of power iteration and a QR decomposition (algorithm 4).
        """
        rotated = self.rotate(gradient)
        self.exp_avg.lerp_(gradient, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        root = (self.exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
        found = self.rotate_back(self.rotate(self.exp_avg) / root).div_(1 - beta1**step)
        for side in self.sides:
            self.grams[side].lerp_(_gram(gradient, side), 1 - beta2)
            if refresh:
                self._refresh(side)
        return found

    def _refresh(self, side: str) -> None:
        """Columns in the order of their eigenvalues, which the second moment's rows or columns follow; then Q of their image."""
        image = self.grams[side] @ self.bases[side]
        order = (self.bases[side] * image).sum(-2).argsort(dim=-1, descending=True)  # (..., n), by Rayleigh quotients
        self.bases[side].copy_(torch.linalg.qr(image.gather(-1, order[..., None, :].expand_as(image)))[0])
        index = order[..., :, None] if side == "left" else order[..., None, :]
        self.exp_avg_sq.copy_(self.exp_avg_sq.gather(-2 if side == "left" else -1, index.expand_as(self.exp_avg_sq)))


def _gram(gradient: Tensor, side: str) -> Tensor:
    return gradient @ gradient.mT if side == "left" else gradient.mT @ gradient


class SOAP:
    """SOAP for matrices, AdamW for the rest, as one optimizer with one learning rate: its updates are of Adam's size.

    A side longer than `largest` is not rotated (the paper's one-sided form, section 7.1), nor is one that `sides` leaves
    out: a vocabulary's. A parameter's first gradient sets its basis and moves it not at all, so that no gradient is measured
    in a basis that was made from it alone; the authors' code does the same.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        *,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),  # the second is the Gram matrices' too
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay: Choice = decays,  # factor of weight_decay
        rate: Choice = same_rate,  # factor of the learning rate
        sides: Sides = both_sides,  # which sides of a parameter may be rotated: left (rows), right (columns)
        every: int = 10,  # updates between two refreshes of the eigenvectors
        largest: int = 4096,
    ) -> None:
        if every < 1:
            raise ValueError(f"soap_every={every} must be >= 1: updates between two refreshes of the eigenvectors")
        if largest < 1:
            raise ValueError(f"soap_largest={largest} must be >= 1: the longest side that is rotated")
        self.named = list(parameters)
        self.learning_rate, self.betas, self.eps, self.every = learning_rate, betas, eps, every
        chosen = {
            name: (left and p.shape[-2] <= largest, right and p.shape[-1] <= largest)
            for name, p in self.named
            for left, right in [sides(name, p)]
            if left or right
        }
        self.rotated = [Rotated(name, p, chosen[name]) for name, p in self.named if any(chosen.get(name, ()))]
        own = {one.name for one in self.rotated}
        rest = [(name, p) for name, p in self.named if name not in own]
        if not self.rotated:
            raise ValueError(
                f"soap has no matrix to rotate with a side of at most soap_largest={largest}; use optimizer adamw"
            )
        self.steps = [0] * len(self.rotated)  # gradients of each, its first included
        self.groups = [
            (rate(one.name, one.parameter), weight_decay * decay(one.name, one.parameter)) for one in self.rotated
        ]
        self.adamw = None
        if rest:
            self.adamw = AdamW(
                rest,
                learning_rate=learning_rate,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                decay=decay,
                rate=rate,
            )

    @torch.no_grad()
    def step(self, learning_rate: float | None = None) -> None:
        """One update in place from the parameters' .grad, at this learning rate."""
        lr = self.learning_rate if learning_rate is None else learning_rate
        if self.adamw is not None:
            self.adamw.step(lr)
        for i, one in enumerate(self.rotated):
            if one.parameter.grad is None:
                continue
            gradient = one.parameter.grad.float()
            self.steps[i] += 1
            n = self.steps[i] - 1  # updates, this one included
            if n == 0:
                one.start(gradient)
                continue
            update = one.direction(gradient, *self.betas, self.eps, step=n, refresh=n % self.every == 0)
            rate, decay = lr * self.groups[i][0], self.groups[i][1]
            one.parameter.mul_(1 - rate * decay).add_(update.to(one.parameter.dtype), alpha=-rate)

    def zero_grad(self) -> None:
        """Drop the gradients, so that their memory is free until the next backward pass."""
        for _, parameter in self.named:
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that resume needs, by name."""
        state = self.adamw.state_tensors() if self.adamw is not None else {}
        for one in self.rotated:
            state |= one.tensors()
        return state | {"n_steps_rotated": torch.tensor(self.steps)}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave. Raises ValueError when a parameter is missing or has another shape."""
        steps = read_steps(state.get("n_steps_rotated"), len(self.rotated))
        if self.adamw is not None:
            self.adamw.load_state_tensors(state)
        for one in self.rotated:
            for key, target in one.tensors().items():
                put_back(target, state, key)
        self.steps = steps
