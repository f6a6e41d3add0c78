"""Encoded records -> batches: several documents in one row without seeing each other, or one a row with padding.

A record of n tokens takes n - 1 positions: its last token is only ever a target.

    ids        the fox ran <eos> | a cat <eos>
    inputs     the fox ran         a cat
    targets    fox ran <eos>       cat <eos>      -100 where the target is not a label
    positions    0   1   2           0   1
    cu_seqlens   0                   3        5   where each document begins, and the end
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...base.data.best_fit import check_longest, pack
from ...base.loss import IGNORE
from .chat import Encoded
from .row_store import row_lengths


def collate_packed(encoded: Sequence[Encoded], *, multiple_of: int = 1, pad_id: int = 0) -> dict[str, Tensor]:
    """One row of several documents: ids, targets, positions (1, T) int64 and cu_seqlens (n_docs + 1,) int32.

    Positions restart at 0 in each document. T is rounded up to `multiple_of` with a last document of padding that
    carries no label, so that compiled code and kernels meet few shapes.
    """
    rows = [_inputs_and_targets(record) for record in encoded]
    n_tokens = sum(len(ids) for ids, _ in rows)
    if n_tokens % multiple_of:
        n_pad = -n_tokens % multiple_of
        rows.append((np.full(n_pad, pad_id), np.full(n_pad, IGNORE)))
    lengths = [len(ids) for ids, _ in rows]
    return {
        "ids": torch.from_numpy(np.concatenate([ids for ids, _ in rows]).astype(np.int64))[None],
        "targets": torch.from_numpy(np.concatenate([targets for _, targets in rows]).astype(np.int64))[None],
        "positions": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
    }


def collate_padded(encoded: Sequence[Encoded], *, multiple_of: int = 1, pad_id: int = 0) -> dict[str, Tensor]:
    """One document a row: ids and targets (B, T) int64, padded on the right to the longest, rounded up to `multiple_of`.

    Padding has no label and, as attention is causal, no earlier token sees it: no mask is needed.
    """
    rows = [_inputs_and_targets(record) for record in encoded]
    longest = max(len(ids) for ids, _ in rows)
    width = longest + -longest % multiple_of
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    targets = torch.full((len(rows), width), IGNORE, dtype=torch.int64)
    for i, (row_ids, row_targets) in enumerate(rows):
        ids[i, : len(row_ids)] = torch.from_numpy(row_ids)
        targets[i, : len(row_targets)] = torch.from_numpy(row_targets)
    return {"ids": ids, "targets": targets}


def _inputs_and_targets(record: Encoded) -> tuple[np.ndarray, np.ndarray]:
    ids = record.ids.astype(np.int64)
    return ids[:-1], np.where(record.loss_mask[1:], ids[1:], IGNORE)


def steps_for_epochs(n_records: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of so many passes: 23 records in batches of 16 take 2 steps an epoch; a part of a pass rounds up."""
    if not (math.isfinite(epochs) and epochs > 0):
        raise ValueError(f"epochs={epochs} must be a positive number")
    whole = int(epochs)
    rest = math.ceil(round((epochs - whole) * n_records, 6) / batch_size)
    return max(1, whole * math.ceil(n_records / batch_size) + rest)


class SFTBatches:
    """Batches of whole records, as a pure function of (seed, step): resuming needs no saved data position.

    Each epoch is a seeded permutation of all records, and reads each exactly once: 23 records in batches of 16 are a step
    of 16 and a step of 7. A batch comes in micro-batches of at most `max_tokens` positions: packed
    rows, or padded rows of records of like length. Raises ValueError when there is no record, or one is too long.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        *,
        batch_size: int,  # records an optimizer step
        max_tokens: int,  # positions a micro-batch, padding included
        packed: bool = True,  # False for kernels that know no document borders
        multiple_of: int = 1,  # micro-batch lengths are rounded up to a multiple
        pad_id: int = 0,
        seed: int = 0,
    ):
        if not encoded:
            raise ValueError("no records to train on; give at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be >= 1")
        if max_tokens % multiple_of:
            raise ValueError(f"max_tokens={max_tokens} is not a multiple of multiple_of={multiple_of}")
        self.encoded, self.batch_size, self.max_tokens, self.seed = encoded, batch_size, max_tokens, seed
        self.packed, self.multiple_of, self.pad_id = packed, multiple_of, pad_id
        self._lengths = row_lengths(encoded) - 1  # (n,) positions of each
        check_longest(self._lengths, max_tokens)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every record is seen once."""
        return steps_for_epochs(len(self.encoded), self.batch_size, 1)

    def records_at(self, step: int) -> list[int]:
        """Indices of the step's records: batch_size of them, or what is left in the epoch's last step."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = _permutation(self.seed, epoch, len(self.encoded))
        return order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()

    def batch_at(self, step: int) -> list[dict[str, Tensor]]:
        """The step's micro-batches."""
        chosen = self.records_at(step)
        lengths = self._lengths[chosen].tolist()
        groups = pack(lengths, self.max_tokens) if self.packed else self._padded_groups(lengths)
        collate = collate_packed if self.packed else collate_padded
        return [
            collate([self.encoded[chosen[i]] for i in group], multiple_of=self.multiple_of, pad_id=self.pad_id)
            for group in groups
        ]

    def _padded_groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Records of like length together, so that rows x longest stays within max_tokens."""
        groups: list[list[int]] = []
        width = 0  # of the group's rows: its first record is its longest
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            if not groups or (len(groups[-1]) + 1) * width > self.max_tokens:
                groups.append([])
                width = lengths[i] + -lengths[i] % self.multiple_of
            groups[-1].append(i)
        return groups


@lru_cache(maxsize=2)  # a step lies in one epoch; 8 bytes a record each
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)
