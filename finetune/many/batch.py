"""One batch out of the rows of many jobs, and its loss."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.model.transformer import IGNORE, Transformer
from ...kernels.cross_entropy import weighted_linear_cross_entropy

MOST_PADDING = 0.25  # of a GPU's batch; where rows would be padded by more they are put end to end


def worth_packing(parts: Sequence[Mapping[str, Tensor] | None], device: str) -> bool:
    """Whether rows of different lengths are put end to end: always on a CPU, whose time is that of the tokens; on a GPU, which
    wants the jobs' equal counts of tokens for one batched product, where padding would be more than MOST_PADDING."""
    if device == "cpu":
        return True
    shapes = [part["ids"].shape for part in parts if part is not None]
    width = max(shape[1] for shape in shapes)
    n_used, n_padded = sum(shape.numel() for shape in shapes), sum(shape[0] * width for shape in shapes)
    return n_padded - n_used > MOST_PADDING * n_padded


def together(
    parts: Sequence[Mapping[str, Tensor] | None],  # a micro-batch of each job, or None for a job that has no more
    *,
    packed: bool,  # whether rows of different lengths may be put end to end in one row
) -> tuple[dict[str, Tensor], list[int]]:
    """One batch of all jobs' rows, grouped by job, and how many of its tokens, padding included, are each job's.

    Rows of one length stay rows. Else they are put end to end without their padding, each seeing only itself, so that no job
    waits for another's longest row; or, where that is not wanted, all are padded to the longest.
    """
    present = [part for part in parts if part is not None]
    has_borders = any("cu_seqlens" in part for part in present)
    widths = {part["ids"].shape[1] for part in present}
    if has_borders or (packed and len(widths) > 1):
        return _end_to_end(parts)
    width = max(widths)
    batch = {
        name: torch.cat([F.pad(part[name], (0, width - part[name].shape[1]), value=fill) for part in present])
        for name, fill in (("ids", 0), ("targets", IGNORE))
    }
    return batch, [0 if part is None else part["ids"].shape[0] * width for part in parts]


def _end_to_end(parts: Sequence[Mapping[str, Tensor] | None]) -> tuple[dict[str, Tensor], list[int]]:
    ids, targets, lengths, counts = [], [], [], []
    for part in parts:
        counts.append(0)
        if part is None:
            continue
        if "cu_seqlens" in part:
            sizes = part["cu_seqlens"].diff().tolist()
            rows = list(zip(part["ids"][0].split(sizes), part["targets"][0].split(sizes), strict=True))
        else:
            rows = [_without_padding(*row) for row in zip(part["ids"], part["targets"], strict=True)]
        for row_ids, row_targets in rows:
            ids.append(row_ids)
            targets.append(row_targets)
            lengths.append(len(row_ids))
            counts[-1] += len(row_ids)
    return {
        "ids": torch.cat(ids)[None],
        "targets": torch.cat(targets)[None],
        "positions": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    }, counts


def _without_padding(ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A row up to its last label: what follows is padding, or text that no label needs."""
    labels = (targets != IGNORE).nonzero()
    end = int(labels[-1]) + 1 if len(labels) else 1
    return ids[:end], targets[:end]


def weighted_loss(model: Transformer, batch: Mapping[str, Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of weights (N,) times each token's loss, to be differentiated, and the losses (N,) in nats, detached."""
    hidden = model.hidden_states(
        batch["ids"], positions=batch.get("positions"), cu_seqlens=batch.get("cu_seqlens")
    ).flatten(0, 1)
    targets = batch["targets"].flatten()
    if type(model.head) is nn.Linear:
        return weighted_linear_cross_entropy(hidden, model.lm_head.weight, targets, weights, ignore_index=IGNORE)
    logits = model.head(hidden).float()  # an adapted or quantized head is a function, not a matrix
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    return (losses * weights).sum(), losses.detach()
