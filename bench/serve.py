"""The server beside the bare Engine, adapters mixed beside the base alone, speculation, pages, and peers.

    python bench/serve.py [--base DIR] [--rounds 5] [--tokens 96] [--clients 1,8,32] [--rows prefix,mixed,...]

    prefix        16 prompts that share 500 tokens, with the prefix cache and without
    mixed         8 adapters mixed in 32 requests against the base only; the same with 200 on disk and 50 in memory
    server        tokens a second through HTTP at --clients against the bare Engine
    ngram         speculation by look-up on a code edit (copies most of its prompt), and on text without repetition
    pages         decoding from pages against rows, batch 1 and 8
    transformers  its continuous batching (generate_batch), batch 8
    llama.cpp     the same weights in float16 and Q8_0 on 2 threads, where llama-cpp-python is installed and --gguf names them

Without --base a model of 6 layers and width 384 is made, in float32. Each round runs both sides one after the other, in
turn first; figures are medians of the rounds' ratios with their smallest and largest. All answers are greedy and are
checked against one by one or the other side's. Server and clients are two processes, so wall time says what a user feels
where a second core is free; processor time of the server's process says what it costs.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import httpx
import serve_peers
import torch

from graft.base.generate.engine import Engine
from graft.base.generate.prefix_cache import PrefixCache
from graft.base.generate.sampling import Sampling
from graft.base.generate.speculative import NgramDraft
from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import save_model
from graft.base.model.transformer import Transformer, initialize_
from graft.base.pretrain import with_special_ids
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.adapters.bank import AdapterBank
from graft.finetune.adapters.files import save_adapter
from graft.finetune.adapters.lora import LoraConfig, attach_lora, lora_layers
from graft.finetune.generate import ids_with_text
from graft.finetune.loading import load_model

N_ADAPTERS, PROMPT = 8, 32
N_ON_DISK, N_RESIDENT = 200, 50
ROWS = ("prefix", "mixed", "server", "ngram", "pages", "transformers", "llama.cpp")


def make_base(folder: Path) -> Path:
    """A random base that can be served: with a tokenizer, and logits wide enough that rounding decides nothing."""
    text = folder / "text.txt"
    text.write_text(" ".join(f"word{i % 700} and {i * 7 % 311}" for i in range(20_000)), encoding="utf-8")
    tokenizer = Tokenizer.train([text], vocab_size=1200, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    config = ModelConfig(
        tokenizer.vocab_size, d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, d_head=64, d_ff=1024, max_seq_len=1024,
        init_std=0.05,
    )  # fmt: skip
    model = Transformer(with_special_ids(config, tokenizer))
    initialize_(model, seed=0)
    save_model(model, folder / "base")
    tokenizer.save(folder / "base")
    return folder / "base"


def make_adapters(base: Path, folder: Path) -> list[str]:
    """Adapters of rank 16 on every linear."""
    for i in range(N_ADAPTERS):
        model = load_model(base)
        attach_lora(model, LoraConfig(rank=16), seed=i)
        generator = torch.Generator().manual_seed(i)
        for _, layer in lora_layers(model):
            for update in layer.updates.values():
                update.lora_b.data.normal_(0, 0.02, generator=generator)
        save_adapter(model, folder / f"a{i}", LoraConfig(rank=16), base=str(base))
    return [f"a{i}" for i in range(N_ADAPTERS)]


def run_engine(
    engine: Engine, prompts: Sequence[list[int]], names: Sequence[str | None], tokens: int
) -> list[list[int]]:
    """Every prompt at once; the new ids."""
    rows = {
        engine.add(prompt, Sampling(max_new_tokens=tokens), adapter=name): []
        for prompt, name in zip(prompts, names, strict=True)
    }
    while engine.n_running or engine.n_waiting:
        for event in engine.step():
            rows[event.request].append(event.token)
    return list(rows.values())


def interleaved(rounds: int, sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Each side's seconds, round by round, the order turning."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in list(sides) if i % 2 else list(sides)[::-1]:
            seconds = sides[name]()
            if i:  # the first round warms up
                found[name].append(seconds)
    return found


def ratio(of: Sequence[float], to: Sequence[float]) -> str:
    """Median of of / to, and its range."""
    found = sorted(a / b for a, b in zip(of, to, strict=True))
    return f"{statistics.median(found):.2f}x ({found[0]:.2f}-{found[-1]:.2f})"


class Server:
    """`graft serve` in its own process."""

    def __init__(self, base: Path, adapters: Path, *more: str) -> None:
        command = [sys.executable, "-m", "graft", "serve", "--base", str(base), "--adapters", str(adapters)]
        command += ["--port", "0", "--no-access-log", "--prefix-cache-mib", "0", "--max-queue", "256", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        self.url = self.process.stderr.readline().split()[-1]
        while True:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)

    def processor_s(self) -> float:
        """Processor seconds of the server so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def texts(
        self, prompts: Sequence[list[int]], names: Sequence[str], tokens: int, stream: bool, *, at_once: int = 1000
    ) -> list[str]:
        """Every prompt from one client each, so many at once."""

        async def one(client: httpx.AsyncClient, prompt: list[int], name: str) -> str:
            body = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
            if not stream:
                answer = await client.post("/v1/completions", json=body)
                return answer.raise_for_status().json()["choices"][0]["text"]
            pieces = []
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        pieces.append(json.loads(line[6:])["choices"][0]["text"])
            return "".join(pieces)

        async def run() -> list[str]:
            limits = httpx.Limits(max_connections=at_once)
            async with httpx.AsyncClient(base_url=self.url, timeout=600, limits=limits) as client:
                return await asyncio.gather(*(one(client, p, n) for p, n in zip(prompts, names, strict=True)))

        return asyncio.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="GGUF files of the base, for llama.cpp")
    options = parser.parse_args()
    rows = options.rows.split(",")
    if unknown := sorted(set(rows) - set(ROWS)):
        parser.error(f"unknown rows {', '.join(unknown)}; choose from {', '.join(ROWS)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = options.base or make_base(folder)
        model = load_model(base).requires_grad_(False)
        tokenizer = Tokenizer.load(base)
        generator = torch.Generator().manual_seed(1)

        def random_prompts(n: int, length: int) -> list[list[int]]:
            return torch.randint(0, min(1000, tokenizer.vocab_size), (n, length), generator=generator).tolist()

        if "prefix" in rows:
            bench_prefix(model, random_prompts, options.rounds)
        if "ngram" in rows:
            bench_ngram(model, tokenizer, random_prompts, options)
        if "pages" in rows:
            bench_pages(model, random_prompts, options)
        if "transformers" in rows:
            serve_peers.bench_transformers(base, model, random_prompts(8, PROMPT), options)
        if "llama.cpp" in rows:
            serve_peers.bench_llama_cpp(options.gguf, model, tokenizer, options)
        if "mixed" in rows or "server" in rows:
            (folder / "adapters").mkdir()
            names = make_adapters(base, folder / "adapters")
        if "server" in rows:
            bench_servers(base, folder / "adapters", model, tokenizer, random_prompts, options)
        if "mixed" in rows:
            bench_mixed(model, folder / "adapters", names, random_prompts(32, PROMPT), options)
            bench_many(base, folder / "adapters", names, random_prompts(32, PROMPT), options)


def bench_servers(
    base: Path,
    adapters: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    random_prompts: Callable[[int, int], list[list[int]]],
    options: argparse.Namespace,
) -> None:
    """Each number of clients, whole answers and streams."""
    allowed = ids_with_text(model, tokenizer, frozenset())
    server = Server(base, adapters)
    try:
        for n in map(int, options.clients.split(",")):
            prompts = random_prompts(n, PROMPT)
            engine = Engine(model, allowed=allowed)
            expected = [tokenizer.decode(ids) for ids in run_engine(engine, prompts, [None] * n, options.tokens)]
            for stream in (False, True):
                bench_server(server, engine, base.name, prompts, expected, stream, options)
    finally:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=60)


def bench_server(
    server: Server,
    engine: Engine,
    name: str,
    prompts: list[list[int]],
    expected: list[str],
    stream: bool,
    options: argparse.Namespace,
) -> None:
    """Tokens a second through HTTP against the bare engine's, by wall and by processor time."""
    n = len(prompts)
    processor: dict[str, list[float]] = {"bare": [], "served": []}

    def bare() -> float:
        before, began = time.process_time(), time.perf_counter()
        run_engine(engine, prompts, [None] * n, options.tokens)
        processor["bare"].append(time.process_time() - before)
        return time.perf_counter() - began

    def served() -> float:
        before, began = server.processor_s(), time.perf_counter()
        found = server.texts(prompts, [name] * n, options.tokens, stream)
        seconds = time.perf_counter() - began
        processor["served"].append(server.processor_s() - before)
        assert found == expected, "the server's texts are not the engine's"
        return seconds

    times = interleaved(options.rounds, {"bare": bare, "served": served})
    speed = n * options.tokens / statistics.median(times["served"])
    print(
        f"{n} client{'s' if n > 1 else ''}, {'streamed' if stream else 'whole'}: {speed:.0f} tokens/s, "
        f"{ratio(times['bare'], times['served'])} the bare engine's speed by wall; "
        f"{ratio(processor['bare'][1:], processor['served'][1:])} by processor time, the server's process alone",
        flush=True,
    )


def bench_mixed(
    model: Transformer, folder: Path, names: list[str], prompts: list[list[int]], options: argparse.Namespace
) -> None:
    """Processor time of 32 requests of eight adapters against the same of the base, 8 and 32 at once."""
    bank = AdapterBank(model)
    for name in names:
        bank.load(name, folder / name)
    chosen: list[str | None] = [names[i % len(names)] for i in range(len(prompts))]
    alone = [run_engine(Engine(model), [p], [n], options.tokens)[0] for p, n in zip(prompts, chosen, strict=True)]
    plain: list[str | None] = [None] * len(prompts)
    for max_batch in (8, 32):
        engine = Engine(model, max_batch=max_batch)
        assert run_engine(engine, prompts, chosen, options.tokens) == alone, "a mixed batch wrote other ids"

        def side(which: Sequence[str | None], engine: Engine = engine) -> float:
            began = time.process_time()
            run_engine(engine, prompts, which, options.tokens)
            return time.process_time() - began

        times = interleaved(options.rounds, {"base": partial(side, plain), "mixed": partial(side, chosen)})
        print(
            f"32 requests of 8 adapters, {max_batch} at once: {ratio(times['base'], times['mixed'])} the speed of the base",
            flush=True,
        )


def bench_many(
    base: Path, folder: Path, names: list[str], prompts: list[list[int]], options: argparse.Namespace
) -> None:
    """The same through HTTP with 200 adapters on disk and 50 in memory: 8 of these, against the base only."""
    for i in range(len(names), N_ON_DISK):
        shutil.copytree(folder / names[i % len(names)], folder / f"a{i}")
    server = Server(base, folder, "--max-adapters", str(N_RESIDENT))
    try:
        server.texts(prompts[:1] * N_ON_DISK, [f"a{i}" for i in range(N_ON_DISK)][::-1], 1, False, at_once=8)
        chosen = [names[i % len(names)] for i in range(len(prompts))]

        def side(which: list[str]) -> float:
            before = server.processor_s()
            server.texts(prompts, which, options.tokens, False)
            return server.processor_s() - before

        plain = [base.name] * len(prompts)
        times = interleaved(options.rounds, {"base": lambda: side(plain), "mixed": lambda: side(chosen)})
        print(
            f"32 requests of 8 adapters, {N_ON_DISK} on disk, {N_RESIDENT} in memory, 8 at once, through HTTP: "
            f"{ratio(times['base'], times['mixed'])} the speed of the base, processor time of the server",
            flush=True,
        )
    finally:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=60)


def bench_ngram(
    model: Transformer,
    tokenizer: Tokenizer,
    random_prompts: Callable[[int, int], list[list[int]]],
    options: argparse.Namespace,
) -> None:
    """Processor time of plain greedy decoding over that with n-gram look-up, equal ids."""
    code = Path(__file__).with_name("decode.py").read_text(encoding="utf-8")[1200:3000]
    edit = f"# The file:\n{code}\n# The same file, `ours` renamed to `model`:\n{code[:60].replace('ours', 'model')}"
    jobs = {
        "a code edit": [tokenizer.encode(edit).tolist()[-model.config.max_seq_len + options.tokens :]],
        "random prompts": random_prompts(1, PROMPT),
        "random prompts, batch 8": random_prompts(8, PROMPT),
        "random prompts, sampled at temperature 1, batch 8": random_prompts(8, PROMPT),
    }
    for name, prompts in jobs.items():
        settings = [
            Sampling(float("sampled" in name), max_new_tokens=options.tokens, seed=i) for i in range(len(prompts))
        ]
        plain, ngram = Decoding(model, prompts, settings), Decoding(model, prompts, settings, ngram=True)
        times = interleaved(options.rounds, {"plain": plain.run, "ngram": ngram.run})
        assert plain.texts == ngram.texts, f"{name}: speculation changed a token"
        print(f"n-gram speculation, {name}: {ratio(times['plain'], times['ngram'])}; {ngram.guesses}", flush=True)


class Decoding:
    """Requests decoded after their prompts were read."""

    def __init__(self, model: Transformer, prompts: list[list[int]], settings: list[Sampling], *, ngram: bool = False):
        self.model, self.prompts, self.settings, self.ngram = model, prompts, settings, ngram
        self.texts: list[list[int]] = []
        self.guesses = ""

    def run(self) -> float:
        """Processor seconds, without those of reading the prompts."""
        engine = Engine(self.model, drafter=NgramDraft() if self.ngram else None)
        rows = {engine.add(p, one): [] for p, one in zip(self.prompts, self.settings, strict=True)}
        for event in engine.step():
            rows[event.request].append(event.token)
        began = time.process_time()
        while engine.n_running:
            for event in engine.step():
                rows[event.request].append(event.token)
        seconds = time.process_time() - began
        self.texts, self.guesses = list(rows.values()), f"{engine.n_accepted} of {engine.n_drafted} guesses right"
        return seconds


def bench_pages(
    model: Transformer, random_prompts: Callable[[int, int], list[list[int]]], options: argparse.Namespace
) -> None:
    """Processor time of decoding with keys and values in rows over that with pages."""
    for n in (1, 8):
        prompts, found = random_prompts(n, PROMPT), []

        def side(cache_bytes: int | None, prompts: list[list[int]] = prompts, found: list = found) -> float:
            engine = Engine(model, cache_bytes=cache_bytes)
            began = time.process_time()
            found.append(run_engine(engine, prompts, [None] * len(prompts), options.tokens))
            return time.process_time() - began

        times = interleaved(options.rounds, {"rows": lambda: side(None), "pages": lambda: side(256 << 20)})
        assert all(one == found[0] for one in found), "pages changed a token"
        print(f"pages, batch {n}: {ratio(times['rows'], times['pages'])} the speed of rows", flush=True)


def bench_prefix(model: Transformer, random_prompts: Callable[[int, int], list[list[int]]], rounds: int) -> None:
    """Processor time of reading 16 prompts that share 500 tokens, an empty cache each time, against none."""
    [shared] = random_prompts(1, 500)
    prompts = [shared + own for own in random_prompts(16, 12)]

    def side(cached: bool) -> float:
        engine = Engine(model, max_batch=16, prefix_cache=PrefixCache(1 << 30) if cached else None)
        began = time.process_time()
        found.append(run_engine(engine, prompts, [None] * 16, 1))
        return time.process_time() - began

    found: list[list[list[int]]] = []
    times = interleaved(rounds, {"without": lambda: side(False), "with": lambda: side(True)})
    assert all(one == found[0] for one in found), "the prefix cache changed a token"
    print(
        f"16 prompts of 500 shared + 12 tokens: {ratio(times['without'], times['with'])} less time to read", flush=True
    )


if __name__ == "__main__":
    main()
