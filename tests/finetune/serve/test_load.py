"""Many clients at once: mixed adapters, clients that vanish, adapters replaced meanwhile. No answer may be wrong."""

import asyncio
import gc
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from graft.base.generate.engine import Request
from graft.finetune.adapters.lora import LowRank
from graft.finetune.serve.worker import Job

NAMES = (None, "ant", "bee", "cat", "dog", "eel")
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "birds", "while", "rivers", "run", "to", "seas"]


def live_objects() -> int:
    """Adapters' matrices, jobs and requests that something still refers to."""
    gc.collect()
    return sum(type(one) in (LowRank, Job, Request) for one in gc.get_objects())


def conversation(seed: int) -> list[dict[str, Any]]:
    """Messages of which some begin alike and some don't; two turns, so that the base uses the template too."""
    chosen = random.Random(seed)
    shared = "the tree stood by the river where birds drink " * (seed % 3)
    user = shared + " ".join(chosen.choices(WORDS, k=chosen.randint(1, 12)))
    return [{"role": "system", "content": "a bird sang"}, {"role": "user", "content": user}]


@pytest.mark.slow
def test_mixed_requests_are_each_alone_and_leave_nothing(
    served_base: Path, adapters_dir: Path, alone: Any, serving: Callable[..., Any], until: Callable[..., None]
) -> None:
    """Law: 100 requests, 20 at once, over the base and five adapters of which three are kept in memory, a fifth of the
    clients leaving early: every whole answer is the greedy answer of the bare engine, and nothing is left behind."""
    jobs = [(NAMES[i % 6], conversation(i), 4 + i % 17) for i in range(100)]
    expected = [alone.text(name, messages, n) for name, messages, n in jobs]
    # A cache of a few prompts only, so that blocks go and come.
    with serving(served_base, adapters_dir, max_loaded=3, prefix_cache_bytes=60_000) as live:

        async def one(client: httpx.AsyncClient, i: int) -> str | None:
            name, messages, n = jobs[i]
            body = {"model": name or "tiny-base", "messages": messages, "temperature": 0, "max_tokens": n}
            if i % 5 == 3:  # goes after the first bytes
                async with client.stream(
                    "POST", "/v1/chat/completions", json={**body, "stream": True, "max_tokens": 300, "ignore_eos": True}
                ) as answer:
                    assert answer.status_code == 200
                    async for _ in answer.aiter_bytes():
                        break
                return None
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["message"]["content"]

        async def all_of_them() -> list[str | None]:
            places = asyncio.Semaphore(20)

            async def placed(client: httpx.AsyncClient, i: int) -> str | None:
                async with places:
                    return await one(client, i)

            async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:
                return await asyncio.gather(*(placed(client, i) for i in range(100)))

        def idle() -> bool:
            engine = live.worker.engine
            return not (engine.n_running or engine.n_waiting or live.worker._jobs or live.models.bank.registry.users)

        counts = []
        for _ in range(2):
            found = asyncio.run(all_of_them())
            until(idle)
            wrong = [i for i in range(100) if found[i] is not None and found[i] != expected[i]]
            assert not wrong, [(i, jobs[i], found[i], expected[i]) for i in wrong[:2]]
            assert sum(text is None for text in found) == 20
            live.models.sweep()
            assert live.models.n_loaded == 3
            assert live.worker.prefix_cache.n_bytes <= 60_000
            counts.append(live_objects())
        assert counts[0] == counts[1]  # the second hundred left no more than the first
        metrics = live.app.metrics
        assert metrics.n_cancelled == 40


@pytest.mark.slow
def test_an_adapter_replaced_under_load(
    served_base: Path,
    tmp_path: Path,
    serving: Callable[..., Any],
    write_adapter: Callable[..., Path],
    until: Callable[..., None],
) -> None:
    """Law: each answer is the old version's or the new one's, whole; after the replacement only the new one's, also where a
    prompt is in the prefix cache from before; other answers wait for nothing. An unloaded name is unknown."""
    for version in (1, 2):
        write_adapter(served_base, tmp_path / f"v{version}", version)
    messages = conversation(2)
    fields = {"messages": messages, "temperature": 0, "max_tokens": 40, "ignore_eos": True}
    with serving(served_base, tmp_path, prefix_cache_bytes=0) as live:  # without a cache that could mix the two up
        old, new = (
            httpx.post(f"{live.url}/v1/chat/completions", json={"model": name, **fields}, timeout=120).json()[
                "choices"
            ][0]["message"]["content"]
            for name in ("v1", "v2")
        )
    assert old != new
    with serving(served_base, tmp_path, allow_adapter_changes=True) as live:

        async def run() -> None:
            async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:

                async def ask(model: str) -> str:
                    answer = await client.post("/v1/chat/completions", json={"model": model, **fields})
                    assert answer.status_code == 200, answer.text
                    return answer.json()["choices"][0]["message"]["content"]

                async def load(path: str, inplace: bool) -> httpx.Response:
                    body = {"lora_name": "x", "lora_path": path, "load_inplace": inplace}
                    return await client.post("/v1/load_lora_adapter", json=body)

                assert (await ask("v1"), await ask("v2")) == (old, new)
                assert (await load("v1", False)).status_code == 200
                refused = await load("v2", False)
                assert (refused.status_code, "load_inplace" in refused.text) == (400, True)
                assert await ask("x") == old  # its prompt is now in the prefix cache, under the weights' hash
                running = [asyncio.create_task(ask("x")) for _ in range(6)]
                await asyncio.sleep(0.02)
                assert (await load("v2", True)).status_code == 200
                later = await asyncio.gather(*(ask("x") for _ in range(6)))
                assert set(later) == {new}
                assert set(await asyncio.gather(*running)) <= {old, new}
                for path in ("..", "../..", "/etc", "nothing", "v1/../..", "v1\0"):
                    outside = await load(path, True)
                    assert (outside.status_code, "names no adapter" in outside.text) == (400, True), path
                assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "x"})).status_code == 200
                gone = await client.post("/v1/chat/completions", json={"model": "x", "messages": messages})
                assert gone.status_code == 404
                base = await client.post("/v1/unload_lora_adapter", json={"lora_name": "tiny-base"})
                assert base.status_code in (400, 404)

        asyncio.run(run())
        until(lambda: live.models.n_loaded == 2)  # v1 and v2 themselves


@pytest.mark.slow
def test_two_hundred_adapters_on_disk(
    served_base: Path, adapters_dir: Path, alone: Any, serving: Callable[..., Any], tmp_path: Path
) -> None:
    """Law: of 200 adapters on disk, 40 of them used, five stay in memory; each answers as itself, and the bytes of adapters
    are those of five."""
    for i in range(200):
        shutil.copytree(adapters_dir / str(NAMES[1 + i % 5]), tmp_path / f"a{i:03}")
    messages = conversation(4)
    expected = {name: alone.text(name, messages, 10) for name in NAMES[1:]}
    assert len(set(expected.values())) >= 4
    fields = {"messages": messages, "temperature": 0, "max_tokens": 10}
    with serving(served_base, tmp_path, max_loaded=5) as live, httpx.Client(base_url=live.url, timeout=60) as client:
        assert len(client.get("/v1/models").json()["data"]) == 201
        sizes = set()
        for i in range(0, 200, 5):
            i, name = i + i // 5 % 5, NAMES[1 + i // 5 % 5]
            answer = client.post("/v1/chat/completions", json={"model": f"a{i:03}", **fields})
            assert answer.json()["choices"][0]["message"]["content"] == expected[name], i
            if i >= 10:
                live.worker.models.sweep()
                sizes.add(sum(adapter.n_bytes for adapter in list(live.models.bank.adapters.values())))
        assert live.models.n_loaded == 5
        one = next(iter(live.models.bank.adapters.values())).n_bytes
        assert max(sizes) <= 6 * one  # five, and a sixth on its way out
