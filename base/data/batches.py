"""Pretraining batches: a pure function of (seed, step), so that resuming needs no saved data position."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .shards import TokenShards


class WindowBatches:
    """Windows of seq_len tokens, each once an epoch in a seeded order, from a seeded offset that moves the cuts.

    A step's windows don't depend on `n_readers`, the ranks that read different ones; how they are cut into micro-batches does:
    each reader has equally many, every n-th, where the batch can be divided by their number.
    Raises ValueError when the tokens don't fill one window.
    """

    def __init__(
        self, tokens: TokenShards, *, seq_len: int, batch_size: int, micro_batch: int, seed: int, n_readers: int = 1
    ) -> None:
        if len(tokens) < seq_len + 1:
            raise ValueError(
                f"the data has {len(tokens)} tokens, one window of max_seq_len={seq_len} needs {seq_len + 1}; "
                "add text or lower max_seq_len"
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.batch_size, self.n_readers = batch_size, n_readers
        self.micro_batch = min(micro_batch, -(-batch_size // n_readers))  # each reader has a share of every step
        self.slack = min(seq_len - 1, len(tokens) - seq_len - 1)  # how far an epoch's first cut may lie
        self.n_windows = (len(tokens) - 1 - self.slack) // seq_len

    def starts_at(self, step: int) -> np.ndarray:
        """The first token of each of the step's windows, (batch_size,) int64."""
        index = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = index // self.n_windows
        starts = np.empty(len(index), dtype=np.int64)
        for epoch in np.unique(epochs):
            order, offset = _epoch(self.seed, int(epoch), self.n_windows, self.slack)
            mine = epochs == epoch
            starts[mine] = order[index[mine] % self.n_windows] * self.seq_len + offset
        return starts

    def batch_at(self, step: int) -> list[dict[str, Tensor]]:
        """The step's micro-batches: ids and targets (micro_batch, T), the targets one token ahead."""
        starts = self.starts_at(step)
        even = self.batch_size % self.n_readers == 0
        shares = starts.reshape(self.n_readers if even else 1, -1)  # (readers, windows of each)
        return [
            windows(self.tokens, share[i : i + self.micro_batch], self.seq_len)
            for i in range(0, shares.shape[1], self.micro_batch)
            for share in shares
        ]


@lru_cache(maxsize=2)  # a step touches at most a few epochs, one after the other
def _epoch(seed: int, epoch: int, n_windows: int, slack: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(n_windows), int(rng.integers(slack + 1))


def windows(tokens: TokenShards, starts: np.ndarray, seq_len: int) -> dict[str, Tensor]:
    """The windows that begin at `starts`, as a batch."""
    rows = np.stack([np.asarray(tokens[start : start + seq_len + 1], dtype=np.int64) for start in starts])  # (B, T+1)
    both = torch.from_numpy(rows)
    return {"ids": both[:, :-1].contiguous(), "targets": both[:, 1:].contiguous()}


def evaluation_batches(
    tokens: TokenShards, *, seq_len: int, batch_size: int, n_batches: int
) -> list[dict[str, Tensor]]:
    """Windows spread evenly over the tokens, the same at every call; fewer when the tokens give fewer."""
    seq_len = min(seq_len, len(tokens) - 1)
    if seq_len < 1:
        return []
    n_windows = (len(tokens) - 1) // seq_len
    wanted = min(n_windows, batch_size * n_batches)
    starts = np.linspace(0, n_windows - 1, wanted).astype(np.int64) * seq_len
    return [windows(tokens, starts[i : i + batch_size], seq_len) for i in range(0, wanted, batch_size)]
