"""Speculative decoding: guess some tokens cheaply, let the model judge them all in one pass, keep those it chooses itself.

    drafts      d1 d2 d3                       from earlier text (NgramDraft) or a small model (ModelDraft)
    one pass    last d1 d2 d3 -> p1 p2 p3 p4   the model's distributions after each
    choose      x1 ~ p1; if x1 = d1: x2 ~ p2; if x2 = d2: x3 ~ p3; ...   stop at the first xi that is not di

Every token that comes out is the model's own choice, drawn from its own distribution with the request's own random numbers,
as without drafts. So greedy output is that of plain greedy decoding, sampling keeps the distribution, and a seed gives the
same text with any drafts or none ("drafter-invariant", Daliri et al. 2024, arXiv:2408.07978, section 3). A sampling draft
model draws with a copy of the request's generator: the same random numbers meet two similar distributions, which agree with
a probability of at least (1 - TV) / (1 + TV), TV their total variation distance. The rejection rule of Leviathan et al.
2023 (arXiv:2211.17192, theorem 3.5) accepts 1 - TV, at the price of texts that depend on the drafts.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..model.kv_cache import KVCache
from ..model.state_cache import NO_WAY_BACK
from ..model.transformer import Transformer
from .requests import Request
from .sampling import choose_tokens

MOST_DRAFTED = 16  # tokens a row and step
FIRST_DRAFTED = 4
FIRST_RIGHT, FIRST_COST = 0.7, 0.15  # hopeful, so that each is tried once
FIRST_RIGHT_FREE = 0.3
LEAST_GAIN = 1.15  # over a step without guesses
DRIFT = 0.998  # of both figures towards the first ones, a step without guesses


class Drafter(Protocol):
    """Guesses what comes next."""

    is_free: bool  # whether a guess costs nothing to speak of, so that it can be made only to be compared

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        """For each request at most limits[i] tokens; [] where there is nothing to guess."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended."""
        ...


class NgramDraft:
    """Prompt look-up (Saxena 2023; transformers' prompt_lookup_num_tokens): what followed the last n tokens before.

    The longest n that occurred decides, its latest occurrence is copied. A text's n-grams are kept in tables, so a step costs
    a few look-ups, whatever the text's length.
    """

    is_free = True

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest={shortest} and longest={longest} must be 1 <= shortest <= longest")
        self.sizes = range(longest, shortest - 1, -1)
        # By request: n-gram -> where its continuation begins; and the position up to which n-grams are in that table.
        self._tables: WeakKeyDictionary[Request, dict[tuple[int, ...], int]] = WeakKeyDictionary()
        self._indexed: WeakKeyDictionary[Request, int] = WeakKeyDictionary()

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        """See Drafter."""
        return [self._propose(r, limit) if limit > 0 else [] for r, limit in zip(requests, limits, strict=True)]

    def forget(self, request: Request) -> None:
        """See Drafter."""
        self._tables.pop(request, None)
        self._indexed.pop(request, None)

    def _propose(self, request: Request, limit: int) -> list[int]:
        tokens = request.tokens
        table = self._tables.setdefault(request, {})
        for end in range(self._indexed.get(request, 0) + 1, len(tokens)):
            for n in self.sizes:
                if n <= end:
                    table[tuple(tokens[end - n : end])] = end
        self._indexed[request] = len(tokens) - 1
        for n in self.sizes:
            begin = table.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if begin is not None:
                draft: list[int] = []
                period = len(tokens) - begin  # past the text's end the copy goes on from itself
                for i in range(limit):
                    draft.append(tokens[begin + i] if i < period else draft[i - period])
                return draft
        return []


class ModelDraft:
    """A small model of the same vocabulary that writes a few tokens ahead.

    Its cache has one row for each running request. A row is cut back to the tokens that both sides agree on, reads what came
    since, and goes on. Raises ValueError for a model of another vocabulary.
    """

    is_free = False

    def __init__(self, model: Transformer, *, vocab_size: int) -> None:
        if model.config.vocab_size != vocab_size:
            raise ValueError(
                f"the draft model has {model.config.vocab_size} ids, the model {vocab_size}; both must share a tokenizer"
            )
        if model.config.n_linear_layers:
            raise ValueError(f"the draft model has linear attention layers: {NO_WAY_BACK}; give another draft model")
        self.model = model.eval()
        self._device = model.model.embed_tokens.weight.device
        self._cache: KVCache | None = None
        self._rows: list[Request] = []  # the request of each row of the cache
        self._read: list[list[int]] = []  # the tokens that each row of the cache holds

    def forget(self, request: Request) -> None:
        """See Drafter."""
        if request in self._rows:
            self._remove(self._rows.index(request))

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        """See Drafter. Texts longer than the draft model reads get no draft."""
        room = self.model.config.max_seq_len - MOST_DRAFTED
        limits = [n if request.n_tokens < room else 0 for request, n in zip(requests, limits, strict=True)]
        chosen = [i for i, n in enumerate(limits) if n > 0]
        drafts: list[list[int]] = [[] for _ in requests]
        if not chosen:
            return drafts
        found = self._write([requests[i] for i in chosen], max(limits))
        for i, draft in zip(chosen, found, strict=True):
            drafts[i] = draft[: limits[i]]
        return drafts

    def _write(self, requests: Sequence[Request], n: int) -> list[list[int]]:
        """n tokens for each request."""
        texts = [request.tokens for request in requests]
        n_last = self._catch_up(requests, texts)
        cache = self._cache
        assert cache is not None
        drafts: list[list[int]] = [[] for _ in requests]
        generators = [_copy(request.generator) if request.sampling.temperature > 0 else request.generator
                      for request in requests]  # fmt: skip
        ids = torch.tensor([text[-n_last:] for text in texts], device=self._device)
        for _ in range(n):
            logits = self.model(ids, cache=cache, logits_at=_last(ids))[:, 0]  # (B, V)
            tokens = choose_tokens(logits, [request.sampling for request in requests], generators)
            for draft, token in zip(drafts, tokens, strict=True):
                draft.append(token)
            ids = torch.tensor(tokens, device=self._device)[:, None]
        self._read = [[*text, *draft[:-1]] for text, draft in zip(texts, drafts, strict=True)]
        return drafts

    def _catch_up(self, requests: Sequence[Request], texts: Sequence[list[int]]) -> int:
        """Make the cache's rows those of the requests, each without the same number of its last tokens; returns it."""
        for row in range(len(self._rows) - 1, -1, -1):
            if self._rows[row] not in requests:
                self._remove(row)
        read = {id(request): tokens for request, tokens in zip(self._rows, self._read, strict=True)}
        missing = [
            len(text) - _common(read.get(id(request), []), text) for request, text in zip(requests, texts, strict=True)
        ]
        n_last = max((n for n in missing if n <= MOST_DRAFTED + 1), default=1)
        n_last = min(n_last, min(map(len, texts)) - 1)  # each row keeps at least one token
        for request, n in zip(requests, missing, strict=True):
            if request in self._rows and n > n_last:
                self._remove(self._rows.index(request))
        text_of = {id(request): text for request, text in zip(requests, texts, strict=True)}
        if self._rows:
            assert self._cache is not None
            self._cache.truncate([len(text_of[id(request)]) - n_last for request in self._rows])
        for request in requests:
            if request not in self._rows:
                self._append(request, text_of[id(request)][:-n_last])
        if self._rows != list(requests):
            self._reorder(list(requests))
        return n_last

    def _append(self, request: Request, text: list[int]) -> None:
        """Read a text into a new row."""
        one = self.model.new_cache(1, len(text))
        self.model.hidden_states(torch.tensor([text], device=self._device), cache=one)
        if self._cache is None or len(self._rows) == self._cache.max_rows:
            larger = self.model.new_cache(max(8, 2 * len(self._rows)), len(text) + 256)
            larger.clear(0)
            if self._cache is not None:
                ends = [self._cache.end - n for n in self._cache.lengths]
                larger.append_rows(self._cache, self._cache.lengths, ends)
            self._cache = larger
        self._cache.append_rows(one, [len(text)])
        self._rows.append(request)
        self._read.append(list(text))

    def _reorder(self, wanted: list[Request]) -> None:
        """Put the rows in another order."""
        old = self._cache
        assert old is not None
        rows = [self._rows.index(request) for request in wanted]
        self._cache = self.model.new_cache(old.max_rows, old.capacity)
        self._cache.clear(0)
        self._cache.append_rows(
            old, [old.lengths[r] for r in rows], [old.end - old.lengths[r] for r in rows], rows=rows
        )
        self._rows, self._read = wanted, [self._read[row] for row in rows]

    def _remove(self, row: int) -> None:
        assert self._cache is not None
        self._cache.remove_row(row)
        self._rows[row], self._read[row] = self._rows[-1], self._read[-1]
        self._rows.pop()
        self._read.pop()


class Pace:
    """Decides how many guesses a step should judge, so that tokens come faster with them than without.

    With p the share of guesses that are right and c(T) what T columns of guesses cost, in steps without guesses, n rows get
    1 + sum_{t <= T} p^t rows(t) / n tokens each in the time 1 + c(T), where rows(t) have a t-th guess. The best T is taken, 0 if
    none gains. Both figures are measured as the engine goes, c for each number of rows, from the nearest T that was measured;
    while nothing is judged c drifts back to its first value, so that what was given up is tried again, rarely. Free guesses
    are compared with the tokens of plain steps too, and p begins low; else it begins high and drifts back as c does.

    A row's drafts double where all were right and shrink to one more than were right otherwise.
    """

    def __init__(self, *, is_free: bool = False) -> None:
        self._first_right = FIRST_RIGHT_FREE if is_free else FIRST_RIGHT
        self._drift_right = 1.0 if is_free else DRIFT
        self._plain: dict[int, deque[float]] = {}  # by number of rows: seconds of the latest steps without guesses
        self._cost: dict[int, dict[int, float]] = {}  # by number of rows: c, by columns
        self._right = self._first_right  # p
        self._sizes: WeakKeyDictionary[Request, int] = WeakKeyDictionary()

    def size(self, request: Request) -> int:
        """How many tokens to guess for a request."""
        return self._sizes.setdefault(request, FIRST_DRAFTED)

    def wants(self, n_rows: int) -> bool:
        """Whether guesses may be worth making: there is something to compare with, and one for each row would pay."""
        return any(self.trim([[0] * FIRST_DRAFTED] * n_rows))

    def trim(self, drafts: Sequence[list[int]]) -> list[list[int]]:
        """The drafts up to the best number of columns."""
        n, best, n_best, gain = len(drafts), LEAST_GAIN, 0, 0.0
        if len(self._plain.get(n, ())) < 2:  # nothing to compare with yet
            return [[] for _ in drafts]
        for t in range(1, 1 + max(map(len, drafts), default=0)):
            gain += self._right**t * sum(len(draft) >= t for draft in drafts) / n
            if (rate := (1 + gain) / (1 + self._extra(n, t))) > best:
                best, n_best = rate, t
        return [draft[:n_best] for draft in drafts]

    def plain(self, n_rows: int, seconds: float) -> None:
        """A step without guesses took so long."""
        self._plain.setdefault(n_rows, deque(maxlen=5)).append(seconds)
        for t, cost in self._cost.get(n_rows, {}).items():
            self._cost[n_rows][t] = DRIFT * cost + (1 - DRIFT) * FIRST_COST * t
        self._right = self._drift_right * self._right + (1 - self._drift_right) * self._first_right

    def compared(self, n_right: int, n_tried: int) -> None:
        """So many guesses that were not judged turned out right."""
        weight = 0.9**n_tried
        self._right = weight * self._right + (1 - weight) * n_right / n_tried

    def judged(self, n_rows: int, n_columns: int, seconds: float) -> None:
        """A step with so many columns of guesses took so long."""
        extra = max(0.0, seconds / statistics.median(self._plain[n_rows]) - 1)
        known = self._cost.setdefault(n_rows, {})
        known[n_columns] = (known.get(n_columns, extra) + extra) / 2

    def _extra(self, n_rows: int, t: int) -> float:
        """c(t): as measured for the nearest number of columns, each further one at the first guess of a column's cost."""
        known = self._cost.get(n_rows)
        if not known:
            return FIRST_COST * t
        near = min(known, key=lambda one: abs(one - t))
        return max(0.0, known[near] + FIRST_COST * (t - near))

    def learn(self, request: Request, n_drafted: int, n_right: int) -> None:
        """So many of a row's guesses were the model's own choices."""
        self.compared(n_right, min(n_right + 1, n_drafted))  # what comes after a wrong one was not tried
        if n_right < n_drafted:
            self._sizes[request] = n_right + 1
        else:  # a draft may have been short for want of tokens: that shrinks nothing
            self._sizes[request] = max(min(2 * n_drafted, MOST_DRAFTED), self.size(request))


def _last(ids: Tensor) -> Tensor:
    return torch.full((ids.shape[0],), ids.shape[1] - 1, device=ids.device)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of first tokens that two texts share, found from the end, where they differ if at all."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def _copy(generator: torch.Generator) -> torch.Generator:
    """A generator that will give the same numbers."""
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy
