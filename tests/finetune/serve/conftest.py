"""A base with adapters whose answers differ, and a live server in this process."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.base.generate.engine import Engine
from graft.base.generate.sampling import Sampling
from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import save_model
from graft.base.model.transformer import Transformer
from graft.base.pretrain import with_special_ids
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.adapters.bank import AdapterBank
from graft.finetune.adapters.files import save_adapter
from graft.finetune.adapters.lora import LoraConfig, attach_lora, lora_layers
from graft.finetune.data.chat import ChatTemplate, encode_prompt
from graft.finetune.data.stop import stop_ids
from graft.finetune.loading import load_model

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox")


def make_adapter(base: Path, folder: Path, seed: int, **graft: object) -> Path:
    """A random adapter of the base, strong enough to change its answers."""
    model = load_model(base)
    config = LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))
    attach_lora(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        for update in layer.updates.values():
            update.lora_b.data.normal_(0, 0.1, generator=generator)
    save_adapter(model, folder, config, base=str(base), graft={"prompt_format": "chat", **graft})
    return folder


@pytest.fixture(scope="session")
def served_base(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with wide logits, so that rounding decides nothing, and room for 512 tokens."""
    folder = tmp_path_factory.mktemp("served") / "tiny-base"
    tokenizer = Tokenizer.load(tokenizer_dir)
    config = ModelConfig(
        tokenizer.vocab_size, d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_ff=96, max_seq_len=512
    )
    model = Transformer(with_special_ids(config, tokenizer))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def adapters_dir(served_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six adapters in one folder."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES, 1):
        make_adapter(served_base, folder / name, seed)
    return folder


@dataclass
class Live:
    """A running server."""

    url: str
    app: Any
    worker: Any
    models: Any


@contextmanager
def serve(base: Path, adapters: Path | None, **options: object) -> Iterator[Live]:
    """Serve in a thread of this process until the block ends."""
    import uvicorn

    from graft.finetune.serve.adapters import Models
    from graft.finetune.serve.app import Limits, create_app
    from graft.finetune.serve.guard import TimedProtocol
    from graft.finetune.serve.worker import Worker

    limits = options.pop("limits", Limits())
    max_batch = options.pop("max_batch", 8)
    cache = options.pop("prefix_cache_bytes", 1 << 24)
    max_loaded = options.pop("max_loaded", 64)
    pages = {name: options.pop(name, None) for name in ("cache_bytes", "drafter")}
    model = load_model(base)
    model.requires_grad_(False)
    models = Models(base, model, Tokenizer.load(base), folder=adapters, max_loaded=max_loaded)  # pyright: ignore
    worker = Worker(models, max_batch=max_batch, prefix_cache_bytes=cache, **pages)  # pyright: ignore
    app = create_app(worker, limits=limits, **{"log": False, **options})  # pyright: ignore
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, http=TimedProtocol, ws="none", log_level="error", access_log=False)  # pyright: ignore
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield Live(f"http://127.0.0.1:{bound.getsockname()[1]}", app, worker, models)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        bound.close()
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for a condition; fail when it doesn't come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def live(served_base: Path, adapters_dir: Path) -> Iterator[Live]:
    """One server for the tests of a file that don't change it."""
    with serve(served_base, adapters_dir) as running:
        yield running


class Alone:
    """The base and its adapters by the bare engine, one request at a time: what every answer must equal."""

    def __init__(self, base: Path, adapters: Path) -> None:
        self.model, self.tokenizer = load_model(base), Tokenizer.load(base)
        self.bank = AdapterBank(self.model)
        for name in NAMES:
            self.bank.load(name, adapters / name)
        self.template = ChatTemplate.of(self.tokenizer)
        self.stops = stop_ids(self.model.config, self.tokenizer, self.template)

    def ids(self, name: str | None, prompt: list[int], n: int, **sampling: Any) -> list[int]:
        engine = Engine(self.model)
        engine.add(prompt, Sampling(max_new_tokens=n, stop_ids=self.stops, **sampling), adapter=name)
        events = []
        while engine.n_running or engine.n_waiting:
            events += engine.step()
        return [event.token for event in events if event.finished != "stop"]

    def text(self, name: str | None, messages: list[dict[str, Any]], n: int) -> str:
        prompt = encode_prompt(messages, self.tokenizer, self.template).tolist()
        return self.tokenizer.decode(self.ids(name, prompt, n))


@pytest.fixture(scope="session")
def alone(served_base: Path, adapters_dir: Path) -> Alone:
    return Alone(served_base, adapters_dir)


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """`with serving(base, adapters, **options) as live:`"""
    return serve


@pytest.fixture(scope="session")
def write_adapter() -> Callable[..., Path]:
    """write_adapter(base, folder, seed, **facts): a random adapter on disk."""
    return make_adapter


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """until(condition, seconds): wait."""
    return wait_until
