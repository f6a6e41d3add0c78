"""Chat templates, rendered as transformers' `apply_chat_template` does, within bounds on time and memory (sandbox.py)."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2

from ...base.tokenizer.tokenizer import Tokenizer
from .marks import LEARN_OFF, LEARN_ON, hide, map_strings, show, without_learn
from .messages import REASONING, Message
from .sandbox import MAX_CHARACTERS, MAX_SOURCE, BoundedEnvironment, TemplateLimitError
from .templates import CHATML, PLAIN

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


class ChatTemplate:
    """A jinja chat template with its arguments, such as {"enable_thinking": False}.

    Raises ValueError when the source is not jinja, or an argument has a name that is taken.
    """

    def __init__(
        self,
        source: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        *,
        args: Mapping[str, Any] | None = None,
    ):
        self.source, self.bos_token, self.eos_token, self.args = source, bos_token, eos_token, dict(args or {})
        if taken := [name for name in self.args if name in _RESERVED]:
            raise ValueError(f"template argument {taken[0]!r} is set by graft itself; leave it out")
        if len(source) > MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source):,} characters, the limit is {MAX_SOURCE:,}")
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        self._environment = BoundedEnvironment(lambda text: f"{LEARN_ON}{text}{LEARN_OFF}")
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not jinja: {error.message} in line {error.lineno}") from None
        except Exception as error:  # a foreign program: compiling it may fail in any way
            raise ValueError(f"the chat template does not compile: {_reason(error)}; fix or replace it") from None
        self.has_generation_tags = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, source: str | None = None, *, args: Mapping[str, Any] | None = None
    ) -> "ChatTemplate":
        """`source` (an adapter's), else the tokenizer's own; without one, CHATML where it has the tokens, else PLAIN."""
        source = source or tokenizer.chat_template
        if source is None:
            source = CHATML if {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens.keys() else PLAIN
        tokens = (spelling(tokenizer, tokenizer.bos_token_id), spelling(tokenizer, tokenizer.eos_token_id))
        return cls(source, *tokens, args=args)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict] | None = None,
        add_generation_prompt: bool = False,
        args: Mapping[str, Any] | None = None,  # a row's own chat_template_kwargs; they win over the template's
    ) -> str:
        """The text, character for character transformers'. Raises ValueError when the template refuses the messages."""
        hidden = [map_strings(message, hide) for message in messages]
        marked = self.render_marked(hidden, map_strings(tools, hide), add_generation_prompt, args)
        return show(without_learn(marked))

    def render_marked(
        self,
        messages: Sequence[object],
        tools: object,
        add_generation_prompt: bool,
        args: Mapping[str, Any] | None = None,
    ) -> str:
        """`render` with the marks left in; strings must come through `hide` or `guard`."""
        values = {"documents": None, **self._tokens, **self.args, **(args or {})}
        turns = [_with_reasoning(m) for m in messages]
        turns = [_as_parts(m) for m in turns] if self.wants_parts else turns
        return self._run(turns, values | {"tools": tools, "add_generation_prompt": add_generation_prompt})

    @cached_property
    def reasoning_name(self) -> str | None:
        """Which of the keys for reasoning the template names; None when it knows none of them."""
        return next((name for name in REASONING if re.search(rf"(?:\.|['\"]){name}\b", self.source)), None)

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the template writes content given as [{"type": "text", "text": ...}] only, as those of vision models do."""
        turns = [{"role": "user", "content": "qxprobe"}, {"role": "assistant", "content": "qxprobe"}]
        values = {"documents": None, **self._tokens, **self.args, "tools": None, "add_generation_prompt": False}
        for given, parts in ((turns, False), ([_as_parts(turn) for turn in turns], True)):
            try:
                if "qxprobe" in self._run(given, values):
                    return parts
            except ValueError:
                continue
        return False

    def _run(self, messages: Sequence[object], values: Mapping[str, Any]) -> str:
        values = {**values, "messages": list(messages)}
        self._environment.restart()
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(values):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise TemplateLimitError(f"it writes more than {MAX_CHARACTERS:,} characters")
        except TemplateLimitError as error:
            raise ValueError(f"the chat template was stopped: {error}; use another one (--chat-template)") from None
        except Exception as error:  # a foreign program: running it may fail in any way
            roles = ", ".join(str(m.get("role")) for m in messages if isinstance(m, dict)) or "no message"
            raise ValueError(f"the chat template refuses these messages ({roles}): {_reason(error)}") from None
        return "".join(pieces)


def spelling(tokenizer: Tokenizer, token_id: int | None) -> str | None:
    """How a special token is written, or None."""
    return None if token_id is None else tokenizer.token_bytes(token_id).decode()


def _with_reasoning(message: object) -> object:
    """A thought under every name that templates look for, as transformers hands it over (gpt-oss reads `thinking`)."""
    if not isinstance(message, Mapping):
        return message
    thought = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _as_parts(message: object) -> object:
    if isinstance(message, Mapping) and isinstance(message.get("content"), str):
        return {**message, "content": [{"type": "text", "text": message["content"]}]}
    return message


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself without end, or is nested too deeply"
    named = "" if isinstance(error, jinja2.TemplateError | TypeError) else f"{type(error).__name__}: "
    return " ".join(f"{named}{error}"[:300].split())
