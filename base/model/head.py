"""Logits with a soft cap, and their loss without holding them whole."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recompute import recompute

ROWS = 1024  # tokens whose logits are held at a time


@runtime_checkable
class TakesLoss(Protocol):
    """A head that takes the loss itself: one whose vocabulary is divided over ranks."""

    def summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in nats of hidden (N, D) and targets (N,), summed, () float32; -100: no loss there."""
        ...


class CappedHead:
    """cap * tanh(head(x) / cap) (Gemma 2, arXiv:2408.00118, section 2): a function of hidden states, not a matrix.

    It wraps whatever the head is, so that an adapter's part, or a quantized head, lies within the cap.
    """

    def __init__(self, head: nn.Module, cap: float) -> None:
        self.head, self.cap = head, cap

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.cap * torch.tanh(self.head(hidden) / self.cap)


def summed_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, ignore_index: int) -> Tensor:
    """Cross entropy in nats of hidden (N, D) and targets (N,), summed in float32, (). ROWS rows at a time, whose logits are
    computed again in the backward pass."""

    def of_piece(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), labels, ignore_index=ignore_index, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, labels in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        total = total + recompute(of_piece, rows, labels)
    return total
