"""Clients that others wrote, against the live server."""

from typing import Any

import pytest

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
