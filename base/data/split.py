"""Which documents train and which validate."""

from typing import TYPE_CHECKING

import numpy as np

from .encode import Stream

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer

Ranges = tuple[np.ndarray, int, int]  # (n, 2) token ranges in the stream; bytes of text; documents


def choose(stream: Stream, val_fraction: float, seed: int, tokenizer: "Tokenizer") -> dict[str, Ranges]:
    """Which stretches of the stream train and which validate, by a share of the tokens."""
    ends = stream.token_ends
    starts = np.concatenate([[0], ends[:-1]])
    n_tokens = int(ends[-1])
    budget = round(val_fraction * n_tokens)
    chosen = np.zeros(len(ends), bool)
    taken = 0
    for index in np.random.default_rng(seed).permutation(len(ends)):
        if taken + ends[index] - starts[index] <= budget:
            chosen[index] = True
            taken += int(ends[index] - starts[index])
            if taken >= 0.95 * budget:
                break
    if budget == 0 or taken >= budget // 2:
        return chosen_by(stream, chosen)
    cut = n_tokens - budget
    last = np.fromfile(stream.file, stream.dtype, count=budget, offset=cut * stream.dtype.itemsize)
    special = [tokenizer.eos_token_id, tokenizer.bos_token_id] if tokenizer.add_bos else [tokenizer.eos_token_id]
    inside = last[~np.isin(last, [token for token in special if token is not None])]
    val_bytes = len(tokenizer.decode_bytes(inside))
    n_val = int((ends > cut).sum())
    return {
        "train": (np.array([[0, cut]]), int(stream.n_bytes.sum()) - val_bytes, len(ends) - n_val + 1),
        "val": (np.array([[cut, n_tokens]]), val_bytes, n_val),
    }


def chosen_by(stream: Stream, validates: np.ndarray) -> dict[str, Ranges]:
    """The stretches of whole documents: those of `validates`, (n_documents,) bool, and the others."""
    ends = stream.token_ends
    both = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    return {
        split: (_joined(both[rows]), int(stream.n_bytes[rows].sum()), int(rows.sum()))
        for split, rows in (("train", ~validates), ("val", validates))
    }


def _joined(ranges: np.ndarray) -> np.ndarray:
    """Neighbouring ranges as one, so that a split of a million documents is copied in few steps."""
    if len(ranges) == 0:
        return ranges
    breaks = np.flatnonzero(ranges[1:, 0] != ranges[:-1, 1])
    first = np.concatenate([[0], breaks + 1])
    last = np.concatenate([breaks, [len(ranges) - 1]])
    return np.stack([ranges[first, 0], ranges[last, 1]], axis=1)
