"""What a run minimizes, as the loop asks for it: a loss summed over the labels of a micro-batch, and their number."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from ..loss import n_labels, next_token_loss

Batch = Mapping[str, Tensor]
Figures = Mapping[str, Tensor | float]


class Objective(Protocol):
    """What is minimized: next-token loss, DPO, GRPO."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Figures]:
        """The loss summed over the batch's labels, () float32, and perhaps figures summed in the same way.

        The loop divides both by the labels of the whole step, and writes the figures to metrics.jsonl.
        """
        ...

    def n_labels(self, batch: Batch) -> int:
        """How many terms the loss of this batch is the sum of: tokens, pairs or answers."""
        ...

    def n_tokens(self, batch: Batch) -> int:
        """How many tokens the model reads for it."""
        ...


class NextToken:
    """Next-token cross entropy over the targets that carry loss, in nats: pretraining and supervised fine-tuning."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Figures]:
        return next_token_loss(model, batch)

    def n_labels(self, batch: Batch) -> int:
        return n_labels(batch)

    def n_tokens(self, batch: Batch) -> int:
        return n_ids(batch)


def n_ids(batch: Batch) -> int:
    """Positions of the batch's ids, padding included."""
    return batch["ids"].numel()
