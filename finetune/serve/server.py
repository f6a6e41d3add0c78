"""`graft serve`: load, listen, drain."""

import asyncio
import errno
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...base.device import resolve_device
from ...base.extras import how_to_install
from ...base.tokenizer.tokenizer import Tokenizer
from ..loading import check_token_ids, load_model
from ..speculate import make_drafter
from .adapters import Models
from .app import Limits, create_app
from .battles import Arena
from .guard import TimedProtocol
from .worker import Worker


@dataclass(frozen=True)
class ServeConfig:
    """Everything that `graft serve` is told."""

    base: Path
    adapters: Path | None = None  # a folder of adapter folders
    named: Mapping[str, Path] = field(default_factory=dict)  # adapters elsewhere
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_key: str | None = None
    allow_adapter_changes: bool = False
    max_batch: int = 8  # rows decoded at once
    max_adapters: int = 64  # in memory
    adapter_budget: int | None = None  # bytes of their weights; None: no limit
    pinned: tuple[str, ...] = ()  # adapters that stay in memory once they are loaded
    prefix_cache_mib: int = 256  # 0: none
    cache_mib: int | None = None  # keys and values of running answers, in pages within this; None: rows of full length
    speculate: str | None = None  # "ngram", or the folder of a draft model
    arena: Path | None = None  # the folder that the page's votes are written to
    limits: Limits = field(default_factory=Limits)
    drain_s: int = 30  # after SIGTERM, running answers have so long to end
    dtype: str = "float32"
    device: str = "auto"
    access_log: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} must lie in 0 to 65535")
        for name in ("max_batch", "max_adapters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if self.prefix_cache_mib < 0:
            raise ValueError(f"prefix_cache_mib={self.prefix_cache_mib} must be >= 0; 0 turns it off")
        if self.cache_mib is not None and self.cache_mib < 1:
            raise ValueError(f"cache_mib={self.cache_mib} must be >= 1; leave it out for rows of full length")
        if self.limits.max_queue < 0 or self.limits.max_body_bytes < 1 or not self.limits.timeout_s > 0:
            raise ValueError("max_queue must be >= 0, max_body_bytes and timeout_s > 0")
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise ValueError("the API key is empty or not ASCII; headers carry ASCII only")


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises OSError that names the port and what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise OSError(f"host {host!r} is unknown; use 127.0.0.1, or 0.0.0.0 for every network") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)  # uvicorn listens when the model is there; until then clients are refused
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} of {host} is in use; give another one by --port") from None
        raise OSError(f"can't listen on port {port} of {host}: {error.strerror}; give another one by --port") from None
    return bound


def run_serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT, then let the running answers end. Raises ValueError or OSError before that."""
    try:
        import uvicorn
    except ImportError:
        raise ValueError(f"graft serve needs FastAPI and uvicorn: {how_to_install('serve')}") from None

    bound = bind(config.host, config.port)
    try:
        device = resolve_device(config.device)
        model = load_model(config.base, dtype=config.dtype, device=device)
        model.requires_grad_(False)
        tokenizer = Tokenizer.load(config.base)
        check_token_ids(tokenizer, model.config, where=config.base)
        models = Models(
            config.base,
            model,
            tokenizer,
            folder=config.adapters,
            named=dict(config.named),
            max_loaded=config.max_adapters,
            budget_bytes=config.adapter_budget,
            pinned=config.pinned,
        )
        drafter = None
        if config.speculate is not None:
            drafter = make_drafter(config.speculate, model, tokenizer, dtype=config.dtype, device=str(device))
        worker = Worker(
            models,
            max_batch=config.max_batch,
            prefix_cache_bytes=config.prefix_cache_mib << 20,
            cache_bytes=None if config.cache_mib is None else config.cache_mib << 20,
            drafter=drafter,
        )
        app = create_app(
            worker,
            limits=config.limits,
            api_key=config.api_key,
            allow_adapter_changes=config.allow_adapter_changes,
            log=config.access_log,
            arena=None if config.arena is None else Arena(config.arena),
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app,  # pyright: ignore[reportArgumentType]
                http=TimedProtocol,
                ws="none",
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=config.drain_s,
            )
        )
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        others = len(models.names()) - 1
        print(f"graft serve: {models.base_name} and {others} adapter{'' if others == 1 else 's'} on http://{shown}:{port}",
              file=sys.stderr, flush=True)  # fmt: skip
        # uvicorn raises the signal again once it has drained; by then it has done its work.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        asyncio.run(server.serve(sockets=[bound]))
    finally:
        bound.close()
