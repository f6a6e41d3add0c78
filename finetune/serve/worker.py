"""The one thread that runs the model: it takes jobs and commands, steps the engine, and hands text to the event loop."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

from ...base.generate.engine import Engine, Event, TokenLogprob
from ...base.generate.prefix_cache import PrefixCache
from ...base.generate.sampling import Sampling
from ...base.generate.speculative import Drafter, ModelDraft
from ...base.generate.stop_strings import StopStrings
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import StreamDecoder
from ..generate import ids_with_text
from .adapters import Models

SWEEP_SECONDS = 0.1
SPEED_SECONDS = 10.0  # tokens/s are counted over the last so many seconds


class Delta(NamedTuple):
    """What is new of one choice."""

    choice: int
    text: str
    n_tokens: int  # of the whole choice so far
    logprobs: list[tuple[int, TokenLogprob]]  # tokens whose text is in `text`, if the request asked for them
    finished: str | None  # "stop" or "length"
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """One choice of a request."""

    choice: int  # its number in the answer
    ids: Sequence[int]
    sampling: Sampling
    adapter: str | None  # the bank's name
    stops: Sequence[str]
    stream: bool  # hand over each piece, not only the whole
    deliver: Callable[[Delta], None]  # is called in the event loop's thread
    priority: int = 0  # the lowest first
    request: int | None = None  # the engine's number
    n_tokens: int = 0
    pieces: list[str] = field(default_factory=list)  # text that was not handed over yet
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    decoder: StreamDecoder | None = None
    stopper: StopStrings | None = None


class Worker:
    """Owns the engine. Everything but `start`, `stop` and the figures goes through its queue."""

    def __init__(
        self,
        models: Models,
        *,
        max_batch: int,
        prefix_cache_bytes: int,
        cache_bytes: int | None = None,  # of running answers, in pages; None: rows
        drafter: Drafter | None = None,
    ) -> None:
        self.models = models
        self.model = models.bank.model
        self._allowed = ids_with_text(self.model, models.tokenizer, models.base.stops)
        self.max_batch, self._cache_bytes, self._drafter = max_batch, cache_bytes, drafter
        keeps_prefixes = (
            prefix_cache_bytes > 0 and not self.model.config.n_linear_layers
        )  # whose states lie in no blocks
        self.prefix_cache = PrefixCache(prefix_cache_bytes) if keeps_prefixes else None
        self.engine = self._new_engine()
        self.has_pages = cache_bytes is not None
        self.max_tokens = self.engine.max_tokens  # of a prompt and its answer
        if self.max_tokens < 1:
            raise ValueError(f"cache_bytes={cache_bytes} hold less than two pages of keys and values; give more")
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}  # by the engine's number
        self._outgoing: list[tuple[Job, Delta]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failure: BaseException | None = None  # what ended the thread, if anything did
        self.n_generated = 0
        self._recent: deque[tuple[float, int]] = deque()  # (when, tokens) of the last steps

    @property
    def draft_model(self) -> Transformer | None:
        """The small model that guesses tokens, if one does."""
        return self._drafter.model if isinstance(self._drafter, ModelDraft) else None

    def _new_engine(self) -> Engine:
        return Engine(
            self.model,
            max_batch=self.max_batch,
            allowed=self._allowed,
            prefix_cache=self.prefix_cache,
            cache_bytes=self._cache_bytes,
            drafter=self._drafter,
        )

    # --- called from the event loop ---

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to work."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what runs is dropped."""
        self._inbox.put(None)
        self._thread.join(timeout=30)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._inbox.put(lambda: self._add(job))

    def cancel(self, job: Job) -> None:
        """Forget a job: nothing more is delivered once this was carried out."""
        self._inbox.put(lambda: self._remove(job))

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function between two steps, in the engine's thread, and return what it returns or raise what it raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: object, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def run() -> None:
            result, error = None, None
            try:
                result = function()
            except Exception as raised:
                error = raised
            loop.call_soon_threadsafe(settle, result, error)

        self._inbox.put(run)
        return await future

    def tokens_per_second(self) -> float:
        """New tokens of the last SPEED_SECONDS, by the second."""
        since = monotonic() - SPEED_SECONDS
        return sum(n for when, n in list(self._recent) if when >= since) / SPEED_SECONDS

    # --- in the engine's thread ---

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self.engine.n_running or self.engine.n_waiting:
                    self._step()
                self.models.sweep()
                self._hand_over()
        except BaseException as error:
            self.failure = error
            self._fail(error)
            raise

    def _take_commands(self) -> bool:
        """Carry out what waits in the queue; wait for something when there is nothing to decode. False: the end."""
        idle = not (self.engine.n_running or self.engine.n_waiting)
        while True:
            # A retired adapter's last user may be a response that is just being sent: look again soon.
            patience = SWEEP_SECONDS if self.models.has_retired else None
            try:
                command = self._inbox.get(block=idle, timeout=patience)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            idle = False

    def _add(self, job: Job) -> None:
        job.decoder, job.stopper = self.models.tokenizer.stream_decoder(), StopStrings(job.stops)
        try:
            job.request = self.engine.add(job.ids, job.sampling, adapter=job.adapter, priority=job.priority)
        except ValueError as error:
            self._outgoing.append((job, Delta(job.choice, "", 0, [], None, error)))
            return
        self._jobs[job.request] = job

    def _remove(self, job: Job) -> None:
        if job.request is not None and self._jobs.pop(job.request, None) is not None:
            self.engine.remove(job.request)

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:  # one line for the clients, and a new start: the engine's rows may be half written
            self._fail(error)
            return
        now = monotonic()
        self.n_generated += len(events)
        self._recent.append((now, len(events)))
        while self._recent and self._recent[0][0] < now - SPEED_SECONDS:
            self._recent.popleft()
        for event in events:
            self._take(event)

    def _take(self, event: Event) -> None:
        """One token's text goes to its job."""
        job = self._jobs.get(event.request)
        if job is None:  # a stop string came before, in the same step: speculation gives several tokens at once
            return
        if event.finished == "error":
            del self._jobs[event.request]
            self._outgoing.append((job, Delta(job.choice, "", job.n_tokens, [], None, ValueError(event.failure))))
            return
        assert job.decoder is not None
        assert job.stopper is not None
        job.n_tokens += 1
        finished, text = event.finished, ""
        if finished != "stop":
            if event.logprob is not None:
                job.logprobs.append((event.token, event.logprob))
            text, stopped = job.stopper.push(job.decoder.push(event.token))
            if not stopped and finished:  # what is held back comes out
                more, stopped = job.stopper.push(job.decoder.flush())
                text += more
            if stopped:
                if finished is None:
                    self.engine.remove(event.request)
                finished = "stop"
            elif finished:
                text += job.stopper.flush()
        else:
            text, stopped = job.stopper.push(job.decoder.flush())
            text += "" if stopped else job.stopper.flush()
        if text:
            job.pieces.append(text)
        if finished:
            del self._jobs[event.request]
        if finished or (job.stream and text):
            delta = Delta(job.choice, "".join(job.pieces), job.n_tokens, job.logprobs, finished)
            self._outgoing.append((job, delta))
            job.pieces, job.logprobs = [], []

    def _fail(self, error: BaseException) -> None:
        """Every job ends with the error, and the engine begins anew."""
        shown = error if isinstance(error, Exception) else RuntimeError(str(error))
        self._outgoing += [(job, Delta(job.choice, "", job.n_tokens, [], None, shown)) for job in self._jobs.values()]
        self._jobs.clear()
        self.engine.release()  # the old cache's memory goes before the new one's comes
        self.engine = self._new_engine()
        self._hand_over()

    def _hand_over(self) -> None:
        """Give the event loop everything that came since, in one call: each costs it a wake-up."""
        if not self._outgoing:
            return
        outgoing, self._outgoing = self._outgoing, []
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_deliver, outgoing)
        except RuntimeError:  # the loop has ended: nobody listens
            self._jobs.clear()


def _deliver(outgoing: Sequence[tuple[Job, Delta]]) -> None:
    for job, delta in outgoing:
        job.deliver(delta)
