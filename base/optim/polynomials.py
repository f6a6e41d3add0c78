"""Muon's orthogonalization: odd polynomials of a matrix that bring its singular values to about one, without an SVD."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

Quintic = tuple[float, float, float]  # a, b, c of a x + b x^3 + c x^5
JORDAN: Quintic = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: five times, for [0.65, 1.25]
POLYNOMIALS = ("best", "jordan")
GRAM_RATIO = (
    1.5  # sides' ratio from which iterating on the Gram matrix is fewer products: 9 + 2r against 3 + 6r of rows^3
)
NARROW = (
    1 - 5e-6
)  # low / high from which the equations of the best quintic are singular, and Newton-Schulz's is as good


def quintics(polynomial: str, n: int) -> tuple[Quintic, ...]:
    """The n polynomials that are applied in turn: `best`, or `jordan`'s one n times. Raises ValueError for other names.

    `best` serves singular values from 10^(-(n + 1) / 2) of the Frobenius norm on: from 1% with three, from 0.1% with five.
    """
    if polynomial not in POLYNOMIALS:
        raise ValueError(f"unknown muon_polynomial {polynomial!r}; choose {' or '.join(POLYNOMIALS)}")
    if not 1 <= n <= 12:
        raise ValueError(f"muon_iterations={n} must lie in 1..12; 3 is the default, 5 is more exact")
    return best_quintics(10 ** (-(n + 1) / 2), n) if polynomial == "best" else (JORDAN,) * n


@cache
def best_quintics(low: float, n: int) -> tuple[Quintic, ...]:
    """The odd quintics that bring values in [low, 1] nearest to 1, each the best for the interval that the one before
    leaves (Amsel et al. 2025, "The Polar Express", arXiv:2505.16932, theorem 3.1 and algorithm 1), to seven digits.

    For low = 0.01 three of them leave [0.73, 1.27].
    """
    found, high = [], 1.0
    for _ in range(n):
        a, b, c = (round(float(x), 7) for x in _best_quintic(low, high))
        found.append((a, b, c))
        error = abs(a * low + b * low**3 + c * low**5 - 1)
        low, high = 1 - error, 1 + error
    return tuple(found)


def _best_quintic(low: float, high: float) -> Sequence[float]:
    """Remez' exchange: the quintic whose error is -E, E, -E, E at low, two points between, and high."""
    if low > NARROW * high:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    points = np.array([low, (3 * low + high) / 4, (low + 3 * high) / 4, high])
    a = b = c = 0.0
    for _ in range(100):
        system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        root = (9 * b * b - 20 * a * c) ** 0.5  # of the derivative a + 3 b x^2 + 5 c x^4
        inner = np.sqrt(np.array([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]))
        moved = np.abs(inner - points[1:3]).max()
        points = np.array([low, *inner, high])
        if moved < 1e-14:
            break
    return a, b, c


def orthogonalize(
    matrix: Tensor,  # (..., rows, columns)
    polynomials: Sequence[Quintic] | None = None,  # None: the three best
) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T, float32.

    With the three best, singular values below 1% of the matrix's Frobenius norm are only multiplied, by at most 79. All
    polynomials of X X^T commute, so for a long matrix the iteration runs on that small symmetric matrix alone, and X is
    multiplied once.
    """
    chosen = quintics("best", 3) if polynomials is None else polynomials
    x = matrix.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # work with the smaller Gram matrix
        x = x.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).reshape(-1, *x.shape[-2:])  # largest singular value <= 1
    x = _long(x, chosen) if x.shape[-1] >= GRAM_RATIO * x.shape[-2] else _square(x, chosen)
    x = x.reshape(*matrix.shape[:-2], *x.shape[-2:])
    return x.mT if tall else x


def _square(x: Tensor, polynomials: Sequence[Quintic]) -> Tensor:  # (n, rows, columns)
    """X <- (a + b G + c G^2) X with G = X X^T, for each polynomial."""
    for a, b, c in polynomials:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _long(x: Tensor, polynomials: Sequence[Quintic]) -> Tensor:  # (n, rows, columns)
    """The same, with G <- Q G Q and the product of all Q = a + b G + c G^2 kept instead of X: rows x rows products."""
    gram, product = torch.bmm(x, x.mT), None
    for i, (a, b, c) in enumerate(polynomials):
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=-2, dim2=-1).add_(a)
        product = q if product is None else torch.bmm(q, product)
        if i < len(polynomials) - 1:
            gram = torch.bmm(torch.bmm(q, gram), q)
    assert product is not None
    return torch.bmm(product, x)
