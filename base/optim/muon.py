"""Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025, arXiv:2502.16982).

The momentum of each hidden weight matrix is replaced by the nearest semi-orthogonal matrix, so that every direction moves
alike. Embeddings, the head, norms and biases go to AdamW.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .adamw import AdamW, decays

# The odd quintics a x + b x^3 + c x^5 that bring singular values in [0.01, 1] nearest to 1, each the best for the interval
# that the one before leaves (Amsel et al. 2025, "The Polar Express", arXiv:2505.16932, algorithm 1). After the third, all
# lie in [0.73, 1.27]; Jordan's one quintic needs five iterations for [0.65, 1.25].
POLYNOMIALS = (
    (8.0933685, -23.6204303, 17.4461517),
    (3.6365856, -2.7219267, 0.5365463),
    (2.6613000, -1.9771545, 0.4526164),
)
GRAM_RATIO = (
    1.5  # sides' ratio from which iterating on the Gram matrix is fewer products: 9 + 2r against 3 + 6r of rows^3
)


def orthogonalize(matrix: Tensor) -> Tensor:  # (..., rows, columns)
    """About U V^T of the singular value decomposition U S V^T, by the three polynomials above.

    Singular values below 1% of the matrix's Frobenius norm are only multiplied, by at most 79. All polynomials of X X^T
    commute, so for a long matrix the iteration runs on that small symmetric matrix alone, and X is multiplied once.
    """
    x = matrix.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # work with the smaller Gram matrix
        x = x.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).reshape(-1, *x.shape[-2:])  # largest singular value <= 1
    x = _long(x) if x.shape[-1] >= GRAM_RATIO * x.shape[-2] else _square(x)
    x = x.reshape(*matrix.shape[:-2], *x.shape[-2:])
    return x.mT if tall else x


def _square(x: Tensor) -> Tensor:  # (n, rows, columns)
    """X <- (a + b G + c G^2) X with G = X X^T, for each polynomial."""
    for a, b, c in POLYNOMIALS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _long(x: Tensor) -> Tensor:  # (n, rows, columns)
    """The same, with G <- Q G Q and the product of all Q = a + b G + c G^2 kept instead of X: rows x rows products."""
    gram, product = torch.bmm(x, x.mT), None
    for i, (a, b, c) in enumerate(POLYNOMIALS):
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=-2, dim2=-1).add_(a)
        product = q if product is None else torch.bmm(q, product)
        if i < len(POLYNOMIALS) - 1:
            gram = torch.bmm(torch.bmm(q, gram), q)
    assert product is not None
    return torch.bmm(product, x)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """The choice for parameters whose roles nobody tells."""
    del name
    return parameter.ndim == 2


class Muon:
    """Muon for hidden matrices, AdamW for the rest, as one optimizer with one learning rate.

    An orthogonal update of (out, in) has root mean square 1/sqrt(max(out, in)); it is scaled by 0.2 * sqrt(max(out, in)) to
    the root mean square of an AdamW update, so that AdamW's learning rate and decay serve both (arXiv:2502.16982, eq. 4).
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        *,
        learning_rate: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay: Callable[[str, Tensor], bool] = decays,  # of the parameters that go to AdamW
        hidden: Callable[
            [str, Tensor], bool
        ] = is_matrix,  # which parameters are orthogonalized (base/model/init.py: HIDDEN)
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1)")
        self.named = list(parameters)
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.hidden = [(name, p) for name, p in self.named if hidden(name, p)]
        rest = [(name, p) for name, p in self.named if not hidden(name, p)]
        if not self.hidden or not rest:
            raise ValueError("muon needs hidden matrices and other parameters; use optimizer adamw")
        self.adamw = AdamW(
            rest, learning_rate=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, decay=decay
        )
        self.momenta = [torch.zeros_like(p, dtype=torch.float32) for _, p in self.hidden]

    @torch.no_grad()
    def step(self, learning_rate: float | None = None) -> None:
        """One update in place from the parameters' .grad, at this learning rate."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        self.adamw.step(rate)
        for group in self._same_shapes():
            gradients = torch.stack([g.float() for i in group if (g := self.hidden[i][1].grad) is not None])
            momenta = torch.stack([self.momenta[i] for i in group])
            momenta.lerp_(gradients, 1 - self.momentum)
            updates = orthogonalize(gradients.lerp_(momenta, self.momentum))  # Nesterov's look-ahead
            updates *= 0.2 * max(updates.shape[-2:]) ** 0.5
            for i, update, momentum in zip(group, updates, momenta, strict=True):
                self.momenta[i].copy_(momentum)
                parameter = self.hidden[i][1]
                parameter.mul_(1 - rate * self.weight_decay).add_(update.to(parameter.dtype), alpha=-rate)

    def _same_shapes(self) -> list[list[int]]:
        """Indices of the hidden matrices with a gradient, grouped by shape: one batched product serves a group."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, parameter) in enumerate(self.hidden):
            if parameter.grad is not None:
                groups.setdefault(tuple(parameter.shape), []).append(i)
        return list(groups.values())

    def zero_grad(self) -> None:
        """Drop the gradients, so that their memory is free until the next backward pass."""
        for _, parameter in self.named:
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that resume needs, by name."""
        momenta = {f"{name}.momentum": m for (name, _), m in zip(self.hidden, self.momenta, strict=True)}
        return self.adamw.state_tensors() | momenta

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave. Raises ValueError when a parameter is missing or has another shape."""
        self.adamw.load_state_tensors(state)
        for (name, parameter), momentum in zip(self.hidden, self.momenta, strict=True):
            saved = state.get(f"{name}.momentum")
            if saved is None or saved.shape != parameter.shape:
                found = "nothing" if saved is None else tuple(saved.shape)
                raise ValueError(
                    f"optimizer state {name}.momentum: {found} saved, {tuple(parameter.shape)} due; "
                    "resume with the config that the run was started with"
                )
            momentum.copy_(saved)
