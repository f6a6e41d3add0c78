"""The routes: answers equal to the engine's own, OpenAI's format, and one clear refusal for each kind of bad request."""

import gc
import json
import socket
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("fastapi")

from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.data.chat import encode_prompt
from graft.finetune.serve.app import Limits

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox")
MESSAGES = [{"role": "user", "content": "the cat sat on the mat"}]


@pytest.fixture
def client(live: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as made:
        yield made


def chat(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": "ant", "messages": MESSAGES, "temperature": 0, "max_tokens": 12, **fields}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, whose last line is [DONE]."""
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_health_and_models(client: httpx.Client) -> None:
    """/health answers 200; the base's name is its folder's, the adapters' those of theirs, loaded or not."""
    assert client.get("/health").status_code == 200
    listed = client.get("/v1/models").json()
    assert [(card["id"], card["parent"]) for card in listed["data"]] == [
        ("tiny-base", None),
        *((name, "tiny-base") for name in NAMES),
    ]
    assert client.get("/v1/models/bee").json()["id"] == "bee"
    assert client.get("/v1/models/cow").json()["error"]["code"] == "model_not_found"


def test_an_answer_is_the_engines(client: httpx.Client, alone: Any) -> None:
    """Parity with the bare engine: adapter and base, chat and plain, whole and streamed, with the usage."""
    texts = set()
    for name in ("ant", "bee"):
        expected = alone.text(name, MESSAGES, 12)
        found = chat(client, model=name)
        [choice] = found["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected}
        assert (found["object"], found["model"], choice["finish_reason"]) == ("chat.completion", name, "length")
        n_prompt = len(encode_prompt(MESSAGES, alone.tokenizer, alone.template))
        assert found["usage"] == {"prompt_tokens": n_prompt, "completion_tokens": 12, "total_tokens": n_prompt + 12}
        body = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
        chunks = events(client, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == expected
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], found["usage"])
        texts.add(expected)
    prompt = "the tree stood"
    ids = alone.tokenizer.encode(prompt).tolist()
    plain = alone.tokenizer.decode(alone.ids(None, ids, 8))
    body = {"model": "tiny-base", "prompt": [prompt, ids], "temperature": 0, "max_tokens": 8}
    answer = client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == [plain, plain]
    streamed = events(client, "/v1/completions", {**body, "prompt": prompt})
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == plain
    # A base that learned no conversation gets a single message as plain text, as `graft chat` gives it.
    said = chat(client, model="tiny-base", messages=[{"role": "user", "content": prompt}], max_tokens=8)
    assert said["choices"][0]["message"]["content"] == plain
    assert len(texts) == 2


def test_settings_decide(client: httpx.Client, alone: Any) -> None:
    """seed fixes the text, choice i has seed + i, top_k=1 is greedy, stop cuts before the string and says `stop`."""
    hot = {"temperature": 1.3, "seed": 5, "max_tokens": 10}
    two = [choice["message"]["content"] for choice in chat(client, n=2, **hot)["choices"]]
    again = [chat(client, **{**hot, "seed": seed})["choices"][0]["message"]["content"] for seed in (5, 6)]
    assert two == again
    assert two[0] != two[1]
    greedy = alone.text("ant", MESSAGES, 12)
    assert chat(client, temperature=2.0, top_k=1)["choices"][0]["message"]["content"] == greedy
    for stop in (greedy[4:7], ["zzzz", greedy[2:9]]):
        wanted = stop if isinstance(stop, str) else stop[1]
        [choice] = chat(client, stop=stop)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (greedy[: greedy.find(wanted)], "stop")
        body = {"model": "ant", "messages": MESSAGES, "temperature": 0, "max_tokens": 12, "stop": stop}
        chunks = events(client, "/v1/chat/completions", body)
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == choice["message"]["content"]
    no_content = [
        {"role": "user", "content": [{"type": "text", "text": "the cat sat"}, {"type": "text", "text": " on"}]}
    ]
    assert (
        chat(client, messages=no_content)["choices"]
        == chat(client, messages=[{"role": "user", "content": "the cat sat on"}])["choices"]
    )


def test_log_probabilities(client: httpx.Client, alone: Any) -> None:
    """Parity with log_softmax of the model itself, in both formats; streamed chunks join to the same list."""
    prompt = alone.tokenizer.encode("the sea").tolist()
    body = {"model": "tiny-base", "prompt": "the sea", "temperature": 0, "max_tokens": 4, "logprobs": 3}
    found = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    ids, values = list(prompt), []
    for token in alone.ids(None, prompt, 4):
        with torch.no_grad():
            row = alone.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        values.append(float(row[token]))
        ids.append(token)
    assert found["token_logprobs"] == pytest.approx(values, abs=1e-4)  # float32 sums in another order
    assert all(len(top) == 3 for top in found["top_logprobs"])
    assert found["text_offset"][0] == 0
    asked = {"logprobs": True, "top_logprobs": 2}
    content = chat(client, **asked)["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    for one in content:
        assert one["top_logprobs"][0]["logprob"] == one["logprob"]  # greedy: the chosen one is the likeliest
        assert one["token"].encode() == bytes(one["bytes"]) or "\ufffd" in one["token"]
    plain = {"model": "ant", "messages": MESSAGES, "temperature": 0, "max_tokens": 12, **asked}
    chunks = events(client, "/v1/chat/completions", plain)
    joined = [one for c in chunks if c["choices"][0]["logprobs"] for one in c["choices"][0]["logprobs"]["content"]]
    assert [one["token"] for one in joined] == [one["token"] for one in content]


def test_tools_go_through_the_template(
    served_base: Path, tmp_path: Path, serving: Callable[..., Any], write_adapter: Callable[..., Path]
) -> None:
    """A template that writes tools, calls and results: the prompt's size shows that each arrived, arguments as an object."""
    template = (
        "{% for t in tools or [] %}[tool {{ t.function.name }}]{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}[call {{ c.function.name }} {{ c.function.arguments.city }}]"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    folder = write_adapter(served_base, tmp_path / "tooled", 9)
    (folder / "chat_template.jinja").write_text(template)
    messages = [
        {"role": "user", "content": "how warm is it"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "warmth", "arguments": '{"city": "river"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "wide"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "warmth", "parameters": {}}}]
    tokenizer = Tokenizer.load(served_base)
    text = (
        "[tool warmth]<|im_start|>user\nhow warm is it<|im_end|>\n<|im_start|>assistant\n[call warmth river]<|im_end|>\n"
        "<|im_start|>tool\nwide<|im_end|>\n<|im_start|>assistant\n"
    )
    with serving(served_base, tmp_path) as live, httpx.Client(base_url=live.url, timeout=60) as client:
        found = chat(client, model="tooled", messages=messages, tools=tools)
        # Text is cut at marks before it is encoded, so a few tokens more than the whole string's are possible.
        whole = len(tokenizer.encode(text, allowed_special="all"))
        assert whole <= found["usage"]["prompt_tokens"] <= whole + 12
        fewer = chat(client, model="tooled", messages=messages, tools=tools, tool_choice="none")
        assert fewer["usage"]["prompt_tokens"] < found["usage"]["prompt_tokens"]
        (folder / "chat_template.jinja").write_text("{{ raise_exception('no such talk') }}")


BAD = [
    ({"temperature": "hot"}, "temperature", 'temperature="hot"'),
    ({"temperature": -1}, "temperature", "temperature=-1"),
    ({"temperature": True}, "temperature", "temperature=true"),
    ({"top_p": 0}, "top_p", "top_p=0"),
    ({"top_p": 1.5}, "top_p", "top_p=1.5"),
    ({"top_k": 1.5}, "top_k", "top_k=1.5"),
    ({"min_p": [1]}, "min_p", "min_p=a list"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens=0"),
    ({"max_tokens": 100000}, "max_tokens", "max_tokens=100000"),
    ({"n": 0}, "n", "n=0"),
    ({"n": 99}, "n", "n=99"),
    ({"seed": "x"}, "seed", 'seed="x"'),
    ({"seed": 2**70}, "seed", "seed="),
    ({"stream": "yes"}, "stream", 'stream="yes"'),
    ({"stream_options": 3}, "stream_options", "stream_options=3"),
    ({"stop": 3}, "stop", "stop=3"),
    ({"stop": [""]}, "stop", "stop="),
    ({"stop": [3]}, "stop", "stop="),
    ({"logprobs": 2}, "logprobs", "logprobs=2"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs is not true"),
    ({"top_logprobs": 99, "logprobs": True}, "top_logprobs", "top_logprobs=99"),
    ({"messages": []}, "messages", "at least one message"),
    ({"messages": "hi"}, "messages", 'messages="hi"'),
    ({"messages": [3]}, "messages", "message 0 must be an object"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages", 'role "king"'),
    ({"messages": [{"role": "user", "content": 3}]}, "messages", "content 3"),
    ({"messages": [{"role": "user"}]}, "messages", "message 0 has no content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "other than text"),
    ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, "messages", "tool call"),
    ({"messages": [{"role": "user", "content": "a" * 5000}]}, "messages", "the model reads 512"),
    ({"tools": [3]}, "tools", "must be a list of"),
    ({"tool_choice": "required"}, "tool_choice", 'tool_choice="required"'),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "set by the server itself"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    ({"response_format": {"type": "yaml"}}, "response_format", "must be {type: 'text'}"),
    ({"temprature": 1}, "temprature", "'temprature' is unknown"),
    ({"model": 3}, "model", "model=3"),
    ({"model": None}, "model", "model=null"),
]


@pytest.mark.parametrize(("fields", "param", "part"), BAD, ids=lambda value: str(value)[:30])
def test_a_malformed_field_is_named(client: httpx.Client, fields: dict[str, Any], param: str, part: str) -> None:
    """Every field of a wrong type or range: 400 in OpenAI's shape, with the field and its value."""
    body = {"model": "ant", "messages": MESSAGES, "max_tokens": 3, **fields}
    answer = client.post("/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert part in error["message"], error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"model": NaN}', "NaN is no JSON number"),
        (b"\xff\xfe", "not JSON"),
        (b'{"model": "\\ud800"}', "half of a surrogate pair"),
        (b'{"messages": []}', "the field model is missing"),
        (b'{"model": "ant"}', "the field messages is missing"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_a_malformed_body_is_refused(client: httpx.Client, body: bytes, part: str) -> None:
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert part in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [{"prompt": 3}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [1, "a"]}, {"prompt": [[1.5]]}, {"prompt": [99999]},
     {"prompt": ["a"] * 20}, {"prompt": "a", "logprobs": True}, {"prompt": "a", "echo": 1}],
    ids=str,
)  # fmt: skip
def test_a_malformed_completion_is_refused(client: httpx.Client, fields: dict[str, Any]) -> None:
    answer = client.post("/v1/completions", json={"model": "ant", **fields})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), answer.text


def test_names_never_leave_their_folder(client: httpx.Client, live: Any) -> None:
    """404 with the names there are for an unknown model, however it is spelled, and for unknown routes; 405; 415."""
    for name in ("cow", "", ".", "..", "../adapters", "ant/", "./ant", "/etc/passwd", "ant\x00", "x" * 5000):
        answer = client.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES})
        assert answer.status_code == 404, name
        error = answer.json()["error"]
        assert error["code"] == "model_not_found"
        assert "tiny-base, ant, bee" in error["message"]
        assert len(error["message"]) < 300
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/completions").status_code == 405
    assert client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    changed = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "ant"})
    assert (changed.status_code, "--allow-adapter-changes" in changed.text) == (403, True)


def test_an_adapter_of_another_base_is_a_conflict(
    served_base: Path, tmp_path: Path, serving: Callable[..., Any], write_adapter: Callable[..., Path]
) -> None:
    """409 for weights made for another base, 500 for files that are broken, and the server goes on."""
    write_adapter(served_base, tmp_path / "alien", 1, base_fingerprint="0123456789abcdef")
    write_adapter(served_base, tmp_path / "broken", 1)
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    write_adapter(served_base, tmp_path / "refusing", 2)
    (tmp_path / "refusing" / "chat_template.jinja").write_text("{{ raise_exception('no such talk') }}")
    write_adapter(served_base, tmp_path / "good", 2)
    with serving(served_base, tmp_path) as live, httpx.Client(base_url=live.url, timeout=60) as client:
        for name, status, part in (
            ("alien", 409, "was trained on another base"),
            ("broken", 500, "adapter 'broken' can't be read"),
            ("refusing", 400, "no such talk"),
        ):
            answer = client.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES, "max_tokens": 2})
            assert (answer.status_code, part in answer.text) == (status, True), answer.text
            assert str(tmp_path) not in answer.text
        assert chat(client, model="good")["usage"]["completion_tokens"] == 12


def test_the_key_guards_everything_but_the_page_and_health(served_base: Path, serving: Callable[..., Any]) -> None:
    with (
        serving(served_base, None, api_key="secret") as live,
        httpx.Client(base_url=live.url, timeout=60) as client,
    ):
        assert client.get("/health").status_code == client.get("/").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            for path in ("/v1/models", "/metrics", "/nothing"):
                answer = client.get(path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/v1/models", headers={"authorization": "bearer secret"}).status_code == 200


def test_limits(served_base: Path, serving: Callable[..., Any]) -> None:
    """413 before a large body is read, also without a length; 408 for a slow one; 429 with Retry-After; 504 after the time."""
    limits = Limits(max_queue=1, max_body_bytes=2000, body_timeout_s=0.3, timeout_s=0.5)
    with (
        serving(served_base, None, limits=limits, max_batch=1) as live,
        httpx.Client(base_url=live.url, timeout=60) as client,
    ):
        kind = {"content-type": "application/json"}
        assert client.post("/v1/completions", content=b" " * 3000, headers=kind).status_code == 413
        with socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1])), timeout=10) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {1 << 30}"
            raw.sendall(head.encode() + b"\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 413")  # before the gigabyte is sent
        endless = (b" " * 1000 for _ in range(100))
        assert client.post("/v1/completions", content=endless, headers=kind).status_code == 413

        def slow() -> Iterator[bytes]:
            import time

            yield b"{"
            time.sleep(0.6)
            yield b"}"

        assert client.post("/v1/completions", content=slow(), headers=kind).status_code == 408
        body = {"model": "tiny-base", "prompt": "a", "ignore_eos": True, "max_tokens": 500, "n": 4}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code in (200, 504)  # a fast machine may make it
        api_full = {"model": "tiny-base", "prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json={**api_full, "n": 4}) as first:
            assert first.status_code == 200
            refused = client.post("/v1/completions", json=api_full)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["type"] == "rate_limit_error"
        headers = {f"x-{i}": "y" for i in range(2000)}
        assert client.get("/health", headers=headers).status_code in (200, 400)
        assert client.get("/health").status_code == 200


def test_metrics(client: httpx.Client) -> None:
    """Prometheus' format: every family has its help and type, and the counters count."""
    chat(client)
    text = client.get("/metrics").text
    values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if line[0] != "#"}
    assert values["graft_completion_tokens_total"] >= 12
    assert values['graft_requests_total{route="/v1/chat/completions",status="200"}'] >= 1
    assert values["graft_adapters_loaded"] >= 1
    assert 0 < values["graft_predicted_bytes"] < values["graft_resident_bytes"]
    families = {line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert {name.split("{")[0] for name in values} <= families


def test_a_failing_step_is_told_and_the_server_goes_on(
    served_base: Path, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine raises ends the running requests with 500, a stream with an error event; the next one is answered."""
    body = {"model": "tiny-base", "messages": MESSAGES, "max_tokens": 3}
    with serving(served_base, None) as live, httpx.Client(base_url=live.url, timeout=60) as client:
        for stream in (False, True):

            def fails() -> list[Any]:
                raise ValueError("the model's logits hold NaN")

            monkeypatch.setattr(live.worker.engine, "step", fails)
            answer = client.post("/v1/chat/completions", json={**body, "stream": stream})
            assert answer.status_code == (200 if stream else 500)
            assert "decoding failed: the model's logits hold NaN" in answer.text
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_new_start_holds_one_cache(
    served_base: Path, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: after a failing step the old pages are gone before the new ones come."""
    body = {"model": "tiny-base", "messages": MESSAGES, "max_tokens": 3}
    with (
        serving(served_base, None, cache_bytes=1 << 20) as live,
        httpx.Client(base_url=live.url, timeout=60) as client,
    ):
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        model, old = live.worker.model, weakref.ref(live.worker.engine._pool)
        make, alive = model.new_pages, []

        def watched(n_bytes: int) -> Any:
            gc.collect()
            alive.append(old() is not None)
            return make(n_bytes)

        def fails() -> list[Any]:
            raise ValueError("the model's logits hold NaN")

        monkeypatch.setattr(model, "new_pages", watched)
        monkeypatch.setattr(live.worker.engine, "step", fails)
        assert client.post("/v1/chat/completions", json=body).status_code == 500
        assert alive == [False]
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_a_grammar_that_gives_up_fails_its_answer_alone(
    client: httpx.Client, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is told why with 500; the engine goes on, and so does what it keeps."""
    pytest.importorskip("llguidance")

    def gives_up(self: object, token: int) -> None:
        raise ValueError("the JSON grammar failed: too many states")

    monkeypatch.setattr("graft.base.generate.json_grammar.JsonMatcher.advance", gives_up)
    body = {"model": "ant", "messages": MESSAGES, "max_tokens": 9, "temperature": 0}
    answer = client.post("/v1/chat/completions", json={**body, "response_format": {"type": "json_object"}})
    assert answer.status_code == 500
    assert "too many states" in answer.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == alone.text(
        "ant", MESSAGES, 9
    )
