"""Pretraining batches: a pure function of (seed, step), so that resuming needs no saved data position."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..loss import IGNORE
from .mixture import Mixture
from .ramp import BatchRamp, as_ramp
from .shards import TokenShards
from .windows import Windows


class WindowBatches:
    """Batches of windows, of one source or a mixture of several; each source's windows once an epoch.

    A step's windows don't depend on `n_readers`, the ranks that read different ones; how they are cut into micro-batches does:
    each reader has equally many, every n-th, where the batch can be divided by their number.
    Raises ValueError when a source has fewer windows than its share of one batch.
    """

    def __init__(
        self,
        sources: Sequence[Windows],
        *,
        batch_size: int | BatchRamp,
        micro_batch: int,
        n_readers: int = 1,
        mixture: Mixture | None = None,  # of several sources
        document_mask: bool = False,  # a document sees itself only, from position 0 on; else all before it in the window
    ) -> None:
        self.sources, self.mixture, self.document_mask = list(sources), mixture, document_mask
        self.seq_len = self.sources[0].seq_len
        self.ramp, self.n_readers = as_ramp(batch_size), n_readers
        batch_size = self.ramp.end
        self.micro_batch = min(micro_batch, -(-batch_size // n_readers))  # each reader has a share of every step
        shares = [1.0] if mixture is None else mixture.largest
        for source, share in zip(self.sources, shares, strict=True):
            least = max(1, int(share * batch_size))
            if source.n_windows < least:
                raise ValueError(
                    f"the data has {len(source.tokens):,} tokens, {source.n_windows:,} windows of max_seq_len="
                    f"{self.seq_len}; one batch of batch_size={batch_size} takes {least:,} of them: add text, or lower "
                    "batch_size or max_seq_len"
                )

    def rows_at(self, step: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """The step's windows: (source, ranges of its tokens), as many as the batch has."""
        if self.mixture is None:
            index = np.arange(self.ramp.before(step), self.ramp.before(step + 1))
            return [(0, ranges) for ranges in self.sources[0].ranges(index)]
        of_source, counts = self.mixture.sources_at(step), self.mixture.counts_before(step)
        rows: list[tuple[int, list[tuple[int, int]]]] = [(0, [])] * len(of_source)
        for i, source in enumerate(self.sources):
            mine = np.flatnonzero(of_source == i)
            for where, ranges in zip(mine, source.ranges(counts[i] + np.arange(len(mine))), strict=True):
                rows[where] = (i, ranges)
        return rows

    def batch_at(self, step: int) -> list[dict[str, Tensor]]:
        """The step's micro-batches: ids and targets (micro_batch, T), the targets one token ahead.

        With a document mask one row (1, micro_batch * T) with positions and cu_seqlens, as packed fine-tuning has.
        """
        rows = self.rows_at(step)
        even = len(rows) % self.n_readers == 0
        n_shares = self.n_readers if even else 1
        share = len(rows) // n_shares
        return [
            self._collate(rows[reader * share :][:share][i : i + self.micro_batch])
            for i in range(0, share, self.micro_batch)
            for reader in range(n_shares)
        ]

    def _collate(self, rows: Sequence[tuple[int, list[tuple[int, int]]]]) -> dict[str, Tensor]:
        parts = [(self.sources[i].tokens, ranges) for i, ranges in rows]
        batch = collate(parts, self.seq_len)
        if not self.document_mask:
            return batch
        return masked(batch, [document_starts(self.sources[i], ranges) for i, ranges in rows])


def collate(rows: Sequence[tuple[TokenShards, list[tuple[int, int]]]], seq_len: int) -> dict[str, Tensor]:
    """ids and targets (B, T) of ranges of tokens; behind their end is EOS without a label."""
    ids = np.zeros((len(rows), seq_len + 1), dtype=np.int64)
    targets = np.full((len(rows), seq_len), IGNORE, dtype=np.int64)
    for i, (tokens, ranges) in enumerate(rows):
        row = np.concatenate([tokens[start:stop] for start, stop in ranges])
        ids[i] = tokens.meta.get("eos_token_id") or 0
        ids[i, : len(row)] = row
        targets[i, : len(row) - 1] = row[1:]
    return {"ids": torch.from_numpy(ids[:, :-1].copy()), "targets": torch.from_numpy(targets)}


def document_starts(source: Windows, ranges: Sequence[tuple[int, int]]) -> list[int]:
    """Where in the window its documents begin: 0, ..., all below its number of tokens."""
    found, at = [], 0
    for start, stop in ranges:
        inside = source.ends[np.searchsorted(source.ends, start, side="right") : np.searchsorted(source.ends, stop)]
        found += [at, *(at + inside - start).tolist()]
        at += stop - start
    return found


def masked(batch: dict[str, Tensor], starts: Sequence[list[int]]) -> dict[str, Tensor]:
    """The rows as one, each document by itself: positions restart, cu_seqlens are its bounds, and no document's last token
    is asked for the first of the next. `starts` are the documents' in each row; padding belongs to the last one."""
    B, T = batch["ids"].shape
    bounds, targets = [], batch["targets"].clone()
    for i, row in enumerate(starts):
        for start in row[1:]:
            targets[i, start - 1] = IGNORE
        bounds += [i * T + start for start in row if start < T]
    edges = torch.tensor([*bounds, B * T])
    lengths = edges.diff()
    positions = torch.arange(B * T) - torch.repeat_interleave(edges[:-1], lengths)
    return {
        "ids": batch["ids"].reshape(1, -1),
        "targets": targets.reshape(1, -1),
        "positions": positions[None],
        "cu_seqlens": edges.to(torch.int32),
    }


def evaluation_batches(
    tokens: TokenShards, *, seq_len: int, batch_size: int, n_batches: int
) -> list[dict[str, Tensor]]:
    """Windows of the stream spread evenly over the tokens, the same at every call; fewer when the tokens give fewer."""
    seq_len = min(seq_len, len(tokens) - 1)
    if seq_len < 1:
        return []
    n_windows = (len(tokens) - 1) // seq_len
    wanted = min(n_windows, batch_size * n_batches)
    starts = (np.linspace(0, n_windows - 1, wanted).astype(np.int64) * seq_len).tolist()
    rows = [(tokens, [(start, start + seq_len + 1)]) for start in starts]
    return [collate(rows[i : i + batch_size], seq_len) for i in range(0, wanted, batch_size)]
