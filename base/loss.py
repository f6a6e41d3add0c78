"""Next-token cross entropy as the loop wants it: a sum and a count, so that any split into micro-batches is exact."""

from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.cross_entropy import linear_cross_entropy
from .model.transformer import Transformer

IGNORE = -100  # a target with this id carries no loss


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed cross entropy in nats over the batch's labels; () float32.

    batch: ids (B, T), targets (B, T) already shifted, -100 where there is no loss; positions and cu_seqlens when packed.
    The logits are never held whole: lm_head and the loss are one kernel.
    """
    transformer = cast(Transformer, model)
    hidden = transformer.hidden_states(
        batch["ids"], positions=batch.get("positions"), cu_seqlens=batch.get("cu_seqlens")
    )  # (B, T, D)
    hidden, targets = hidden.flatten(0, 1), batch["targets"].flatten()  # (N, D), (N,)
    head = transformer.lm_head
    if type(head) is nn.Linear:
        return linear_cross_entropy(hidden, head.weight, targets, ignore_index=IGNORE, reduction="sum")
    # An adapted or quantized head is a function, not a matrix.
    return F.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORE, reduction="sum")


def n_labels(batch: Mapping[str, Tensor]) -> int:
    """How many positions of the batch carry loss."""
    return int((batch["targets"] != IGNORE).sum())
