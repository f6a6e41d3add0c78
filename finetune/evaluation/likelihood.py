"""Log-probabilities of continuations. Texts that begin alike are read as a tree: the common beginning once.

    group    The sky is | blue.        shared  The sky is          read once, (B, P)
             The sky is | blue wool.   rests   blue. / blue wool.  read on its keys and values, (N, R)

Logits exist for the scored positions alone, and for a bounded number of them at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...base.generate.engine import evaluating
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer

LOGITS = 1 << 24  # numbers of logits at once, 64 MiB in float32
BATCH_TOKENS = 4096  # read at once, padding included

Progress = Callable[[int, int], None]  # called with (done, all)


@dataclass(frozen=True)
class Row:
    """A text of which the first tokens are given and the others are scored."""

    ids: tuple[int, ...]
    n_given: int  # >= 1; at least one token is left to score


class Likelihood(NamedTuple):
    """How probable a row's scored tokens are."""

    log_p: float  # in nats, summed over the tokens
    n_tokens: int
    greedy: bool  # whether each of them was the most probable one


def start_token(tokenizer: Tokenizer) -> int:
    """What stands before a text that has no context: BOS, else EOS, as lm-evaluation-harness has it. Raises ValueError."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("the tokenizer has neither bos nor eos token, so a text without a context can't be scored")
    return start


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Row:
    """A context and what follows it, as lm-evaluation-harness's `_encode_pair` cuts them.

    Spaces at the context's end go to the continuation. The whole is encoded, and the context's own number of tokens is
    given, so that the border has the tokens of running text. Raises ValueError for an empty continuation.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    if not continuation:
        raise ValueError("a continuation is empty; give at least one character")
    if not context:
        return Row((start_token(tokenizer), *tokenizer.encode(continuation).tolist()), 1)
    bos = [tokenizer.bos_token_id] if tokenizer.add_bos and tokenizer.bos_token_id is not None else []
    whole = bos + tokenizer.encode(context + continuation).tolist()
    n_given = len(bos) + len(tokenizer.encode(context))
    if n_given >= len(whole):  # the continuation merged into the context's last token: score that one
        n_given = len(whole) - 1
    return Row(tuple(whole), n_given) if n_given else Row((start_token(tokenizer), *whole), 1)


def cut_to(row: Row, limit: int) -> Row:
    """The row without its first tokens where it is longer than `limit` and one (the last token is only a target).

    Raises ValueError where that would leave a scored token out.
    """
    n_cut = max(0, len(row.ids) - (limit + 1))
    if n_cut >= row.n_given:
        n_scored = len(row.ids) - row.n_given
        raise ValueError(f"the continuation has {n_scored} tokens, but the model reads {limit}; leave it out")
    return Row(row.ids[n_cut:], row.n_given - n_cut) if n_cut else row


@torch.inference_mode()
def score_groups(
    model: Transformer,
    groups: Sequence[Sequence[Row]],  # rows that may begin alike
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,  # called with (groups done, all)
) -> list[list[Likelihood]]:
    """The likelihood of each row of each group, whatever the batches, up to rounding."""
    found: list[list[Likelihood]] = [[] for _ in groups]
    shared = [_n_shared(group) for group in groups]
    done = 0
    with evaluating(model):
        for batch in _batches(groups, shared, batch_tokens):
            scored = _score_batch(model, [groups[i] for i in batch], [shared[i] for i in batch])
            for i, likelihoods in zip(batch, scored, strict=True):
                found[i] = likelihoods
            done += len(batch)
            if progress is not None:
                progress(done, len(groups))
    return found


def _n_shared(group: Sequence[Row]) -> int:
    """How many of the tokens that are read (all but the last) all rows share; 0 for a row alone, which shares nothing."""
    if len(group) < 2:
        return 0
    low, high = min(row.ids[:-1] for row in group), max(row.ids[:-1] for row in group)  # what these two share, all do
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def _batches(groups: Sequence[Sequence[Row]], shared: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Groups of like size together, so that padding costs little; those without a common beginning apart."""
    rests = [max(len(row.ids) - 1 - n for row in group) for group, n in zip(groups, shared, strict=True)]
    order = sorted(range(len(groups)), key=lambda i: (shared[i] > 0, shared[i] + rests[i], rests[i]))
    batch: list[int] = []
    for i in order:
        grown = [*batch, i]
        n_rows = sum(len(groups[j]) for j in grown)
        cost = len(grown) * max(shared[j] for j in grown) + n_rows * max(rests[j] for j in grown)
        if batch and (cost > batch_tokens or (shared[i] > 0) != (shared[batch[0]] > 0)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score_batch(model: Transformer, groups: Sequence[Sequence[Row]], shared: Sequence[int]) -> list[list[Likelihood]]:
    """One batch: the common beginnings, what follows them, then the scored positions of both."""
    rows = [(g, row) for g, group in enumerate(groups) for row in group]
    rests = [row.ids[shared[g] : -1] for g, row in rows]
    width = max(map(len, rests))
    hidden, longest = [], max(shared)
    cache = None
    if longest:
        cache = model.new_cache(len(groups), longest)
        cache.limits = list(shared)
        beginnings = [group[0].ids[:n] for group, n in zip(groups, shared, strict=True)]
        hidden.append(model.hidden_states(_padded(model, beginnings, longest), cache=cache).flatten(0, 1))  # (B P, D)
    if width:
        own = None
        if cache is not None:
            own = model.new_cache(len(rows), longest + width)
            own.clear(0)
            own.append_rows(cache, [shared[g] for g, _ in rows], rows=[g for g, _ in rows])
        hidden.append(model.hidden_states(_padded(model, rests, width), cache=own).flatten(0, 1))  # (N R, D)
    positions, targets = [], []  # rows of `hidden` and the tokens that they are to predict
    for i, (g, row) in enumerate(rows):
        for t in range(row.n_given - 1, len(row.ids) - 1):
            at_beginning = g * longest + t
            positions.append(at_beginning if t < shared[g] else len(groups) * longest + i * width + t - shared[g])
            targets.append(row.ids[t + 1])
    log_p, best = _log_probabilities(model, torch.cat(hidden), positions, targets)
    scored: list[list[Likelihood]] = [[] for _ in groups]
    start = 0
    for g, row in rows:
        n = len(row.ids) - row.n_given
        scored[g].append(Likelihood(sum(log_p[start : start + n]), n, all(best[start : start + n])))
        start += n
    return scored


def _padded(model: Transformer, rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """(rows, width) int64 on the model's device, padded on the right, where causality hides it."""
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids.to(model.model.embed_tokens.weight.device)


def _log_probabilities(
    model: Transformer,
    hidden: Tensor,  # (M, D)
    positions: Sequence[int],  # (n,) rows of hidden, one may come with several targets
    targets: Sequence[int],  # (n,)
) -> tuple[list[float], list[bool]]:
    """log p of each target at its position, in nats, and whether it is the most probable token there."""
    device = hidden.device
    used, row_of = torch.tensor(positions, device=device).unique(return_inverse=True)
    wanted = torch.tensor(targets, device=device)
    log_p, best = torch.empty(len(targets)), torch.empty(len(targets), dtype=torch.bool)
    n_rows = max(1, LOGITS // model.config.vocab_size)
    for start in range(0, len(used), n_rows):
        logits = model.head(hidden[used[start : start + n_rows]]).float()  # (n_rows, V)
        mine = ((row_of >= start) & (row_of < start + n_rows)).nonzero()[:, 0]
        rows, tokens = row_of[mine] - start, wanted[mine]
        log_p[mine.cpu()] = (logits[rows, tokens] - logits.logsumexp(-1)[rows]).cpu()
        best[mine.cpu()] = (logits.argmax(-1)[rows] == tokens).cpu()
    return log_p.tolist(), best.tolist()
