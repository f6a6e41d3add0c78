"""The decoding engine: requests join and leave between steps, each with its own length, settings and adapter.

    engine = Engine(model, max_batch=8)
    request = engine.add(ids, Sampling(max_new_tokens=32, stop_ids={2}))
    while engine.n_running or engine.n_waiting:
        for event in engine.step():      # one new token for each running request, or several with a drafter
            ...                          # event.request, event.token, event.finished

A step decodes one token for every running row, then reads the prompts of waiting requests while a place is free: equal
prompts that start together are read once, and a long one in chunks while others run. A finished or removed request frees
its place at once.
"""

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor, nn

from ..model.kv_cache import KVCache
from ..model.paged_cache import PAGE, PagedKVCache, n_pages
from ..model.state_cache import NO_WAY_BACK
from ..model.transformer import Transformer
from .prefix_cache import BLOCK, PrefixCache
from .reading import PROMPT_TOKENS_AT_ONCE, Reading
from .requests import Event, Request, TokenLogprob, token_logprobs
from .sampling import Sampling, choose_tokens, penalize
from .speculative import Drafter, Pace

__all__ = ["Engine", "Event", "Request", "TokenLogprob", "evaluating", "generate_ids", "token_logprobs"]


class Engine:
    """Continuous batching over one model (Yu et al. 2022, "Orca", OSDI, section 4.1: scheduling by iteration).

    At most `max_batch` requests run at once; the others wait, the lowest priority number first, in the order of their coming.
    A request's tokens do not depend on its neighbours beyond rounding. One thread may use an engine at a time.

    Keys and values lie in rows side by side, with room for the longest request in each: the fastest form on a CPU. With
    `cache_bytes` they lie in pages within that budget instead: a request starts when its prompt's pages and one more for
    each running row are free, and when none is left the request of the lowest urgency that came last gives its pages back
    and waits; later its text is read again and goes on as if nothing had happened (Kwon et al. 2023, arXiv:2309.06180,
    section 4.5: recomputation).
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_batch: int = 8,
        allowed: Tensor | None = None,  # (V,) bool, the ids that may come; None: all
        on_choice: Callable[[Sequence[Request], Tensor, Sequence[int]], None] | None = None,  # requests, logits, tokens
        prefix_cache: PrefixCache | None = None,  # keeps what was read; the base's weights must then stay as they are
        drafter: Drafter
        | None = None,  # guesses tokens that the model then confirms several at once; see speculative.py
        cache_bytes: int | None = None,  # for keys and values in pages; None: rows
        prefill_chunk: int = 512,  # tokens of prompts read in a step while other requests run
    ) -> None:
        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value} must be >= 1, a whole number")
        for name, given in (("prefix_cache", prefix_cache), ("drafter", drafter)):
            if given is not None and model.config.n_linear_layers:
                raise ValueError(f"{name} is not covered for this model: {NO_WAY_BACK}; leave it out")
        self.model, self.max_batch, self.prefix_cache = model, max_batch, prefix_cache
        self.drafter, self.prefill_chunk = drafter, prefill_chunk
        self.pace = Pace(is_free=drafter is not None and drafter.is_free)
        self.n_preempted = self.n_drafted = self.n_accepted = 0  # requests; tokens guessed, and those that were right
        self._device = model.model.embed_tokens.weight.device
        self._forbidden = None if allowed is None else ~allowed.to(self._device)
        self._on_choice = on_choice
        self._waiting: list[Request] = []  # in the order of their turn
        self._reading: Reading | None = None
        self._running: list[Request] = []  # in the order of the cache's rows
        self._pool = None if cache_bytes is None else model.new_pages(cache_bytes)
        if self._pool is not None and prefix_cache is not None:
            prefix_cache.clear()  # another pool's pages
            self._pool.reclaim = prefix_cache.drop_oldest
        self._cache: KVCache | PagedKVCache | None = None
        self._selection: AbstractContextManager[object] = nullcontext()  # the rows' adapters
        self._last: list[int] = []  # the newest token of each row
        self._guesses: list[list[int]] = []  # what the drafter said of each row in this step
        self._ended: set[int] = set()  # requests that ended in the latest step
        self._next_id = 0

    @property
    def n_running(self) -> int:
        """Requests that hold a row, or whose prompts are being read."""
        return len(self._running) + (len(self._reading.requests) if self._reading else 0)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Memory of the running rows' keys and values, free columns included; the prefix cache counts its own. With pages:
        all of them, those of the prefix cache too."""
        if self._pool is not None:
            return self._pool.n_pages * self._pool.page_bytes
        return self._cache.n_bytes if self._cache is not None else 0

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest request, prompt and answer: the model's max_seq_len, or what all pages hold, less one of them."""
        limit = self.model.config.max_seq_len
        return limit if self._pool is None else max(0, min(limit, (self._pool.n_pages - 2) * PAGE))

    def add(
        self, ids: Sequence[int], sampling: Sampling | None = None, *, adapter: str | None = None, priority: int = 0
    ) -> int:
        """Queue a request; returns its id. `adapter`: a name of the model's AdapterBank, None for the bare base. `priority`:
        lower numbers start first.

        Raises ValueError for an empty prompt, ids outside the vocabulary, a request longer than the model's max_seq_len or
        than all pages, and an adapter that isn't loaded.
        """
        sampling = sampling or Sampling()
        ids = [int(one) for one in ids]
        self._check(ids, sampling)
        hold = None
        if adapter is not None:
            selector = self.model.row_selector
            if selector is None:
                raise ValueError(
                    f"adapter {adapter!r} is named, but the model has no bank; make one: AdapterBank(model)"
                )
            hold = selector([adapter])  # raises for a name that isn't loaded
        generator = torch.Generator(self._device).manual_seed(sampling.seed)
        request = Request(self._next_id, ids, sampling, adapter, hold, generator, self._content(adapter), priority)
        if sampling.repetition_penalty != 1:
            request.seen = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self._device)
            request.seen[ids] = True
        if sampling.grammar is not None:
            request.matcher = sampling.grammar.matcher()
        self._next_id += 1
        self._queue(request)
        return request.id

    def _check(self, ids: list[int], sampling: Sampling) -> None:
        """Raise ValueError for a request that can never be answered."""
        limit, vocab_size = self.model.config.max_seq_len, self.model.config.vocab_size
        if not ids:
            raise ValueError("the prompt has no token; start from the tokenizer's bos or eos token")
        if wrong := [one for one in ids if not 0 <= one < vocab_size]:
            raise ValueError(f"the prompt holds id {wrong[0]}, the model's ids are 0 to {vocab_size - 1}")
        total = len(ids) + sampling.max_new_tokens
        if total > limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; with max_new_tokens={sampling.max_new_tokens} that is more than the "
                f"model's max_seq_len={limit}; shorten one of them"
            )
        if self._pool is not None and n_pages(total) + 1 > self._pool.n_pages - 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; with max_new_tokens={sampling.max_new_tokens} it needs "
                f"{n_pages(total) + 1} pages of the key-value cache, which has {self._pool.n_pages - 1}; "
                "shorten one of them or give the cache more memory"
            )

    def _queue(self, request: Request) -> None:
        insort(self._waiting, request, key=lambda each: (each.priority, each.id))

    def _content(self, adapter: str | None) -> str | None:
        """The weights' name in the prefix cache: their hash, or "" for the bare base."""
        if adapter is None or self.prefix_cache is None:
            return ""
        return self.model.adapter_content(adapter) if self.model.adapter_content is not None else None

    @torch.inference_mode()
    def remove(self, request: int) -> None:
        """Forget a request, running or waiting; one that ended in the latest step is forgotten already.

        Raises ValueError for an id that is none of these.
        """
        for row, each in enumerate(self._running):
            if each.id == request:
                self._free([row])
                return
        for i, each in enumerate(self._waiting):
            if each.id == request:
                del self._waiting[i]
                return
        if self._reading is not None and self._reading.drop(request):
            if not self._reading.requests:
                self._give_up_reading()
        elif request not in self._ended:
            raise ValueError(f"request {request} is neither running nor waiting; it has finished, or was never added")

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One new token for each running request, more where drafts were right, then the first one of those that start.
        [] when nothing was ready."""
        events: list[Event] = []
        self._ended.clear()
        with evaluating(self.model):
            others_run = bool(self._running)
            if others_run:
                events += self._decode()
            left = self.prefill_chunk if others_run else None  # tokens of prompts that may still be read
            while left is None or left > 0:
                if self._reading is None and not self._begin_reading():
                    break
                reading = self._reading
                assert reading is not None
                n = reading.width if left is None else min(reading.width, max(1, left // len(reading.readers)))
                if not self._can_read(reading, n):
                    break
                left = None if left is None else left - n * len(reading.readers)
                if reading.read(self.model, n, self._select):
                    self._reading = None
                    events += self._join(reading)
        return events

    def release(self) -> None:
        """Forget all requests and let go of the cache's memory; the engine is of no more use."""
        if self.prefix_cache is not None and self._pool is not None:
            self.prefix_cache.clear()  # this pool's pages
        self._waiting, self._running, self._last, self._reading = [], [], [], None
        self._cache = self._pool = None

    # --- running rows ---

    def _decode(self) -> list[Event]:
        """One token for each running row, or several where drafts are right."""
        drafts = self._drafts()
        T = 1 + max(map(len, drafts), default=0)
        T = self._make_room(T)
        began, n_rows = perf_counter(), len(self._running)
        if T == 1:
            ids = torch.tensor(self._last, device=self._device)[:, None]  # (B, 1)
            with self._selection:
                logits = self.model(ids, cache=self._cache)[:, 0]  # (B, V)
            events, ended = self._choose(logits, self._running)
            self._last = [event.token for event in events]
            if len(self._guesses) == n_rows:
                right = [draft[0] == token for draft, token in zip(self._guesses, self._last, strict=True) if draft]
                if right:
                    self.pace.compared(sum(right), len(right))
        else:
            events, ended = self._verify(drafts, T)
        if self.drafter is not None:
            seconds = perf_counter() - began
            self.pace.plain(n_rows, seconds) if T == 1 else self.pace.judged(n_rows, T - 1, seconds)
        self._free(ended)
        return events

    def _drafts(self) -> list[list[int]]:
        """Each row's guesses, as many as pay. An empty list, or only empty ones: this step is decoded without guesses."""
        self._guesses = []
        if self.drafter is None or not (self.drafter.is_free or self.pace.wants(len(self._running))):
            return []
        limits = [
            min(self.pace.size(each), each.sampling.max_new_tokens - len(each.produced) - 1) for each in self._running
        ]
        self._guesses = self.drafter.propose(self._running, limits)
        return self.pace.trim(self._guesses)

    def _verify(self, drafts: Sequence[list[int]], T: int) -> tuple[list[Event], list[int]]:
        """Let the model judge each row's drafts in one pass; the tokens that it chooses, and the rows that end."""
        assert self._cache is not None
        rows = [[last, *draft] + [0] * (T - 1 - len(draft)) for last, draft in zip(self._last, drafts, strict=True)]
        before = list(self._cache.lengths)
        with self._selection:
            logits = self.model(torch.tensor(rows, device=self._device), cache=self._cache)  # (B, T, V)
        events: list[Event] = []
        ended: list[int] = []
        n_new = [0] * len(rows)
        alive = list(range(len(rows)))  # rows whose drafts were right so far
        for t in range(T):
            at_t = logits[:, t] if len(alive) == len(rows) else logits[alive, t]
            new, over = self._choose(at_t, [self._running[row] for row in alive])
            events += new
            going = []
            for i, (row, event) in enumerate(zip(alive, new, strict=True)):
                self._last[row], n_new[row] = event.token, t + 1
                if i not in over and t < len(drafts[row]) and event.token == drafts[row][t]:
                    going.append(row)
            ended += [alive[i] for i in over]
            alive = going
            if not alive:
                break
        for request, draft, n in zip(self._running, drafts, n_new, strict=True):
            if draft:
                self.pace.learn(request, len(draft), min(n - 1, len(draft)))
                self.n_drafted += len(draft)
                self.n_accepted += min(n - 1, len(draft))
        self._cache.truncate([length + n for length, n in zip(before, n_new, strict=True)])
        return events, ended

    def _make_room(self, T: int) -> int:
        """Free pages for the step, and return how many tokens each row may add: T, or 1 where there are too few pages for T.

        Where there are too few for 1 as well, running requests are preempted until there are enough: the least urgent one that
        came last gives its pages back and waits."""
        cache = self._cache
        while isinstance(cache, PagedKVCache) and not cache.pool.has(cache.n_missing(T)):
            if T > 1:
                T = 1
            elif len(self._running) == 1 and self._reading is not None:  # the prompts that are being read wait again
                for request in self._give_up_reading():
                    self._queue(request)
            else:  # `_check` made sure that the last one fits
                row = max(range(len(self._running)), key=lambda i: (self._running[i].priority, self._running[i].id))
                request = self._running[row]
                self._drop_row(row)
                self._rows_changed()
                self.n_preempted += 1
                self._queue(request)
        return T

    def _give_up_reading(self) -> list[Request]:
        """Forget what was read of the group's prompts, and return its requests."""
        assert self._reading is not None
        reading, self._reading = self._reading, None
        if isinstance(reading.cache, PagedKVCache):
            reading.cache.clear(0)
        return reading.requests

    # --- requests that start ---

    def _begin_reading(self) -> bool:
        """Take waiting requests and give them a cache; False when none can start now."""
        group = self._next_group()
        if not group:
            return False
        reading = Reading(group, self._device)
        n, known = len(reading.readers), any(reading.n_known)
        if self._pool is not None:
            reading.cache = PagedKVCache(self.model.config, self._pool, n)
            reading.cache.limits = list(reading.lengths)
        elif not self._running and not known and n == len(group):
            reading.cache = self._empty_cache(group)  # in place
        else:
            reading.cache = self.model.new_cache(n, max(reading.n_known) + reading.width)
        if isinstance(reading.cache, KVCache):
            reading.cache.limits = list(reading.lengths)
        if known:
            reading.cache.restore([[block.values for block in each.prefix] for each in reading.readers])
        for each in group:
            each.prefix = []
        self._reading = reading
        return True

    def _can_read(self, reading: Reading, n: int) -> bool:
        """Whether there are pages for n more columns, and for the last page of each equal text. Where running rows took them
        since this group began, it waits until some are free."""
        if not isinstance(reading.cache, PagedKVCache):
            return True
        n_copies = len(reading.rows) - len(set(reading.rows))
        return reading.cache.pool.has(reading.cache.n_missing(n) + n_copies)

    def _join(self, reading: Reading) -> list[Event]:
        """The group's texts are read: their rows run from now on. Chooses their first tokens."""
        new = reading.requests
        lengths = [reading.lengths[row] for row in reading.rows]
        if reading.cache is self._cache and isinstance(self._cache, KVCache):
            self._cache.align(reading.lengths)
            self._cache.select_rows(reading.rows)  # some may have been removed meanwhile
        elif self._pool is not None:
            if not isinstance(self._cache, PagedKVCache):
                self._cache = PagedKVCache(self.model.config, self._pool, 0)
            assert isinstance(reading.cache, PagedKVCache)
            self._cache.append_rows(reading.cache, lengths, rows=reading.rows)
        else:
            if not self._running:
                self._empty_cache(new).clear(0)
            assert isinstance(self._cache, KVCache)
            assert isinstance(reading.cache, KVCache)
            self._cache.append_rows(
                reading.cache, lengths, [reading.starts[i] for i in reading.rows], rows=reading.rows
            )
        n_before = len(self._running)
        self._running += new
        for row, request in enumerate(new, n_before):
            self._keep_prefix(row, request.tokens)
        events, ended = self._choose(reading.logits, new)
        self._last += [event.token for event in events]
        self._rows_changed()
        self._free([n_before + row for row in ended])
        return events

    def _next_group(self) -> list[Request]:
        """Take waiting requests whose prompts are read together: of few tokens in all, padding included, and while there are
        pages for them.

        With a prefix cache they either all have a beginning in it or none has, and a prompt that begins like another of
        the group waits for the next one, where it finds that beginning.
        """
        group: list[Request] = []
        longest, n_taken, beginnings = 0, len(self._running), set()
        while self._waiting and len(self._running) + len(group) < self.max_batch:
            request, beginning = self._waiting[0], None
            if self.prefix_cache is not None and request.content is not None:
                request.prefix = self.prefix_cache.find(request.content, request.tokens)
                beginning = self.prefix_cache.missing(request.content, request.tokens, request.prefix)
            longest = max(longest, request.n_tokens - len(request.prefix) * BLOCK)
            if group and (
                longest * (len(group) + 1) > PROMPT_TOKENS_AT_ONCE
                or bool(request.prefix) != bool(group[0].prefix)
                or (beginning is not None and beginning in beginnings)
            ):
                break
            n_taken += n_pages(request.n_tokens) - len(request.prefix) + 1  # one more for what it will write
            if self._pool is not None and not self._has_pages(n_taken, request, bool(group)):
                break
            if self.prefix_cache is not None:
                self.prefix_cache.n_prompt_tokens += request.n_tokens
                self.prefix_cache.n_hit_tokens += len(request.prefix) * BLOCK
            beginnings.add(beginning)
            group.append(self._waiting.pop(0))
        return group

    def _has_pages(self, n: int, request: Request, is_late: bool) -> bool:
        """Whether n pages are free, without giving up the prefixes that this group is about to use: where only those are
        left, the first of a group does without its own."""
        assert self._pool is not None
        if self._pool.n_free >= n:
            return True
        if is_late:
            return False
        n += len(request.prefix)
        request.prefix = []
        return self._pool.has(n)

    def _keep_prefix(self, row: int, ids: Sequence[int]) -> None:
        """Give the prefix cache, if there is one, what a row has read."""
        request = self._running[row]
        if self.prefix_cache is not None and request.content is not None and self._cache is not None:
            self.prefix_cache.store(self._cache, row, request.content, ids)

    def _empty_cache(self, requests: Sequence[Request]) -> KVCache:
        """The engine's cache with one empty row for each request and room for all their tokens."""
        room = max(len(request.ids) + request.sampling.max_new_tokens for request in requests)
        if not isinstance(self._cache, KVCache) or self._cache.capacity < room:
            self._cache = None  # the old one's memory goes first
            self._cache = self.model.new_cache(self.max_batch, room)
        self._cache.clear(len(requests))
        return self._cache

    # --- both ---

    def _choose(self, logits: Tensor, requests: Sequence[Request]) -> tuple[list[Event], list[int]]:
        """Each row's next token, and the rows that end with it."""
        if self._forbidden is not None:
            logits = logits.masked_fill(self._forbidden, -torch.inf)
        own = logits  # the model's, before grammars and penalties
        if any(request.matcher is not None for request in requests):
            logits = logits.clone()
            for row, request in enumerate(requests):
                if (may_come := request.allowed()) is not None:
                    logits[row].masked_fill_(~may_come.to(self._device), -torch.inf)
        logits = penalize(logits, [r.seen for r in requests], [r.sampling for r in requests])
        tokens = choose_tokens(logits, [r.sampling for r in requests], [r.generator for r in requests])
        logprobs = token_logprobs(own, tokens, [r.sampling.logprobs for r in requests])
        if self._on_choice is not None:
            self._on_choice(requests, logits, tokens)
        events, ended = [], []
        for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            finished = request.take(token)
            if finished:
                ended.append(row)
                self._ended.add(request.id)
            events.append(Event(request.id, token, finished, logprobs[row] if logprobs else None, request.failure))
        return events, ended

    def _free(self, rows: Sequence[int]) -> None:
        """Forget rows; each time the last one takes the place."""
        if not rows:
            return
        for row in sorted(rows, reverse=True):
            ended = self._running[row]
            if self.drafter is not None:
                self.drafter.forget(ended)
            self._drop_row(row)
        self._rows_changed()

    def _drop_row(self, row: int) -> None:
        assert self._cache is not None
        request = self._running[row]
        self._keep_prefix(row, request.tokens[:-1])  # the newest token was not read
        self._cache.remove_row(row)
        self._running[row], self._last[row] = self._running[-1], self._last[-1]
        self._running.pop()
        self._last.pop()

    def _rows_changed(self) -> None:
        self._selection = self._select(self._running)

    def _select(self, requests: Sequence[Request]) -> AbstractContextManager[object]:
        """The block in which each row has its request's adapter."""
        if self.model.row_selector is None:
            return nullcontext()
        return self.model.row_selector([request.adapter for request in requests])


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
    drafter: Drafter | None = None,  # speculative decoding
) -> list[list[int]]:
    """The new ids of each prompt, without the stop token that ended it.

    One Sampling for all gives row i the seed `seed + i`. Raises ValueError as `Engine.add` does, naming the prompt, and for a
    grammar that gives up on its way.
    """
    if not prompts:
        return []
    if isinstance(sampling, Sampling):
        sampling = [replace(sampling, seed=sampling.seed + row) for row in range(len(prompts))]
    engine = Engine(model, max_batch=max_batch or len(prompts), allowed=allowed, drafter=drafter)
    row_of: dict[int, int] = {}
    for row, (prompt, one) in enumerate(zip(prompts, sampling, strict=True)):
        try:
            row_of[engine.add(prompt, one, adapter=adapters[row] if adapters else None)] = row
        except ValueError as error:
            raise ValueError(str(error).replace("the prompt", f"prompt {row}", 1)) from None
    produced: list[list[int]] = [[] for _ in prompts]
    removed: set[int] = set()
    while engine.n_running or engine.n_waiting:
        for event in engine.step():
            if event.finished == "error":
                raise ValueError(f"prompt {row_of[event.request]}: {event.failure}")
            if event.finished == "stop" or event.request in removed:
                continue
            row = row_of[event.request]
            produced[row].append(event.token)
            if on_token is not None and on_token(row, event.token) is True and event.finished is None:
                engine.remove(event.request)
                removed.add(event.request)
    return produced
