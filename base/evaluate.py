"""How good a language model is: mean loss, bits per byte, and the bigram model it has to beat."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from .data.batches import evaluation_batches
from .data.shards import TokenShards
from .loss import n_labels, next_token_loss
from .precision import autocast
from .training.objective import Batch


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch], *, dtype: str = "float32", device: str = "cpu") -> float:
    """Cross entropy in nats a label over all the batches; nan when they hold no label. Leaves the model's mode alone."""
    total, count = 0.0, 0
    for batch in batches:
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        with autocast(dtype, device):
            total += float(next_token_loss(model, moved))
        count += n_labels(batch)
    return total / count if count else math.nan


def bits_per_byte(loss: float, *, n_tokens: int, n_bytes: int) -> float:
    """Nats a token -> bits a byte of raw text, which compares models with different tokenizers."""
    return loss / math.log(2) * n_tokens / n_bytes


class HeldOut:
    """The validation splits of one or several sources, as batches that are the same at every call."""

    def __init__(
        self, names: Sequence[str], tokens: Sequence[TokenShards], *, seq_len: int, batch_size: int, n_batches: int
    ) -> None:
        parts = [
            (name, one, evaluation_batches(one, seq_len=seq_len, batch_size=batch_size, n_batches=n_batches))
            for name, one in zip(names, tokens, strict=True)
        ]
        self._parts = [part for part in parts if part[2]]
        self._is_mixed = len(names) > 1

    @property
    def exists(self) -> bool:
        """Whether anything validates."""
        return bool(self._parts)

    def figures(self, model: nn.Module, dtype: str, device: str) -> dict[str, float]:
        """val_loss (nats a token) and val_bits_per_byte over all sources, each weighed by its tokens; then of each one."""
        losses = [mean_loss(model, batches, dtype=dtype, device=device) for _, _, batches in self._parts]
        n_tokens, n_bytes = (
            sum(sizes) for sizes in zip(*((len(t), t.n_bytes) for _, t, _ in self._parts), strict=True)
        )
        loss = sum(loss * (len(t) / n_tokens) for loss, (_, t, _) in zip(losses, self._parts, strict=True))
        found = {"val_loss": loss, "val_bits_per_byte": bits_per_byte(loss, n_tokens=n_tokens, n_bytes=n_bytes)}
        if self._is_mixed:
            for one, (name, tokens, _) in zip(losses, self._parts, strict=True):
                found[f"val_{name}_loss"] = one
                found[f"val_{name}_bits_per_byte"] = bits_per_byte(one, n_tokens=len(tokens), n_bytes=tokens.n_bytes)
        return found


def bigram_loss(train: TokenShards, val: TokenShards, *, vocab_size: int) -> float:
    """Cross entropy of a bigram model on `val`, nats a token: p(b|a) = (n(ab) + s p(b)) / (n(a) + s).

    The unigram part is add-one smoothed; of s in 1, 3, 10, ..., 1000 the one that is best on `val` itself is taken, so
    the figure is the best such a model can reach.
    """
    tokens, held_out = (np.asarray(t[0 : len(t)], dtype=np.int64) for t in (train, val))
    unigram = (np.bincount(tokens, minlength=vocab_size) + 1.0) / (len(tokens) + vocab_size)
    seen_before = np.bincount(tokens[:-1], minlength=vocab_size)  # n(a)
    pairs, counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    wanted = held_out[:-1] * vocab_size + held_out[1:]
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    n_pair = np.where(pairs[at] == wanted, counts[at], 0)  # n(ab)
    n_before, p_after = seen_before[held_out[:-1]], unigram[held_out[1:]]
    losses = [
        -np.log((n_pair + s * p_after) / (n_before + s)).mean() for s in (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
    ]
    return float(min(losses))
