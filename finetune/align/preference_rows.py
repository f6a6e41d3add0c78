"""Preference rows -> encoded pairs, with what was left out counted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...base.tokenizer.tokenizer import Tokenizer
from ..data.chat import ChatTemplate, Encoded, encode_record
from ..data.preferences import PreferenceRecord, pair_labelled
from .preferences import Pair


@dataclass(frozen=True, eq=False)
class PreferenceData:
    """Encoded rows. For kto a pair is (the labelled answer, another row's answer to the same prompt)."""

    pairs: list[Pair]
    is_chat: bool  # any row went through the chat template
    desirable: Tensor | None = None  # (n,) bool for kto
    n_equal: int = 0  # rows whose answers are the same tokens (after the cut), left out
    n_cut: int = 0  # answers that fill max_seq_len: their end may be cut off
    n_single: int = 0  # labelled rows without a partner for a pair, left out

    @property
    def longest(self) -> int:
        """Tokens of the longest answer with its prompt."""
        return max(len(one.ids) for pair in self.pairs for one in (pair.chosen, pair.rejected))

    def figures(self) -> dict[str, int]:
        """Of the summary."""
        return {"n_pairs": len(self.pairs), "n_equal": self.n_equal, "n_cut": self.n_cut, "n_single": self.n_single}

    def notes(self, limit: int) -> list[str]:
        """What was left out or cut, in sentences."""
        said = {
            f"{self.n_equal:,} rows have equal answers and were left out": self.n_equal,
            f"{self.n_cut:,} answers fill max_seq_len={limit:,} tokens; their end may be cut off": self.n_cut,
            f"{self.n_single:,} labelled answers found no partner and were left out; --loss kto needs none": self.n_single,
        }
        return [line for line, n in said.items() if n]


def encode_pairs(
    rows: Sequence[PreferenceRecord],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    max_seq_len: int,  # tokens of prompt and answer; what is beyond is cut off
) -> PreferenceData:
    """Pairs of both answers; labelled rows of one prompt are paired.

    Raises ValueError naming the row as `encode_record` does (a prompt that fills max_seq_len), or when no pair is left.
    """
    paired, n_single = pair_labelled(rows)
    pairs, n_equal, n_cut = [], 0, 0
    for row in paired:
        assert row.chosen is not None
        assert row.rejected is not None
        sides = [
            encode_record(row.answered(one), tokenizer, template, max_seq_len) for one in (row.chosen, row.rejected)
        ]
        if np.array_equal(sides[0].ids, sides[1].ids):
            n_equal += 1
        else:
            pairs.append(Pair(*sides))
            n_cut += sum(len(one.ids) == max_seq_len for one in sides)
    if pairs:
        return PreferenceData(pairs, _is_chat(rows), n_equal=n_equal, n_cut=n_cut, n_single=n_single)
    if not n_equal:
        raise ValueError(
            f"none of {n_single} labelled answers has a partner with the other label and the same prompt; train with --loss kto, "
            "or give prompt, chosen and rejected"
        )
    raise ValueError(
        f"chosen equals rejected in all {n_equal} rows (in their first max_seq_len={max_seq_len} tokens), so there is no "
        "preference to learn; check the data's fields"
    )


def encode_labelled(
    rows: Sequence[PreferenceRecord], tokenizer: Tokenizer, template: ChatTemplate | None, max_seq_len: int
) -> PreferenceData:
    """Every answer with its verdict, as KTO takes them; a pair's two answers are one of each. Raises as `encode_pairs`."""
    encoded: list[Encoded] = []
    desirable: list[bool] = []
    n_equal = 0
    for row in rows:
        answers = [(one, good) for one, good in ((row.chosen, True), (row.rejected, False)) if one is not None]
        sides = [encode_record(row.answered(one), tokenizer, template, max_seq_len) for one, _ in answers]
        if len(sides) == 2 and np.array_equal(sides[0].ids, sides[1].ids):
            n_equal += 1
            continue
        encoded += sides
        desirable += [good for _, good in answers]
    if len(encoded) < 2:
        raise ValueError(
            f"kto needs at least 2 labelled answers, got {len(encoded)} ({n_equal} rows have equal answers)"
        )
    others = [Encoded(one.ids[:max_seq_len], one.loss_mask[:max_seq_len]) for one in mismatched(encoded)]
    pairs = [Pair(*both) for both in zip(encoded, others, strict=True)]
    n_cut = sum(len(one.ids) == max_seq_len for one in encoded)
    return PreferenceData(pairs, _is_chat(rows), torch.tensor(desirable), n_equal, n_cut)


def _is_chat(rows: Sequence[PreferenceRecord]) -> bool:
    return any(not isinstance(row.prompt, str) for row in rows)


def mismatched(encoded: Sequence[Encoded]) -> list[Encoded]:
    """Each row's prompt with the next row's answer, the last with the first's: KTO's sample of unrelated answers.

    A row's prompt ends where its first label stands. Raises ValueError for fewer than two rows.
    """
    if len(encoded) < 2:
        raise ValueError(
            f"KTO's KL estimate needs at least 2 rows in a micro-batch, got {len(encoded)}; raise micro_batch"
        )
    starts = [int(one.loss_mask.argmax()) for one in encoded]
    following = [*range(1, len(encoded)), 0]
    return [
        Encoded(
            np.concatenate([encoded[i].ids[: starts[i]], encoded[j].ids[starts[j] :]]),
            np.concatenate([encoded[i].loss_mask[: starts[i]], encoded[j].loss_mask[starts[j] :]]),
        )
        for i, j in enumerate(following)
    ]
