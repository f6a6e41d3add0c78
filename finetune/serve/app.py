"""The routes: requests in OpenAI's format to jobs of the worker, and their text back, whole or as server-sent events."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from ...base.generate.json_grammar import JsonGrammar
from ...base.generate.requests import TokenLogprob
from ...base.generate.sampling import Sampling
from ...base.generate.scoring import text_logprobs
from ..data.chat import encode_prompt
from ..generate import start_ids
from .adapters import Lease, Served
from .battles import Arena
from .errors import ApiError
from .guard import Guard, Receive, Scope, Send, read_body, send_error, send_json
from .metrics import Metrics
from .schema import (
    COMPLETION_TOKENS,
    MAX_CHOICES,
    BattleRequest,
    ChatRequest,
    CompletionRequest,
    Format,
    LoadRequest,
    UnloadRequest,
    parse,
    usage,
)
from .worker import Delta, Job, Worker

MAX_GRAMMARS = 64  # schemas whose grammar is kept
PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Limits:
    """What the server takes in."""

    max_queue: int = 64  # requests that may wait; more are told to come back
    max_body_bytes: int = 2 << 20
    body_timeout_s: float = 20.0  # for a request's body to come in
    timeout_s: float = 600.0  # for an answer, waiting included


class Echo(NamedTuple):
    """A prompt at the beginning of its answer."""

    text: str
    logprobs: list[tuple[int, TokenLogprob | None]]


class Api:
    """What the routes share."""

    def __init__(self, worker: Worker, limits: Limits, *, allow_adapter_changes: bool) -> None:
        self.worker, self.models, self.limits = worker, worker.models, limits
        self.allow_adapter_changes = allow_adapter_changes
        self.metrics = Metrics(worker)
        self.n_open = 0  # choices that were accepted and have not ended
        # One thread for templates and tokens: the tokenizer serves one caller at a time, and the event loop must not wait.
        self.text = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._loading = asyncio.Lock()
        is_short = worker.max_tokens < worker.model.config.max_seq_len
        self.reader = "the key-value cache (--cache-mib) holds" if is_short else "the model reads"
        self._grammars: dict[tuple[str, frozenset[int]], JsonGrammar] = {}

    async def body(self, request: Request) -> bytes:
        """The request's body, within the limits."""
        limits = self.limits
        return await read_body(
            request.scope, request.receive, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s
        )

    async def lease(self, name: str) -> Lease:
        """The model of that name, loaded if it must be. Raises ApiError 404, 409 or 500."""
        while True:
            lease = self.models.lease(name)
            if lease is not None:
                return lease
            folder = self.models.find(name)
            async with self._loading:
                if (lease := self.models.lease(name)) is not None:
                    return lease
                adapter = await asyncio.to_thread(self.models.read, name, folder)
                await self.worker.call(lambda name=name, adapter=adapter: self.models.attach(name, adapter))

    def refuse_if_full(self, n: int) -> None:
        """Raise ApiError 429 when more choices wait than the server keeps, 503 when the engine is gone."""
        if not self.worker.is_alive:
            raise ApiError(503, "the decoding engine has ended; restart the server")
        if self.n_open and self.n_open + n > self.worker.max_batch + self.limits.max_queue:
            raise ApiError(
                429,
                f"{self.n_open} answers are running or waiting, this server keeps "
                f"{self.worker.max_batch + self.limits.max_queue}; try again in a second",
                code="server_busy",
                headers={"Retry-After": "1"},
            )

    async def answer(self, request: Request, asked: ChatRequest | CompletionRequest) -> Response:
        """Either kind of request: prepare its jobs, and return a response that runs them."""
        notes = request.scope["graft"]
        notes["stream"] = bool(asked.stream)
        self.refuse_if_full(asked.n or 1)
        lease = await self.lease(asked.model)
        notes["model"] = asked.model
        try:
            loop = asyncio.get_running_loop()
            prompts = await loop.run_in_executor(self.text, self._prompts, asked, lease.served)
            self.refuse_if_full(len(prompts) * (asked.n or 1))
            echoes = []
            if isinstance(asked, CompletionRequest) and asked.echo:
                echoes = await self.echoes(asked, lease, prompts)
            prepare = partial(self.samplings, asked, lease.served, prompts)
            run = Run(self, asked, lease, prompts, await loop.run_in_executor(self.text, prepare), notes, echoes)
        except BaseException:
            lease.close()
            raise
        return run

    async def echoes(self, asked: CompletionRequest, lease: Lease, prompts: Sequence[list[int]]) -> list[Echo]:
        """Each prompt as its answers begin, one for each choice; log-probabilities are read between two steps."""
        if asked.stream:
            raise ApiError(400, "echo with stream is not supported here; leave one of them out", param="echo")
        found = []
        n_top, adapter = asked.logprobs, lease.served.internal
        for ids in prompts:
            logprobs: list[TokenLogprob | None] = []
            if n_top is not None:
                read = partial(text_logprobs, self.worker.model, ids, n_top, adapter=adapter)
                logprobs = await self.worker.call(read)
            text = self.models.tokenizer.decode(ids)
            found += [Echo(text, list(zip(ids, logprobs, strict=False)))] * (asked.n or 1)
        return found

    def _prompts(self, asked: ChatRequest | CompletionRequest, served: Served) -> list[list[int]]:
        """The ids that each answer starts from. Raises ApiError 400 for a prompt that can't be made or is too long."""
        tokenizer, limit = self.models.tokenizer, self.worker.max_tokens
        field = "prompt" if isinstance(asked, CompletionRequest) else "messages"
        try:
            if isinstance(asked, CompletionRequest):
                prompts = [
                    start_ids(encode_prompt(prompt, tokenizer).tolist(), tokenizer)
                    if isinstance(prompt, str)
                    else prompt
                    for prompt in asked.prompt
                ]
            else:
                messages = asked.messages
                if not served.is_chat and len(messages) == 1 and not asked.tools:
                    # A model that learned no conversation gets its one message as plain text, as graft chat gives it.
                    prompts = [start_ids(encode_prompt(messages[0]["content"], tokenizer).tolist(), tokenizer)]
                else:
                    tools = None if asked.tool_choice == "none" else asked.tools
                    args = asked.chat_template_kwargs
                    ids = encode_prompt(messages, tokenizer, served.template, tools=tools, args=args)
                    prompts = [start_ids(ids.tolist(), tokenizer)]
        except ValueError as error:
            raise ApiError(400, str(error), param=field) from None
        except RecursionError:
            raise ApiError(400, f"{field} is nested too deeply", param=field) from None
        vocab_size = self.worker.model.config.vocab_size
        for ids in prompts:
            if wrong := [one for one in ids if not 0 <= one < vocab_size]:
                raise ApiError(400, f"{field} holds id {wrong[0]}, the ids are 0 to {vocab_size - 1}", param=field)
            if len(ids) >= limit:
                raise ApiError(
                    400,
                    f"the prompt has {len(ids)} tokens, {self.reader} {limit} with its answer; shorten the prompt",
                    param=field,
                    code="context_length_exceeded",
                )
        if len(prompts) * (asked.n or 1) > MAX_CHOICES:
            raise ApiError(400, f"{len(prompts)} prompts times n is more than {MAX_CHOICES} choices", param="n")
        return prompts

    def grammar(self, schema: dict[str, object], served: Served) -> JsonGrammar:
        """The grammar of a schema, kept for the next request with it. Raises ValueError for one that can't be used."""
        key = json.dumps(schema, sort_keys=True), served.stops
        found = self._grammars.pop(key, None)
        if found is None:
            vocab_size = self.worker.model.config.vocab_size
            found = JsonGrammar(self.models.tokenizer, vocab_size=vocab_size, stop_ids=served.stops, schema=schema)
        self._grammars[key] = found  # the most recently used last
        while len(self._grammars) > MAX_GRAMMARS:
            del self._grammars[next(iter(self._grammars))]
        return found

    def samplings(
        self, asked: ChatRequest | CompletionRequest, served: Served, prompts: Sequence[Sequence[int]]
    ) -> list[Sampling]:
        """The settings of each prompt. The first use of a schema takes a while: call it in the thread for text."""
        return [self.sampling(asked, served, len(ids)) for ids in prompts]

    def sampling(self, asked: ChatRequest | CompletionRequest, served: Served, n_prompt: int) -> Sampling:
        """The request's settings with OpenAI's defaults. Raises ApiError 400."""
        room = self.worker.max_tokens - n_prompt
        if isinstance(asked, ChatRequest):
            limit = asked.max_completion_tokens or asked.max_tokens or room
            if asked.top_logprobs is not None and not asked.logprobs:
                raise ApiError(400, "top_logprobs is given, but logprobs is not true", param="top_logprobs")
            logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        else:
            limit, logprobs = asked.max_tokens or min(COMPLETION_TOKENS, room), asked.logprobs
        if limit > room:
            raise ApiError(
                400,
                f"the prompt has {n_prompt} tokens; with max_tokens={limit} that is too much: {self.reader} {room + n_prompt}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        try:
            grammar = None if asked.response_format is None else self.grammar(asked.response_format, served)
        except ValueError as error:
            raise ApiError(400, str(error), param="response_format") from None
        if grammar is not None and asked.ignore_eos:
            raise ApiError(400, "ignore_eos with response_format: the JSON would never end", param="ignore_eos")
        try:
            return Sampling(
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_k=asked.top_k if asked.top_k is not None and asked.top_k > 0 else None,
                top_p=asked.top_p,
                min_p=asked.min_p or None,
                max_new_tokens=limit,
                stop_ids=frozenset() if asked.ignore_eos else served.stops,
                seed=secrets.randbits(62) if asked.seed is None else asked.seed,
                logprobs=logprobs,
                grammar=grammar,
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from None


class Run(Response):
    """A response that submits its jobs when it is sent, and cancels them when the client goes or time is up."""

    def __init__(
        self,
        api: Api,
        asked: ChatRequest | CompletionRequest,
        lease: Lease,
        prompts: Sequence[list[int]],
        samplings: Sequence[Sampling],  # one for each prompt
        notes: dict[str, object],
        echoes: Sequence[Echo] = (),  # one for each job, where the prompt is to come back
    ) -> None:
        self.api, self.lease, self.notes, self.background = api, lease, notes, None
        self.is_chat, self.stream = isinstance(asked, ChatRequest), bool(asked.stream)
        self.with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self.n_prompt = sum(map(len, prompts))
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        self.format = Format(
            answer_id=f"{prefix}-{uuid4().hex}", model=asked.model, chat=self.is_chat, tokenizer=api.models.tokenizer
        )
        self.queue: asyncio.Queue[Delta] = asyncio.Queue()
        self.jobs: list[Job] = []
        self.echoes = echoes
        for prompt, sampling in zip(prompts, samplings, strict=True):
            for i in range(asked.n or 1):
                one = Sampling(**{**sampling.__dict__, "seed": (sampling.seed + i) % 2**63})
                self.jobs.append(
                    Job(
                        len(self.jobs), prompt, one, lease.served.internal, asked.stop or (), self.stream,
                        self.queue.put_nowait, asked.priority or 0,
                    )
                )  # fmt: skip
        self.has_logprobs = self.jobs[0].sampling.logprobs is not None
        api.n_open += len(self.jobs)
        self._open = {job.choice for job in self.jobs}
        self._n_tokens = [0] * len(self.jobs)
        self._started = False  # whether a stream's headers are out

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the jobs; an early end of any kind frees what they hold."""
        began = time.monotonic()
        for job in self.jobs:
            self.api.worker.submit(job)
        answering = asyncio.ensure_future(self._answer(send))
        watching = asyncio.ensure_future(_until_disconnect(receive))
        try:
            done, _ = await asyncio.wait(
                {answering, watching}, timeout=self.api.limits.timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if answering in done:
                await answering
            elif watching in done:
                self.notes["status"] = 499  # as nginx logs a client that went
                self.api.metrics.n_cancelled += 1
            else:
                answering.cancel()
                error = ApiError(
                    504, f"no complete answer within {self.api.limits.timeout_s:g} seconds", code="timeout"
                )
                self.notes["status"] = 504
                await self._end_with(error, send)
        finally:
            for task in (answering, watching):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
            for job in self.jobs:
                if job.choice in self._open:
                    self.api.worker.cancel(job)
            self.api.n_open -= len(self._open)
            self._open.clear()
            self.lease.close()
            n_completion = sum(self._n_tokens)
            self.api.metrics.n_prompt_tokens += self.n_prompt
            self.api.metrics.n_generated_tokens += n_completion
            self.notes |= {"prompt_tokens": self.n_prompt, "completion_tokens": n_completion}
            self.notes["seconds_decoding"] = round(time.monotonic() - began, 4)

    async def _deltas(self) -> AsyncIterator[list[Delta]]:
        """What came since the last time, until every job has ended. Raises ApiError when one failed."""
        while self._open:
            found = [await self.queue.get()]
            while not self.queue.empty():
                found.append(self.queue.get_nowait())
            for delta in found:
                if delta.error is not None:
                    self._open.discard(delta.choice)
                    self.api.n_open -= 1
                    raise ApiError(500, f"decoding failed: {delta.error}")
                self._n_tokens[delta.choice] = delta.n_tokens
                if delta.finished is not None:
                    self._open.discard(delta.choice)
                    self.api.n_open -= 1
            yield found

    async def _answer(self, send: Send) -> None:
        try:
            await (self._stream(send) if self.stream else self._whole(send))
        except ApiError as error:
            self.notes["status"] = error.status
            await self._end_with(error, send)

    async def _whole(self, send: Send) -> None:
        choices: list[dict[str, object]] = [{}] * len(self.jobs)
        async for deltas in self._deltas():
            for delta in deltas:
                assert delta.finished is not None  # jobs that don't stream hand over the whole
                echo = self.echoes[delta.choice] if self.echoes else Echo("", [])
                logprobs = [*echo.logprobs, *delta.logprobs] if self.has_logprobs else None
                choices[delta.choice] = self.format.choice(
                    delta.choice, echo.text + delta.text, delta.finished, logprobs
                )
        await send_json(self.format.whole(choices, usage(self.n_prompt, sum(self._n_tokens))), send)

    async def _stream(self, send: Send) -> None:
        began = time.monotonic()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._started = True
        offsets = [0] * len(self.jobs)
        first = b"".join(self.format.first_chunk(job.choice) for job in self.jobs) if self.is_chat else b""
        if first:
            await send({"type": "http.response.body", "body": first, "more_body": True})
        has_token = False
        async for deltas in self._deltas():
            if not has_token:
                has_token = True
                self.api.metrics.first_token_s += time.monotonic() - began
                self.api.metrics.n_first_tokens += 1
                self.notes["seconds_to_first_token"] = round(time.monotonic() - began, 4)
            chunks = []
            for delta in deltas:
                logprobs = delta.logprobs if self.has_logprobs else None
                chunks.append(
                    self.format.chunk(delta.choice, delta.text, delta.finished, logprobs, offsets[delta.choice])
                )
                offsets[delta.choice] += len(delta.text)
            await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": True})
        last = b"data: [DONE]\n\n"
        if self.with_usage:
            last = self.format.usage_chunk(usage(self.n_prompt, sum(self._n_tokens))) + last
        await send({"type": "http.response.body", "body": last})

    async def _end_with(self, error: ApiError, send: Send) -> None:
        """The error as a response, or as a stream's last event where it has begun."""
        if not self._started:
            await send_error(error, send)
            return
        event = f"data: {json.dumps(error.body)}\n\ndata: [DONE]\n\n".encode()
        await send({"type": "http.response.body", "body": event})


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def create_app(
    worker: Worker,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    allow_adapter_changes: bool = False,
    log: bool = True,
    arena: Arena | None = None,  # where the page's votes go; None: it has no buttons for them
) -> Guard:
    """The ASGI application: what `graft serve` runs."""
    api = Api(worker, limits or Limits(), allow_adapter_changes=allow_adapter_changes)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        worker.start(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(worker.stop)
        api.text.shutdown(wait=False)

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)

    def refused(request: Request, error: Exception) -> Response:
        del request
        if isinstance(error, HTTPException):
            error = ApiError(
                error.status_code, f"{error.detail}; see /v1/models, /v1/chat/completions, /v1/completions"
            )
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, error.headers)

    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, refused)
    for add in (_add_models, _add_answers, _add_looks):
        add(app, api)
    if arena is not None:
        _add_arena(app, api, arena)
    return Guard(app, api_key=api_key, metrics=api.metrics, log=log)  # pyright: ignore[reportArgumentType]


Route = Callable[[Request], Awaitable[Response]]


def _add_answers(app: FastAPI, api: Api) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await api.answer(request, parse(ChatRequest, await api.body(request)))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await api.answer(request, parse(CompletionRequest, await api.body(request)))


def _add_models(app: FastAPI, api: Api) -> None:
    models = api.models
    created = int(time.time())

    def card(name: str) -> dict[str, object]:
        parent = None if name == models.base_name else models.base_name
        return {"id": name, "object": "model", "created": created, "owned_by": "graft", "parent": parent,
                "max_model_len": api.worker.max_tokens}  # fmt: skip

    @app.get("/v1/models")
    async def names() -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in models.names()]})

    @app.get("/v1/models/{name}")
    async def one(name: str) -> Response:
        if name != models.base_name:
            models.find(name)
        return JSONResponse(card(name))

    def check_allowed() -> None:
        if not api.allow_adapter_changes:
            raise ApiError(403, "this server's adapters can't be changed; start it with --allow-adapter-changes")

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        check_allowed()
        asked = parse(LoadRequest, await api.body(request))
        name = asked.lora_name
        if not name or name == models.base_name or len(name) > 200 or not name.isprintable():
            raise ApiError(400, "lora_name must be a name of 1 to 200 characters, not the base's", param="lora_name")
        folder = models.check_path(asked.lora_path)
        if name in models.names() and not asked.load_inplace:
            message = f"there is an adapter {name!r} already; give load_inplace: true to replace it"
            raise ApiError(400, message, param="lora_name")
        adapter = await asyncio.to_thread(models.read, name, folder)
        await api.worker.call(lambda: models.attach(name, adapter, folder))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        check_allowed()
        name = parse(UnloadRequest, await api.body(request)).lora_name
        await api.worker.call(lambda: models.detach(name))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _add_arena(app: FastAPI, api: Api, arena: Arena) -> None:
    @app.get("/arena/battles")
    async def count() -> Response:
        return JSONResponse({"n_battles": arena.n_battles})

    @app.post("/arena/battles")
    async def vote(request: Request) -> Response:
        asked = parse(BattleRequest, await api.body(request))
        for name in (asked.a, asked.b):
            if name not in api.models.names():
                api.models.find(name)  # raises for an unknown name
        if asked.a == asked.b:
            raise ApiError(400, "a and b are one model; a battle needs two", param="b")
        try:
            await asyncio.to_thread(arena.write, asked.model_dump())
        except OSError as error:
            raise ApiError(500, f"the vote can't be written: {error.strerror or error}; look at the disk") from None
        return JSONResponse({"n_battles": arena.n_battles})


def _add_looks(app: FastAPI, api: Api) -> None:
    @app.get("/health")
    async def health() -> Response:
        if not api.worker.is_alive:
            raise ApiError(503, "the decoding engine has ended; restart the server")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(api.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        return HTMLResponse(
            PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
        )
