"""The decoding engine: requests join and leave between steps, each with its own length, settings and adapter.

    engine = Engine(model, max_batch=8)
    request = engine.add(ids, Sampling(max_new_tokens=32, stop_ids={2}))
    while engine.n_running or engine.n_waiting:
        for event in engine.step():      # one new token for each running request
            ...                          # event.request, event.token, event.finished

A step decodes one token for every running row, then reads the prompts of waiting requests while a place is free: equal
prompts that start together are read once. A finished or removed request frees its place at once.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..model.kv_cache import KVCache
from ..model.transformer import Transformer
from .prefix_cache import BLOCK, Block, PrefixCache
from .sampling import Sampling, choose_tokens, penalize

PROMPT_TOKENS_AT_ONCE = 8192  # prompts are read in groups of at most so many tokens, padding included


class TokenLogprob(NamedTuple):
    """How likely the model found a token, before temperature and filters."""

    logprob: float  # in nats
    top: list[tuple[int, float]]  # (token, log-probability) of the likeliest tokens, in falling order


class Event(NamedTuple):
    """One new token of one request."""

    request: int
    token: int
    finished: Literal["stop", "length"] | None  # "stop": the token is one of the request's stop ids
    logprob: TokenLogprob | None = None  # where the request's Sampling asks for it


@dataclass
class Request:
    """What the engine keeps of a request."""

    id: int
    ids: Sequence[int]  # the prompt
    sampling: Sampling
    adapter: str | None  # a name that the model's row selector understands; the engine passes it on
    hold: object  # while it lives, the adapter can't be removed or replaced
    generator: torch.Generator
    content: str | None  # what the prefix cache knows the weights by; None: keep nothing of this request
    produced: list[int] = field(default_factory=list)
    prefix: list[Block] = field(default_factory=list)  # what the prefix cache holds of the prompt, while it is read
    seen: Tensor | None = None  # (V,) bool: the tokens that came before, kept for a repetition penalty


class Engine:
    """Continuous batching over one model (Yu et al. 2022, "Orca", OSDI, section 4.1: scheduling by iteration).

    At most `max_batch` requests run at once, the others wait in the order of their coming. A request's tokens do not depend
    on its neighbours beyond rounding. One thread may use an engine at a time.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_batch: int = 8,
        allowed: Tensor | None = None,  # (V,) bool, the ids that may come; None: all
        on_choice: Callable[[Sequence[Request], Tensor, Sequence[int]], None] | None = None,  # requests, logits, tokens
        prefix_cache: PrefixCache | None = None,  # keeps what was read; the base's weights must then stay as they are
    ) -> None:
        if type(max_batch) is not int or max_batch < 1:
            raise ValueError(f"max_batch={max_batch} must be >= 1, a whole number")
        self.model, self.max_batch, self.prefix_cache = model, max_batch, prefix_cache
        self._device = model.model.embed_tokens.weight.device
        self._forbidden = None if allowed is None else ~allowed.to(self._device)
        self._on_choice = on_choice
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # in the order of the cache's rows
        self._cache: KVCache | None = None
        self._selection: AbstractContextManager[object] = nullcontext()  # the rows' adapters
        self._last: list[int] = []  # the newest token of each row
        self._next_id = 0

    @property
    def n_running(self) -> int:
        """Requests that hold a row."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Memory of the running rows' keys and values, free columns included; the prefix cache counts its own."""
        return self._cache.n_bytes if self._cache is not None else 0

    def add(self, ids: Sequence[int], sampling: Sampling | None = None, *, adapter: str | None = None) -> int:
        """Queue a request; returns its id. `adapter`: a name of the model's AdapterBank, None for the bare base.

        Raises ValueError for an empty prompt, ids outside the vocabulary, a request longer than the model's max_seq_len and
        an adapter that isn't loaded.
        """
        sampling = sampling or Sampling()
        ids = [int(one) for one in ids]
        limit, vocab_size = self.model.config.max_seq_len, self.model.config.vocab_size
        if not ids:
            raise ValueError("the prompt has no token; start from the tokenizer's bos or eos token")
        if wrong := [one for one in ids if not 0 <= one < vocab_size]:
            raise ValueError(f"the prompt holds id {wrong[0]}, the model's ids are 0 to {vocab_size - 1}")
        if len(ids) + sampling.max_new_tokens > limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; with max_new_tokens={sampling.max_new_tokens} that is more than the "
                f"model's max_seq_len={limit}; shorten one of them"
            )
        if adapter is not None:
            selector = self.model.row_selector
            if selector is None:
                raise ValueError(
                    f"adapter {adapter!r} is named, but the model has no bank; make one: AdapterBank(model)"
                )
            hold = selector([adapter])  # raises for a name that isn't loaded
        else:
            hold = None
        generator = torch.Generator(self._device).manual_seed(sampling.seed)
        request = Request(self._next_id, ids, sampling, adapter, hold, generator, self._content(adapter))
        if sampling.repetition_penalty != 1:
            request.seen = torch.zeros(vocab_size, dtype=torch.bool, device=self._device)
            request.seen[ids] = True
        self._next_id += 1
        self._waiting.append(request)
        return request.id

    def _content(self, adapter: str | None) -> str | None:
        """The weights' name in the prefix cache: their hash, or "" for the bare base."""
        if adapter is None or self.prefix_cache is None:
            return ""
        return self.model.adapter_content(adapter) if self.model.adapter_content is not None else None

    @torch.inference_mode()
    def remove(self, request: int) -> None:
        """Forget a request, running or waiting. Raises ValueError for an id that is neither."""
        for row, each in enumerate(self._running):
            if each.id == request:
                self._free([row])
                return
        for each in self._waiting:
            if each.id == request:
                self._waiting.remove(each)
                return
        raise ValueError(f"request {request} is neither running nor waiting; it has finished, or was never added")

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One new token for each running request, then the first one of those that start. [] when there is nothing to do."""
        events: list[Event] = []
        with evaluating(self.model):
            if self._running:
                events += self._decode()
            while self._waiting and self.n_running < self.max_batch:
                events += self._start()
        return events

    def _decode(self) -> list[Event]:
        """One token for each running row."""
        ids = torch.tensor(self._last, device=self._device)[:, None]  # (B, 1)
        with self._selection:
            logits = self.model(ids, cache=self._cache)[:, 0]  # (B, V)
        events, ended = self._choose(logits, self._running)
        self._last = [event.token for event in events]
        self._free(ended)
        return events

    def _start(self) -> list[Event]:
        """Read the prompts of some waiting requests, as many as there are places, and choose their first tokens."""
        new = self._next_group()
        # Several samples of one prompt: it is read once, and its keys and values are copied to the other rows.
        first: dict[tuple[str | None, tuple[int, ...]], int] = {}
        of = [first.setdefault((request.adapter, tuple(request.ids)), len(first)) for request in new]
        readers = [new[of.index(i)] for i in range(len(first))]
        lengths = [len(request.ids) for request in readers]
        known = [len(request.prefix) * BLOCK for request in readers]  # tokens that the prefix cache holds
        n_unread = [length - n for length, n in zip(lengths, known, strict=True)]
        ids = torch.zeros(
            len(readers), max(n_unread), dtype=torch.int64
        )  # padded on the right, where causality hides it
        for row, (request, n) in enumerate(zip(readers, known, strict=True)):
            ids[row, : len(request.ids) - n] = torch.tensor(request.ids[n:])
        in_place = not self._running and not any(known) and len(readers) == len(new)
        cache = self._empty_cache(new) if in_place else self.model.new_cache(len(readers), max(known) + ids.shape[1])
        if any(known):
            assert self.prefix_cache is not None
            self.prefix_cache.restore(cache, [request.prefix for request in readers])
        last = torch.tensor([n - 1 for n in n_unread], device=self._device)
        with self._select(readers):
            logits = self.model(ids.to(self._device), cache=cache, logits_at=last)[:, 0]  # (B, V)
        if not logits.isfinite().all():
            raise ValueError(
                "the model's logits hold NaN or infinity: its weights or an adapter's do, or float16 overflows; "
                "try dtype float32, and look at the weights"
            )
        if in_place:
            cache.align(lengths)
        else:
            if not self._running:
                self._empty_cache(new).clear(0)
            assert self._cache is not None
            starts = [max(known) - n for n in known]
            self._cache.append_rows(cache, [lengths[i] for i in of], [starts[i] for i in of], rows=of)
            logits = logits[torch.tensor(of, device=self._device)]
        self._running += new
        for row, request in enumerate(new, self.n_running - len(new)):
            request.prefix = []
            self._keep_prefix(row, request.ids)
        events, ended = self._choose(logits, new)
        self._last += [event.token for event in events]
        self._rows_changed()
        self._free([self.n_running - len(new) + row for row in ended])
        return events

    def _next_group(self) -> list[Request]:
        """Take waiting requests whose prompts are read together: of few tokens in all, padding included.

        With a prefix cache they either all have a beginning in it or none has, and a prompt that begins like another of
        the group waits for the next one, where it finds that beginning.
        """
        group: list[Request] = []
        longest, beginnings = 0, set()
        while self._waiting and self.n_running + len(group) < self.max_batch:
            request, beginning = self._waiting[0], None
            if self.prefix_cache is not None and request.content is not None:
                request.prefix = self.prefix_cache.find(request.content, request.ids)
                beginning = self.prefix_cache.missing(request.content, request.ids, request.prefix)
            longest = max(longest, len(request.ids) - len(request.prefix) * BLOCK)
            if group and (
                longest * (len(group) + 1) > PROMPT_TOKENS_AT_ONCE
                or bool(request.prefix) != bool(group[0].prefix)
                or (beginning is not None and beginning in beginnings)
            ):
                break
            if self.prefix_cache is not None:
                self.prefix_cache.n_prompt_tokens += len(request.ids)
                self.prefix_cache.n_hit_tokens += len(request.prefix) * BLOCK
            beginnings.add(beginning)
            group.append(self._waiting.popleft())
        return group

    def _keep_prefix(self, row: int, ids: Sequence[int]) -> None:
        """Give the prefix cache, if there is one, what a row has read."""
        request = self._running[row]
        if self.prefix_cache is not None and request.content is not None and self._cache is not None:
            self.prefix_cache.store(self._cache, row, request.content, ids)

    def _empty_cache(self, requests: Sequence[Request]) -> KVCache:
        """The engine's cache with one empty row for each request and room for all their tokens."""
        room = max(len(request.ids) + request.sampling.max_new_tokens for request in requests)
        if self._cache is None or self._cache.capacity < room:
            self._cache = None  # the old one's memory goes first
            self._cache = self.model.new_cache(self.max_batch, room)
        self._cache.clear(len(requests))
        return self._cache

    def _choose(self, logits: Tensor, requests: Sequence[Request]) -> tuple[list[Event], list[int]]:
        """Each row's next token, and the rows that end with it."""
        if self._forbidden is not None:
            logits = logits.masked_fill(self._forbidden, -torch.inf)
        logits = penalize(logits, [r.seen for r in requests], [r.sampling for r in requests])
        tokens = choose_tokens(logits, [r.sampling for r in requests], [r.generator for r in requests])
        logprobs = token_logprobs(logits, tokens, [r.sampling.logprobs for r in requests])
        if self._on_choice is not None:
            self._on_choice(requests, logits, tokens)
        events, ended = [], []
        for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            request.produced.append(token)
            if request.seen is not None:
                request.seen[token] = True
            finished = None
            if token in request.sampling.stop_ids:
                finished = "stop"
            elif len(request.produced) == request.sampling.max_new_tokens:
                finished = "length"
            if finished:
                ended.append(row)
            events.append(Event(request.id, token, finished, logprobs[row] if logprobs else None))
        return events, ended

    def _free(self, rows: Sequence[int]) -> None:
        """Forget rows; each time the last one takes the place."""
        if not rows:
            return
        assert self._cache is not None
        for row in sorted(rows, reverse=True):
            ended = self._running[row]
            self._keep_prefix(row, [*ended.ids, *ended.produced[:-1]])  # the newest token was not read
            self._cache.remove_row(row)
            self._running[row], self._last[row] = self._running[-1], self._last[-1]
            self._running.pop()
            self._last.pop()
        self._rows_changed()

    def _rows_changed(self) -> None:
        self._selection = self._select(self._running)

    def _select(self, requests: Sequence[Request]) -> AbstractContextManager[object]:
        """The block in which each row has its request's adapter."""
        if self.model.row_selector is None:
            return nullcontext()
        return self.model.row_selector([request.adapter for request in requests])


def token_logprobs(
    logits: Tensor,  # (B, V)
    tokens: Sequence[int],  # the chosen one of each row
    n_top: Sequence[int | None],  # how many of the likeliest to report; None: nothing for this row
) -> list[TokenLogprob | None] | None:
    """Each row's log-probabilities, in float32; None where no row asks."""
    rows = [row for row, n in enumerate(n_top) if n is not None]
    if not rows:
        return None
    found: list[TokenLogprob | None] = [None] * len(tokens)
    most = min(max(n for n in n_top if n is not None), logits.shape[-1])
    chosen = torch.tensor([tokens[row] for row in rows], device=logits.device)[:, None]
    logprobs = logits[rows].float().log_softmax(-1)
    top = logprobs.topk(most)
    own = logprobs.gather(1, chosen)[:, 0].tolist()
    for row, logprob, values, indices in zip(rows, own, top.values.tolist(), top.indices.tolist(), strict=True):
        kept = [(i, value) for i, value in zip(indices, values, strict=True) if value > -math.inf][: n_top[row]]
        found[row] = TokenLogprob(logprob, kept)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode; afterwards in the mode it had."""
    if not model.training:  # switching walks every module, which a decoding step would feel
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def generate_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],  # for all, or one for each prompt
    *,
    adapters: Sequence[str | None] | None = None,  # one for each prompt
    max_batch: int | None = None,  # requests at once; None: all
    on_token: Callable[[int, int], object] | None = None,  # called with (row, id) as each comes; True ends the row
    allowed: Tensor | None = None,  # (V,) bool, the ids that may come; None: all
) -> list[list[int]]:
    """The new ids of each prompt, without the stop token that ended it.

    One Sampling for all gives row i the seed `seed + i`. Raises ValueError as `Engine.add` does, naming the prompt.
    """
    if not prompts:
        return []
    if isinstance(sampling, Sampling):
        sampling = [replace(sampling, seed=sampling.seed + row) for row in range(len(prompts))]
    engine = Engine(model, max_batch=max_batch or len(prompts), allowed=allowed)
    row_of: dict[int, int] = {}
    for row, (prompt, one) in enumerate(zip(prompts, sampling, strict=True)):
        try:
            row_of[engine.add(prompt, one, adapter=adapters[row] if adapters else None)] = row
        except ValueError as error:
            raise ValueError(str(error).replace("the prompt", f"prompt {row}", 1)) from None
    produced: list[list[int]] = [[] for _ in prompts]
    while engine.n_running or engine.n_waiting:
        for event in engine.step():
            if event.finished == "stop":
                continue
            row = row_of[event.request]
            produced[row].append(event.token)
            if on_token is not None and on_token(row, event.token) is True and event.finished is None:
                engine.remove(event.request)
    return produced
