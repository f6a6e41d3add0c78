"""What stands before the routes: the API key, limits on bodies and slow clients, one log line a request, JSON errors."""

import asyncio
import hmac
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from time import monotonic, strftime
from typing import Any
from uuid import uuid4

from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADER_SECONDS = 10.0  # a client has so long to send a request's headers
OPEN_PATHS = ("/", "/health")  # without a key: the page, which asks for it, and the health check


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which also closes a connection whose request headers don't come within HEADER_SECONDS."""

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request that has not begun don't extend its time."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for any more."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        super().connection_lost(exc)

    def _watch(self) -> None:
        begun = self.cycle is not None and not self.cycle.response_complete
        if begun and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        elif not begun and self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._close_unless_begun)

    def _close_unless_begun(self) -> None:
        self._deadline = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()


class Guard:
    """The ASGI application around the routes."""

    def __init__(self, app: App, *, api_key: str | None, metrics: Metrics, log: bool) -> None:
        self.app, self.metrics, self.log = app, metrics, log
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, run, count and log one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, started = monotonic(), 500, False
        notes: dict[str, object] = {}  # the routes write what the log shows: model, tokens
        scope["graft"] = notes
        request_id = uuid4().hex

        async def counted(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = int(message["status"]), True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            try:
                self._check_key(scope)
                await self.app(scope, receive, counted)
            except ApiError as error:
                if not started:
                    await send_error(error, counted)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                print(
                    f"graft serve: request {request_id}: {type(error).__name__}: {error}", file=sys.stderr, flush=True
                )
                if not started:
                    await send_error(ApiError(500, "the server failed; its log says more"), counted)
        finally:
            # `route` is the pattern that matched, never what the client wrote.
            route = str(getattr(scope.get("route"), "path", "unknown"))
            status = int(notes.pop("status", status))  # pyright: ignore[reportArgumentType]
            self.metrics.requests[route, status] += 1
            if self.log:
                line = {"time": strftime("%Y-%m-%dT%H:%M:%S"), "request": request_id, "method": scope["method"]}
                line |= {"route": route, "status": status, "seconds": round(monotonic() - began, 4), **notes}
                print(json.dumps(line), file=sys.stderr, flush=True)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                given = value[7:].strip()
        if not hmac.compare_digest(given, self._key):
            raise ApiError(
                401,
                "the API key is wrong" if given else "no API key; send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


async def send_error(error: ApiError, send: Send) -> None:
    """An error as a whole response."""
    await send_json(error.body, send, status=error.status, headers=error.headers)


async def send_json(
    content: Mapping[str, object], send: Send, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> None:
    """A whole response."""
    body = json.dumps(content).encode()
    sent = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    sent += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body})


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int, timeout_s: float) -> bytes:
    """A JSON request's body. Raises ApiError for one that is too large, too slow, of another type, or broken off."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(415, "the request's Content-Type must be application/json")
    too_large = ApiError(
        413, f"the body is larger than this server's limit of {max_bytes} bytes", headers={"Connection": "close"}
    )
    length = headers.get(b"content-length", b"")
    if length.isdigit() and (len(length) > 15 or int(length) > max_bytes):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client left before its request was whole")
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        message = f"the body did not come within {timeout_s:g} seconds"
        raise ApiError(408, message, headers={"Connection": "close"}) from None
