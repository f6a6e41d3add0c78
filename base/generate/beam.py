"""Beam search: the continuation of the highest total log-probability that a bounded number of candidates finds.

step     each of the n running beams is continued by every token; the best of all n x V sums stay
finished a beam that ended is scored by log p / length^length_penalty, and the n best of those are kept
end      no running beam can still beat the worst kept one at its present length, or no room is left
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.transformer import Transformer
from .engine import evaluating
from .sampling import Sampling, penalize


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation."""

    ids: list[int]  # the new tokens, with the stop token where one came
    score: float  # log p / length^length_penalty, in nats
    ended: bool  # by a stop token or `ends`, not by the length


@dataclass(frozen=True)
class _Beam:
    ids: list[int]
    log_p: float
    parent: int = 0  # the row of the cache that it continues


@torch.inference_mode()
def beam_search(
    model: Transformer,
    prompt: Sequence[int],
    sampling: Sampling,  # max_new_tokens, stop_ids, repetition_penalty; greedy, as beams choose by probability
    *,
    n_beams: int,
    length_penalty: float = 1.0,  # above 0 favours long answers, below 0 short ones; 0 compares plain sums
    adapter: str | None = None,  # a name of the model's bank
    allowed: Tensor | None = None,  # (V,) bool, the ids that may come; None: all
    ends: Callable[[list[int]], bool] | None = None,  # whether new tokens end a text, such as by a stop string
) -> list[Hypothesis]:
    """At most `n_beams` continuations, best first: those of transformers' beam search with early_stopping=False.

    Per step the (1 + number of stop tokens, at least 2) x n_beams best candidates are looked at, of which those among the
    first n_beams may finish, so that enough stay running (length normalization as in Wu et al. 2016, arXiv:1609.08144,
    section 7, without its constant). Raises ValueError for sampling settings, no beam, or a prompt without room.
    """
    _check(model, prompt, sampling, n_beams)
    if adapter is not None and model.row_selector is None:
        raise ValueError(f"adapter {adapter!r} is named, but the model has no bank; make one: AdapterBank(model)")
    with evaluating(model):
        return _search(model, list(prompt), sampling, n_beams, length_penalty, adapter, allowed, ends)


def _check(model: Transformer, prompt: Sequence[int], sampling: Sampling, n_beams: int) -> None:
    if type(n_beams) is not int or n_beams < 1:
        raise ValueError(f"beams={n_beams} must be >= 1, a whole number")
    if sampling.filters != Sampling().filters:
        raise ValueError("beam search takes the most probable text; leave temperature, top_k, top_p and min_p out")
    limit, vocab_size = model.config.max_seq_len, model.config.vocab_size
    if not prompt:
        raise ValueError("the prompt has no token; start from the tokenizer's bos or eos token")
    if wrong := [one for one in prompt if not 0 <= one < vocab_size]:
        raise ValueError(f"the prompt holds id {wrong[0]}, the model's ids are 0 to {vocab_size - 1}")
    if len(prompt) + sampling.max_new_tokens > limit:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens; with max_new_tokens={sampling.max_new_tokens} that is more than the "
            f"model's max_seq_len={limit}; shorten one of them"
        )


def _search(
    model: Transformer,
    prompt: list[int],
    sampling: Sampling,
    n_beams: int,
    length_penalty: float,
    adapter: str | None,
    allowed: Tensor | None,
    ends: Callable[[list[int]], bool] | None,
) -> list[Hypothesis]:
    device = model.model.embed_tokens.weight.device
    stops, n_new = frozenset(sampling.stop_ids), sampling.max_new_tokens
    n_looked_at = max(2, 1 + len(stops)) * n_beams
    cache = model.new_cache(n_beams, len(prompt) + n_new)
    cache.clear(1)
    ids = torch.tensor([prompt], device=device)  # (1, P), then (n, 1)
    running, finished = [_Beam([], 0.0)], []
    for length in range(1, n_new + 1):
        with model.row_selector([adapter] * len(ids)) if model.row_selector else nullcontext():
            logits = model(ids, cache=cache, logits_at=torch.full((len(ids),), ids.shape[1] - 1, device=device))[:, 0]
        log_p = _total_log_p(logits.float(), prompt, running, sampling, allowed)  # (n, V)
        candidates = _best(log_p, running, n_looked_at)
        going = []
        for rank, beam in enumerate(candidates):
            ended = beam.ids[-1] in stops or (ends is not None and ends(beam.ids))
            if not ended and length < n_new:
                going.append(beam)
            elif rank < n_beams:
                finished.append(Hypothesis(beam.ids, beam.log_p / length**length_penalty, ended))
        finished = sorted(finished, key=lambda one: -one.score)[:n_beams]
        running = going[:n_beams]
        if not running or (
            len(finished) == n_beams and running[0].log_p / length**length_penalty <= finished[-1].score
        ):
            break
        cache.select_rows([beam.parent for beam in running])
        ids = torch.tensor([beam.ids[-1:] for beam in running], device=device)
    return finished


def _total_log_p(
    logits: Tensor,  # (n, V) float32, one row a beam
    prompt: list[int],
    running: Sequence[_Beam],
    sampling: Sampling,
    allowed: Tensor | None,
) -> Tensor:
    """log p of each beam with each token behind it, (n, V) float32."""
    if not logits.isfinite().all():
        raise ValueError("the model's logits hold NaN or infinity; look at the weights, or try dtype float32")
    if allowed is not None:
        logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
    log_p = logits.log_softmax(-1)
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(len(running), log_p.shape[1], dtype=torch.bool, device=log_p.device)
        for row, beam in enumerate(running):
            seen[row, [*prompt, *beam.ids]] = True
        log_p = penalize(log_p, list(seen), [sampling] * len(running))
    return log_p + torch.tensor([beam.log_p for beam in running], device=log_p.device)[:, None]


def _best(log_p: Tensor, running: Sequence[_Beam], n: int) -> list[_Beam]:
    """The n best continuations of the running beams, in falling order; impossible tokens are none."""
    values, where = log_p.flatten().topk(min(n, log_p.numel()))
    found = []
    for value, index in zip(values.tolist(), where.tolist(), strict=True):
        parent, token = divmod(index, log_p.shape[1])
        if value > -torch.inf:
            found.append(_Beam([*running[parent].ids, token], value, parent))
    return found
