"""Pairs -> batches: both answers of each pair in one pass, packed end to end or one a padded row.

    pairs        (the fox | ran), (the fox | slept)   (a cat | sat down), (a cat | ate)
    ids          the fox ran  the fox slept  a cat sat down  a cat ate        one row, documents that don't see each other
    mask          0   0   1    0   0    1    0  1   1   1    0  1   1
    cu_seqlens   0            3              6                9 ...           where each document begins, and the end
    ref_logp     (2, 2)                                                       the reference's sums, where they are known

Documents 2 p and 2 p + 1 of a batch are pair p's chosen and rejected answer; `answer_sums` reads them back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..data.chat import Encoded
from ..data.packing import pack

Batch = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two answers to one prompt, each encoded with the prompt before it."""

    chosen: Encoded
    rejected: Encoded


# --- documents -> tensors ------------------------------------------------------------------------------------------


def collate_answers(encoded: Sequence[Encoded], *, packed: bool, multiple_of: int = 1, pad_id: int = 0) -> Batch:
    """Documents as `response_logprobs` takes them: ids (B, T) int64 and mask (B, T) bool, with lengths (n_docs,) int64.

    packed: B = 1 and positions (1, T), cu_seqlens (n_docs + 1,) int32 (a last document of padding rounds T up to multiple_of);
    else one document a row, padded on the right.
    """
    lengths = [len(one.ids) for one in encoded]
    rows = [torch.from_numpy(one.ids.astype(np.int64)) for one in encoded]
    masks = [torch.from_numpy(np.asarray(one.loss_mask, bool)) for one in encoded]
    for mask in masks:
        mask[0] = False  # a document's first token (of a text without a prompt) has nothing before it
    if not packed:
        width = max(lengths) + -max(lengths) % multiple_of
        ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.bool)
        for i, n in enumerate(lengths):
            ids[i, :n], mask[i, :n] = rows[i], masks[i]
        return {"ids": ids, "mask": mask, "lengths": torch.tensor(lengths)}
    documents = list(lengths)
    if n_pad := -sum(lengths) % multiple_of:
        documents.append(n_pad)
        rows.append(torch.full((n_pad,), pad_id))
        masks.append(torch.zeros(n_pad, dtype=torch.bool))
    return {
        "ids": torch.cat(rows)[None],
        "mask": torch.cat(masks)[None],
        "positions": torch.cat([torch.arange(n) for n in documents])[None],
        "cu_seqlens": torch.tensor([0, *np.cumsum(documents)], dtype=torch.int32),
        "lengths": torch.tensor(lengths),
    }


def answer_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """values (B, T) summed over each document of `collate_answers`, (n_docs,); differentiable, the same sum in every run."""
    if values.shape[0] == lengths.shape[0] and values.shape[0] > 1:
        return values.sum(1)
    n = lengths.sum()  # packed (or one document): what is beyond is padding
    return torch.segment_reduce(values[0, : int(n)], "sum", lengths=lengths)


class PreferenceBatches:
    """Micro-batches of whole pairs as a pure function of (seed, step): resuming needs no saved data position.

    Each epoch is a seeded permutation of all pairs; batches of batch_size pairs follow each other through the epochs without
    a gap. Raises ValueError when there is no pair, or one that max_tokens can't hold.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        batch_size: int,  # pairs an optimizer step
        max_tokens: int,  # positions a micro-batch, both answers and padding included
        packed: bool = True,
        multiple_of: int = 1,
        pad_id: int = 0,
        seed: int = 0,
        ref_logp: Tensor | None = None,  # (n_pairs, 2) float32 sums under the reference: chosen, rejected
    ) -> None:
        if not pairs:
            raise ValueError("no pairs to train on; give at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be >= 1")
        if ref_logp is not None and ref_logp.shape != (len(pairs), 2):
            raise ValueError(f"ref_logp has shape {tuple(ref_logp.shape)}; {len(pairs)} pairs need ({len(pairs)}, 2)")
        self.pairs, self.batch_size, self.max_tokens, self.seed = list(pairs), batch_size, max_tokens, seed
        self.packed, self.multiple_of, self.pad_id, self.ref_logp = packed, multiple_of, pad_id, ref_logp
        self._lengths = [self._n_positions([pair]) for pair in self.pairs]
        longest = int(np.argmax(self._lengths))
        if self._lengths[longest] > max_tokens:
            raise ValueError(
                f"pair {longest} takes {self._lengths[longest]} positions, a micro-batch holds max_tokens={max_tokens}; raise "
                "it, or cut answers with max_seq_len"
            )

    def _n_positions(self, pairs: Sequence[Pair]) -> int:
        """How many positions a micro-batch of these pairs has."""
        lengths = [len(one.ids) for pair in pairs for one in (pair.chosen, pair.rejected)]
        used = sum(lengths) if self.packed else max(lengths)
        return (used + -used % self.multiple_of) * (1 if self.packed else len(lengths))

    def pairs_at(self, step: int) -> list[int]:
        """Indices of the step's pairs, (batch_size,)."""
        first = step * self.batch_size
        return [self._pair_at(position) for position in range(first, first + self.batch_size)]

    def _pair_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.pairs))
        return int(permutation(self.seed, epoch, len(self.pairs))[index])

    def batch_at(self, step: int) -> list[Batch]:
        """The step's micro-batches: `collate_answers` of chosen, rejected, chosen, ..., and index (n_pairs,), ref_logp."""
        return self.micro_batches(self.pairs_at(step))

    def micro_batches(self, indices: Sequence[int]) -> list[Batch]:
        """Micro-batches of the pairs with these indices, each of at most max_tokens positions."""
        return [self.micro_batch(group) for group in self._groups(list(indices))]

    def micro_batch(self, indices: Sequence[int]) -> Batch:
        """One micro-batch of the pairs with these indices."""
        encoded = [one for i in indices for one in (self.pairs[i].chosen, self.pairs[i].rejected)]
        batch = collate_answers(encoded, packed=self.packed, multiple_of=self.multiple_of, pad_id=self.pad_id)
        batch["index"] = torch.tensor(indices)
        if self.ref_logp is not None:
            batch["ref_logp"] = self.ref_logp[batch["index"]]
        return batch

    def _groups(self, chosen: list[int]) -> list[list[int]]:
        """The step's pairs in micro-batches: best fit when packed, else pairs of like length together."""
        if self.packed:
            # Room for rounding up: a full micro-batch's padding is part of max_tokens.
            room = self.max_tokens // self.multiple_of * self.multiple_of
            used = [sum(len(one.ids) for one in (self.pairs[i].chosen, self.pairs[i].rejected)) for i in chosen]
            return [[chosen[k] for k in group] for group in pack(used, room)]
        groups: list[list[int]] = []
        for i in sorted(chosen, key=lambda i: (-self._lengths[i], i)):
            if not groups or self._n_positions([self.pairs[k] for k in (*groups[-1], i)]) > self.max_tokens:
                groups.append([])
            groups[-1].append(i)
        return groups


@lru_cache(maxsize=4)  # a step touches at most a few epochs, one after the other
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)
