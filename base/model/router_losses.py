"""The routers' losses of one call of the model, which its mixtures of experts leave beside their outputs."""

import torch
from torch import Tensor


class RouterLosses:
    """What each mixture of experts of one call adds, () float32 each.

    No list: torch's fully_shard hands a layer copies of the lists and tuples among its arguments once they hold a tensor with a
    gradient, so that all losses but the first would go into copies and be lost.
    """

    def __init__(self) -> None:
        self._each: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._each)

    def append(self, loss: Tensor) -> None:
        """Add one mixture's."""
        self._each.append(loss)

    def sum(self) -> Tensor:
        """Of all mixtures, () float32; there must be one."""
        return torch.stack(self._each).sum()

    def mean(self) -> Tensor:
        """Over the mixtures, () float32; there must be one."""
        return torch.stack(self._each).mean()
