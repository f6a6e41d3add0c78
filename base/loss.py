"""Next-token cross entropy as the loop wants it: a sum and a count, so that any split into micro-batches is exact."""

from collections.abc import Mapping

from torch import Tensor, nn

from .model.transformer import IGNORE


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed cross entropy in nats over the batch's labels; () float32.

    batch: ids (B, T), targets (B, T) already shifted, -100 where there is no loss; positions and cu_seqlens when packed.
    One call of the model, so that what wraps its call (torch.compile, DDP, FSDP) sees all of it.
    """
    return model(batch["ids"], batch["targets"], positions=batch.get("positions"), cu_seqlens=batch.get("cu_seqlens"))


def n_labels(batch: Mapping[str, Tensor]) -> int:
    """How many positions of the batch carry loss."""
    return int((batch["targets"] != IGNORE).sum())
