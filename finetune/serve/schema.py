"""Requests in OpenAI's format, checked field by field; an answer's JSON in the same format.

Everything that a request names is either done or refused: an unknown field, or one that this server can't honour with a
value other than its neutral one, is an error and is never ignored.
"""

import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ...base.generate.engine import TokenLogprob
from ...base.tokenizer.tokenizer import Tokenizer
from ..data.records import ROLES, Message
from .errors import ApiError

MAX_CHOICES = 16  # n, and n times the prompts of a completion request
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1000
MAX_LOGPROBS = 20  # OpenAI's limit of top_logprobs
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions

# Accepted only with these values, which ask for nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},), "best_of": (1,),
    "suffix": ("",), "parallel_tool_calls": (True, False), "functions": ([],),
    "modalities": (["text"],),
}  # fmt: skip
# Notes to a service that say nothing about the answer.
NOTES = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity")


def _neutral(data: Any) -> Any:
    """Take out the fields of NEUTRAL and NOTES; raise for one that asks for what this server can't do."""
    if not isinstance(data, dict):
        raise ValueError("the body must be a JSON object")
    kept = {}
    for name, value in data.items():
        if name in NOTES:
            continue
        if name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                raise ApiError(400, f"{name}={_shown(value)} is not supported here; leave it out", param=name)
            continue
        kept[name] = value
    return kept


def _stop(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


def _prompt(value: object) -> object:
    """A string, strings, ids or lists of ids -> a list of strings and lists of ids."""
    ids = isinstance(value, list) and bool(value) and all(type(one) is int for one in value)
    prompts = value if isinstance(value, list) and not ids else [value]
    for prompt in prompts:
        is_ids = isinstance(prompt, list) and bool(prompt) and all(type(one) is int for one in prompt)
        if not isinstance(prompt, str) and not is_ids:
            raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    if not prompts:
        raise ValueError("must hold at least one prompt")
    return prompts


def _messages(value: object) -> object:
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of at least one message")
    return [_message(message, f"message {i}") for i, message in enumerate(value)]


def _message(value: object, where: str) -> Message:
    """A message as chat templates expect it: text parts joined, a tool call's arguments as an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object with role and content")
    message: dict[str, Any] = {name: field for name, field in value.items() if field is not None}
    if message.get("role") not in ROLES:
        raise ValueError(f"{where} has role {_shown(value.get('role'))}; choose one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{where} has a content part other than text: {_shown(part)}")
        message["content"] = "".join(part["text"] for part in content)
    elif content is None:
        if not message.get("tool_calls"):
            raise ValueError(f"{where} has no content")
        message["content"] = ""
    elif not isinstance(content, str):
        raise ValueError(f"{where} has content {_shown(content)}; it must be a string or a list of text parts")
    if (calls := message.get("tool_calls")) is not None:
        if not isinstance(calls, list):
            raise ValueError(f"{where} has tool_calls {_shown(calls)}; it must be a list")
        message["tool_calls"] = [_tool_call(call, where) for call in calls]
    return message


def _tool_call(call: object, where: str) -> dict[str, object]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} has a tool call that is not {{id, type, function: {{name, arguments}}}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"{where} has a tool call whose arguments are not a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(value: object) -> object:
    for tool in value if isinstance(value, list) else [None]:
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise ValueError("must be a list of {type: 'function', function: {name, description, parameters}}")
    return value


def _template_args(value: object) -> object:
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        if isinstance(value, dict) and name in value:
            raise ValueError(f"the template argument {name!r} is set by the server itself")
    return value


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


def _response_format(value: object) -> object:
    """OpenAI's three kinds -> the schema, None for plain text."""
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("text", "json_object", "json_schema"):
        raise ValueError(
            "must be {type: 'text'}, {type: 'json_object'} or {type: 'json_schema', json_schema: {schema}}"
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise ValueError("json_schema must be {name, schema: an object}")
    return schema


class Common(BaseModel):
    """What both kinds of request have. None is always the default."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None  # OpenAI's default: 1
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # 0 and -1: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[str], BeforeValidator(_stop)] | None = None
    # The schema that the answer must be JSON of.
    response_format: Annotated[dict[str, Any] | None, BeforeValidator(_response_format)] = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None  # vLLM's: the lowest number is answered first
    ignore_eos: bool | None = None  # vLLM's: go on past the end of the text, for measurements


class ChatRequest(Common):
    """`/v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], BeforeValidator(_messages)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], BeforeValidator(_tools)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    # vLLM's: arguments of the chat template
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_template_args)] | None = None


class CompletionRequest(Common):
    """`/v1/completions`."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompt)]
    echo: bool | None = None  # begin with the prompt, and with its log-probabilities where those are asked for
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class LoadRequest(BaseModel):
    """`/v1/load_lora_adapter`, vLLM's."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    lora_path: str
    load_inplace: bool | None = None  # replace an adapter of that name


class BattleRequest(BaseModel):
    """`/arena/battles`, this server's own: which of two answers is better."""

    model_config = ConfigDict(extra="forbid", strict=True)
    a: str  # the models
    b: str
    winner: Literal["a", "b", "tie"]
    prompt: Annotated[str, Field(max_length=100_000)]
    answer_a: Annotated[str, Field(max_length=100_000)]
    answer_b: Annotated[str, Field(max_length=100_000)]


class UnloadRequest(BaseModel):
    """`/v1/unload_lora_adapter`, vLLM's."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    lora_int_id: int | None = None


Kind = TypeVar("Kind", bound=BaseModel)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """A request from its body. Raises ApiError 400 that names the field, its value and what is expected."""
    try:
        data = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if b"\\u" in body:
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, f"the body has half of a surrogate pair, {error.object[error.start]!a}") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, got {_shown(data)}")
    try:
        return kind.model_validate(_neutral(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        names = [str(part) for part in first["loc"] if isinstance(part, int) or part in _names(kind)]
        param = ".".join(names) or str(first["loc"][0])
        if first["type"] == "missing":
            message = f"the field {param} is missing"
        elif first["type"] == "extra_forbidden":
            param = str(first["loc"][-1])
            message = f"the field {param[:60]!r} is unknown here; known are {', '.join(sorted(_names(kind)))}"
        else:
            message = f"{param}={_shown(first['input'])}: {first['msg'].removeprefix('Value error, ')}"
        raise ApiError(400, message, param=param[:60]) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def _names(kind: type[BaseModel]) -> set[str]:
    return {*kind.model_fields, *StreamOptions.model_fields}


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _shown(value: object) -> str:
    """A value in a message: short, whatever the client sent."""
    text = json.dumps(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- answers -------------------------------------------------------------------------------------------------------


class Format:
    """One request's answers as JSON: whole, or as chunks of a stream."""

    def __init__(self, *, answer_id: str, model: str, chat: bool, tokenizer: Tokenizer) -> None:
        self.chat, self.tokenizer = chat, tokenizer
        whole, chunk = ("chat.completion", "chat.completion.chunk") if chat else ("text_completion",) * 2
        common = {"created": int(time.time()), "model": model}
        self._whole = {"id": answer_id, "object": whole, **common}
        self._chunk = {"id": answer_id, "object": chunk, **common}

    def whole(self, choices: Sequence[dict[str, object]], usage: dict[str, object]) -> dict[str, object]:
        """A complete answer."""
        return {**self._whole, "choices": list(choices), "usage": usage}

    def choice(
        self, index: int, text: str, finished: str, logprobs: Sequence[tuple[int, TokenLogprob | None]] | None
    ) -> dict[str, object]:
        """One choice of a complete answer."""
        shown = None if logprobs is None else self._logprobs(logprobs, 0)
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": shown, "finish_reason": finished}

    def first_chunk(self, index: int) -> bytes:
        """A chat stream begins with the role."""
        delta = {"role": "assistant", "content": ""}
        return self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(
        self,
        index: int,
        text: str,
        finished: str | None,
        logprobs: Sequence[tuple[int, TokenLogprob]] | None,
        offset: int,  # characters of this choice before the chunk
    ) -> bytes:
        """A piece of a stream."""
        shown = None if logprobs is None else self._logprobs(logprobs, offset)
        content = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return self._event([{"index": index, **content, "logprobs": shown, "finish_reason": finished}])

    def usage_chunk(self, usage: dict[str, object]) -> bytes:
        """The stream's last chunk, where the client asked for the usage."""
        return f"data: {json.dumps({**self._chunk, 'choices': [], 'usage': usage})}\n\n".encode()

    def _event(self, choices: list[dict[str, object]]) -> bytes:
        return f"data: {json.dumps({**self._chunk, 'choices': choices})}\n\n".encode()

    def _logprobs(self, tokens: Sequence[tuple[int, TokenLogprob | None]], offset: int) -> dict[str, object]:
        """None in place of the figures: a prompt's first token."""
        if self.chat:
            return {
                "content": [
                    {**self._token(index, found.logprob), "top_logprobs": [self._token(*one) for one in found.top]}
                    for index, found in tokens
                    if found is not None
                ]
            }
        offsets = []
        for index, _ in tokens:
            offsets.append(offset)
            offset += len(self._spelling(index))
        return {
            "tokens": [self._spelling(index) for index, _ in tokens],
            "token_logprobs": [found and found.logprob for _, found in tokens],
            "top_logprobs": [found and {self._spelling(i): value for i, value in found.top} for _, found in tokens],
            "text_offset": offsets,
        }

    def _token(self, index: int, logprob: float) -> dict[str, object]:
        spelled = self.tokenizer.vocab.get(index, b"")
        return {"token": spelled.decode(errors="replace"), "logprob": logprob, "bytes": list(spelled)}

    def _spelling(self, index: int) -> str:
        return self.tokenizer.vocab.get(index, b"").decode(errors="replace")


def usage(n_prompt: int, n_completion: int) -> dict[str, object]:
    """Tokens of a request."""
    return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}
