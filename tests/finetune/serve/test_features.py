"""JSON answers, speculation, pages, priorities and votes through the API: equal to the bare engine's, or valid by themselves."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("fastapi")

from graft.base.generate.json_grammar import JsonGrammar
from graft.base.generate.scoring import text_logprobs
from graft.base.generate.speculative import ModelDraft, NgramDraft
from graft.finetune.loading import load_model, weight_bytes
from graft.finetune.serve.battles import Arena

MESSAGES = [{"role": "user", "content": "the cat sat on the mat"}]
SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["spam", "ham"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["label", "n"],
    "additionalProperties": False,
}


def post(url: str, **fields: Any) -> httpx.Response:
    body = {"model": "ant", "messages": MESSAGES, "max_tokens": 60, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_response_format(live: Any) -> None:
    """Answers are JSON of the schema, whole and streamed, chat and plain; what can't be is refused in one line."""
    pytest.importorskip("llguidance")
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        [choice] = post(live.url, response_format=wanted, seed=seed).json()["choices"]
        found = json.loads(choice["message"]["content"])
        assert found["label"] in ("spam", "ham")
        assert found["n"] in range(10)
        assert choice["finish_reason"] == "stop"
    body = {"model": "tiny-base", "prompt": "a", "max_tokens": 60, "response_format": wanted}
    assert "label" in json.loads(
        httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    )
    started = post(live.url, response_format={"type": "json_object"}, max_tokens=5).json()["choices"][0]
    assert started["message"]["content"].startswith("{")
    assert post(live.url, response_format={"type": "text"}, temperature=0).status_code == 200
    for given, part in (
        ({"type": "xml"}, "must be {type: 'text'}"),
        ({"type": "json_schema"}, "json_schema must be {name, schema: an object}"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}, "the JSON schema can't be used"),
    ):
        refused = post(live.url, response_format=given)
        assert refused.status_code == 400
        assert part in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"] == "response_format"
    assert post(live.url, response_format=wanted, ignore_eos=True).status_code == 400
    assert post(live.url, priority=5000).status_code == 400


def test_a_schema_is_prepared_off_the_event_loop(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a schema's first use, which takes a while, happens in the thread for text: the event loop serves others meanwhile."""
    pytest.importorskip("llguidance")
    threads = []

    def watched(*args: Any, **options: Any) -> JsonGrammar:
        threads.append(threading.current_thread().name)
        return JsonGrammar(*args, **options)

    monkeypatch.setattr("graft.finetune.serve.app.JsonGrammar", watched)
    schema = {"type": "object", "properties": {"seen": {"type": "boolean"}}, "required": ["seen"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert post(live.url, response_format=wanted).status_code == 200
    assert len(threads) == 1
    assert threads[0].startswith("text")


def test_a_draft_model_counts_as_memory(served_base: Path, serving: Callable[..., Any]) -> None:
    """Law: graft_predicted_bytes grows by the draft model's weights."""

    def predicted(url: str) -> float:
        lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
        return float(next(line for line in lines if line.startswith("graft_predicted_bytes ")).split(" ")[1])

    draft = load_model(served_base)
    with serving(served_base, None) as live:
        without = predicted(live.url)
    with serving(served_base, None, drafter=ModelDraft(draft, vocab_size=draft.config.vocab_size)) as live:
        assert predicted(live.url) - without == weight_bytes(draft)


def test_speculation_in_pages_changes_no_answer(
    served_base: Path, adapters_dir: Path, alone: Any, serving: Callable[..., Any]
) -> None:
    """Law: with guesses and with pages that run out, twelve answers at once over three adapters are the bare engine's, stop
    strings within accepted guesses included; the figures show that both were used."""
    names = [None, "ant", "bee", "cat"] * 3
    jobs = [[{"role": "system", "content": "a bird"}, {"role": "user", "content": "the tree stood " * (1 + i)}]
            for i in range(12)]  # fmt: skip
    expected = [alone.text(name, messages, 60) for name, messages in zip(names, jobs, strict=True)]
    page = 2 * 2 * 32 * 16 * 4 * 2
    with serving(served_base, adapters_dir, drafter=NgramDraft(), cache_bytes=9 * page, max_batch=6) as live:

        async def run(**more: Any) -> list[str]:
            async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:

                async def one(name: str | None, messages: list[dict[str, str]]) -> str:
                    body = {"model": name or "tiny-base", "messages": messages, "temperature": 0, "max_tokens": 60}
                    answer = await client.post("/v1/chat/completions", json={**body, **more})
                    assert answer.status_code == 200, answer.text
                    return answer.json()["choices"][0]["message"]["content"]

                return await asyncio.gather(*(one(*job) for job in zip(names, jobs, strict=True)))

        assert asyncio.run(run()) == expected
        stop = expected[5][20:24]
        cut = [text.partition(stop)[0] for text in expected]
        assert asyncio.run(run(stop=stop, priority=-3)) == cut
        metrics = httpx.get(f"{live.url}/metrics").text
        figures = {line.split(" ")[0]: float(line.split(" ")[1]) for line in metrics.splitlines() if line[0] != "#"}
    assert figures["graft_preempted_total"] > 0
    assert figures["graft_drafted_tokens_total"] >= figures["graft_accepted_tokens_total"] > 0


def test_votes_are_lines_on_disk(
    served_base: Path, adapters_dir: Path, serving: Callable[..., Any], tmp_path: Path
) -> None:
    """A vote is one JSON line; an unfinished line of a killed server is closed; bad ones are refused; no folder, no route."""
    (tmp_path / "battles.jsonl").write_text('{"a": "x", "b": "y", "winner": "tie"}\n{"a": "cut', encoding="utf-8")
    fields = {"a": "ant", "b": "tiny-base", "winner": "b", "prompt": "größe?", "answer_a": "1", "answer_b": "2\n"}
    with serving(served_base, adapters_dir, arena=Arena(tmp_path)) as live:
        url = f"{live.url}/arena/battles"
        assert httpx.get(url).json() == {"n_battles": 2}
        assert httpx.post(url, json=fields).json() == {"n_battles": 3}
        for change, status in (({"winner": "c"}, 400), ({"b": "cow"}, 404), ({"b": "ant"}, 400), ({"x": 1}, 400)):
            assert httpx.post(url, json={**fields, **change}).status_code == status
    lines = (tmp_path / "battles.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines[1] == '{"a": "cut'
    written = json.loads(lines[2])
    assert {name: written[name] for name in fields} == fields
    assert lines[3:] == [""]
    with serving(served_base, None) as live:
        assert httpx.post(f"{live.url}/arena/battles", json=fields).status_code == 404


def test_echo_is_the_prompt_and_its_probabilities(live: Any, alone: Any) -> None:
    """Parity with the full forward pass, for an adapter: the first token has no figure, the answer follows, spellings add up to
    the text. With a stream it is refused."""
    ids = alone.tokenizer.encode("the tree stood by").tolist()
    body = {
        "model": "ant",
        "prompt": [ids, "a bird"],
        "echo": True,
        "logprobs": 2,
        "max_tokens": 3,
        "temperature": 0,
        "n": 1,
    }
    [choice, other] = httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).json()["choices"]
    expected = text_logprobs(alone.model, ids, 2, adapter="ant")
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is expected[0] is logprobs["top_logprobs"][0] is None
    for i, one in enumerate(expected[1:], 1):
        assert one is not None
        assert logprobs["token_logprobs"][i] == pytest.approx(one.logprob, abs=1e-3)
    assert len(logprobs["token_logprobs"]) == len(ids) + 3
    assert choice["text"] == alone.tokenizer.decode([*ids, *alone.ids("ant", ids, 3)])
    assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:i])) for i in range(len(ids) + 3)]
    assert other["text"].startswith("a bird")
    refused = httpx.post(f"{live.url}/v1/completions", json={**body, "stream": True}, timeout=60)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")
    plain = httpx.post(f"{live.url}/v1/completions", json={**body, "logprobs": None}, timeout=60).json()["choices"][0]
    assert (plain["text"], plain["logprobs"]) == (choice["text"], None)
    with torch.no_grad(), alone.bank.rows(["ant"]):
        full = alone.model(torch.tensor([ids]))[0].log_softmax(-1)
    assert expected[-1].logprob == pytest.approx(float(full[-2, ids[-1]]), abs=1e-4)
    with pytest.raises(ValueError, match="the text has 0 tokens"):
        text_logprobs(alone.model, [], 0)


def test_a_small_cache_bounds_the_answers(served_base: Path, serving: Callable[..., Any]) -> None:
    """With fewer pages than the model reads tokens an answer without max_tokens ends where the pages do; what can't fit is
    the client's error, and the figures count all pages once."""
    page = 2 * 2 * 32 * 16 * 4 * 2
    with serving(served_base, None, cache_bytes=6 * page) as live:
        [card] = httpx.get(f"{live.url}/v1/models").json()["data"]
        assert card["max_model_len"] == 4 * 32
        messages = [{"role": "user", "content": "the cat"}]
        answer = httpx.post(
            f"{live.url}/v1/chat/completions", json={"model": "tiny-base", "messages": messages, "ignore_eos": True}
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["total_tokens"] == 4 * 32
        for prompt, n in (([5] * 120, 9), ([5] * 128, 1)):
            body = {"model": "tiny-base", "prompt": prompt, "max_tokens": n}
            refused = httpx.post(f"{live.url}/v1/completions", json=body)
            assert refused.status_code == 400
            assert "the key-value cache (--cache-mib) holds 128" in refused.json()["error"]["message"]
        lines = httpx.get(f"{live.url}/metrics").text.splitlines()
        figures = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line[0] != "#"}
        assert figures["graft_prefix_cache_bytes"] > 0
        assert figures["graft_cache_bytes"] == 6 * page
        assert figures["graft_predicted_bytes"] == figures["graft_weights_bytes"] + 6 * page
    with pytest.raises(ValueError, match="less than two pages"), serving(served_base, None, cache_bytes=2 * page):
        pass


def test_a_vote_that_can_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is told, and the next vote is a line of its own."""
    arena = Arena(tmp_path)
    arena.write({"a": "x"})

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            arena.write({"a": "y"})
    arena.write({"a": "z"})
    lines = (tmp_path / "battles.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["a"] for line in lines] == ["x", "z"]
    assert arena.n_battles == 2
