"""Clients that others wrote, against the live server."""

import json
import shutil
import subprocess
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

MESSAGES: list[Any] = [{"role": "user", "content": "the sea is wide"}]


def test_the_openai_package(live: Any, alone: Any) -> None:
    """Parity with the bare engine through openai's own types: whole, streamed, logprobs, completions, errors."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        assert "bee" in [model.id for model in client.models.list()]
        expected = alone.text("bee", MESSAGES, 10)
        common: dict[str, Any] = {"model": "bee", "messages": MESSAGES, "temperature": 0, "max_tokens": 10}
        whole = client.chat.completions.create(**common, logprobs=True, top_logprobs=2)
        assert whole.choices[0].message.content == expected
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 10
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [len(one.top_logprobs) for one in logprobs.content] == [2] * 10
        stream = client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
        assert chunks[-1].usage == whole.usage
        ids = alone.tokenizer.encode("a bird").tolist()
        done = client.completions.create(model="tiny-base", prompt="a bird", temperature=0, max_tokens=6)
        assert done.choices[0].text == alone.tokenizer.decode(alone.ids(None, ids, 6))
        with pytest.raises(openai.NotFoundError, match="does not exist; there are tiny-base"):
            client.chat.completions.create(**{**common, "model": "cow"})
        with pytest.raises(openai.BadRequestError, match="top_p=3"):
            client.chat.completions.create(**common, top_p=3)


@pytest.mark.filterwarnings("ignore")  # litellm's own, at import and in use
def test_litellm(live: Any, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity with the bare engine through litellm: whole and streamed."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it looks for prices on the network
    litellm = pytest.importorskip("litellm")
    common: dict[str, Any] = {"model": "openai/bee", "messages": MESSAGES, "temperature": 0, "max_tokens": 10,
                              "api_base": f"{live.url}/v1", "api_key": "none"}  # fmt: skip
    expected = alone.text("bee", MESSAGES, 10)
    assert litellm.completion(**common).choices[0].message.content == expected
    chunks = litellm.completion(**common, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_langchain(live: Any, alone: Any) -> None:
    """Parity with the bare engine through LangChain's ChatOpenAI: invoke and stream."""
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(
        model="bee", base_url=f"{live.url}/v1", api_key="none", temperature=0, max_tokens=10, max_retries=0
    )
    expected = alone.text("bee", MESSAGES, 10)
    assert chat.invoke([("user", MESSAGES[0]["content"])]).content == expected
    assert "".join(piece.content for piece in chat.stream([("user", MESSAGES[0]["content"])])) == expected


def test_curl(live: Any, alone: Any) -> None:
    """The command that every API's documentation shows."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl on this machine")
    body = json.dumps({"model": "bee", "messages": MESSAGES, "temperature": 0, "max_tokens": 10})
    url = f"{live.url}/v1/chat/completions"
    command = [curl, "-sS", "--noproxy", "*", url, "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == alone.text("bee", MESSAGES, 10)


def test_lm_evaluation_harness(live: Any, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """local-completions: a generated answer is the engine's, and a log-likelihood (echo, on token ids) is that of the model's
    full forward pass, with whether it is greedy."""
    models = pytest.importorskip("lm_eval.models.openai_completions")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    client = models.LocalCompletionsAPI(
        base_url=f"{live.url}/v1/completions", model="tiny-base", tokenizer_backend=None, max_length=512, max_retries=1
    )
    request = Instance("generate_until", {}, ("a bird", {"until": ["zzz"], "max_gen_toks": 6, "temperature": 0}), 0)
    [answer] = client.generate_until([request], disable_tqdm=True)
    ids = alone.tokenizer.encode("a bird").tolist()
    greedy = alone.ids(None, ids, 6)
    assert answer == alone.tokenizer.decode(greedy)
    client.tokenized_requests = True
    for continuation, is_greedy in ((greedy[:3], True), ([7, 8], False)):
        text = ids + continuation
        answer = client.model_call(messages=[text], generate=False)
        [(found, was_greedy)] = client.parse_logprobs(answer, ctxlens=[len(ids)])
        with torch.no_grad():
            logprobs = alone.model(torch.tensor([text]))[0].log_softmax(-1)
        expected = sum(float(logprobs[len(ids) + i - 1, token]) for i, token in enumerate(continuation))
        assert found == pytest.approx(expected, abs=1e-3)  # float32 sums in another order
        assert was_greedy == is_greedy
