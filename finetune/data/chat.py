"""Records -> ids and loss mask: chat templates as transformers renders them, and the one way graft turns a turn to tokens.

Text passes through here with four invisible marks (Unicode noncharacters, hidden first where the data itself holds them):

    LEARN_ON ... LEARN_OFF        what the assistant says, its end-of-turn token included: carries loss
    LITERAL_ON ... LITERAL_OFF    a special token's spelling that came from the data: encoded as plain text

The text is cut at every mark before encoding, so a prompt has the same tokens in training and at inference, whatever the
answer's first characters would have merged with.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...base.tokenizer.tokenizer import Tokenizer
from .records import Message, Record

LEARN_ON, LEARN_OFF, LITERAL_ON, LITERAL_OFF, ESCAPE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
_MARKS = "\ufdd0-\ufdd4"

# Qwen's layout, without its default system prompt. Needs <|im_start|> and <|im_end|> in the tokenizer.
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# For a base whose tokenizer has no special token but EOS: words mark the roles, EOS ends the assistant's turn.
PLAIN = """\
{%- for message in messages %}
{{- message['role'] | capitalize + ':' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{{- ' ' + message['content'] + eos_token }}
{%- endgeneration %}
{%- else %}
{{- ' ' + message['content'] }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant:' }}
{%- endif %}"""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A record as the model sees it."""

    ids: np.ndarray  # (n,) int32
    loss_mask: np.ndarray  # (n,) bool: this token is a label (it is predicted from those before it)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the model is to learn to write, put between the learning marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return f"{LEARN_ON}{caller()}{LEARN_OFF}"


class ChatTemplate:
    """A jinja chat template, rendered as transformers' `apply_chat_template` does: the same sandbox, options and helpers.

    Raises ValueError when the source is not jinja.
    """

    def __init__(self, source: str, bos_token: str | None = None, eos_token: str | None = None):
        self.source = source
        self._tokens = {name: t for name, t in (("bos_token", bos_token), ("eos_token", eos_token)) if t is not None}
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not jinja: {error.message} in line {error.lineno}") from None
        self.has_generation_tags = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str | None = None) -> "ChatTemplate":
        """`source` (an adapter's), else the tokenizer's own; without one, CHATML where it has the tokens, else PLAIN."""
        source = source or tokenizer.chat_template
        if source is None:
            source = CHATML if {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens.keys() else PLAIN
        return cls(source, _spelling(tokenizer, tokenizer.bos_token_id), _spelling(tokenizer, tokenizer.eos_token_id))

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[dict] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text, character for character transformers'. Raises ValueError when the template refuses the messages."""
        hidden = [_map_strings(message, _hide) for message in messages]
        marked = self.render_marked(hidden, _map_strings(tools, _hide), add_generation_prompt)
        return _show(re.sub(f"[{LEARN_ON}{LEARN_OFF}]", "", marked))

    def render_marked(self, messages: Sequence[object], tools: object, add_generation_prompt: bool) -> str:
        """`render` with the marks left in; strings must come through `_hide` or `_guard`."""
        try:
            return self._template.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(str(m.get("role")) for m in messages if isinstance(m, dict)) or "no message"
            raise ValueError(f"the chat template refuses these messages ({roles}): {error}") from None


def encode_record(
    record: Record,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,  # None: ChatTemplate.of(tokenizer)
    max_seq_len: int,  # in tokens; what is beyond is cut off
) -> Encoded:
    """Ids and loss mask of one record.

    text: [BOS] text EOS, all learned. prompt + completion: [BOS] prompt completion EOS, loss on completion and EOS, no
    chat template; the two are encoded apart, as at inference. messages: the template's text, loss on the assistant's
    turns and their end-of-turn token (EOS is added after the last turn where the template ends it with no special
    token). BOS stands before a string if the tokenizer asks for it; before a conversation the template alone decides.
    Special tokens spelled in the data are plain text; in the assistant's own words this is so for control tokens only,
    not for such as <think>, which it is to write.

    Raises ValueError naming the row when nothing is left to learn, or when the template cannot be followed.
    """
    try:
        if record.messages is None:
            ids, mask = _encode_strings(record, tokenizer)
        else:
            template = template or ChatTemplate.of(tokenizer)
            ids, mask = _encode_messages(record, tokenizer, template)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None
    if not mask[1:max_seq_len].any():
        n_prompt = int(mask.argmax())
        raise ValueError(
            f"{record.where}: no label is left after truncation to max_seq_len={max_seq_len}, as the prompt alone has "
            f"{n_prompt} tokens; raise max_seq_len to {len(ids)}, or shorten or drop the row"
        )
    return Encoded(ids[:max_seq_len], mask[:max_seq_len])


def encode_prompt(
    prompt: str | Sequence[Message],
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,  # for messages; None: ChatTemplate.of(tokenizer)
    *,
    tools: Sequence[dict] | None = None,
) -> np.ndarray:  # (n,) int32
    """The ids that generation starts from: exactly those that stand before the answer in `encode_record`."""
    if isinstance(prompt, str):
        return _encode_text(prompt, tokenizer)
    template = template or ChatTemplate.of(tokenizer)
    return _encode_marked(_marked(prompt, tools, tokenizer, template, add_generation_prompt=True), tokenizer)[0]


def end_of_turn(tokenizer: Tokenizer, template: ChatTemplate | None = None) -> int:
    """The id that ends the assistant's turn: the first special token that the template writes after it, else EOS.

    Generation stops here. Raises ValueError when there is neither.
    """
    spelling = _end_of_turn(tokenizer, template or ChatTemplate.of(tokenizer))
    return tokenizer.special_tokens[spelling] if spelling else _eos(tokenizer)


def split_answer(record: Record) -> tuple[str | tuple[Message, ...], str]:
    """(prompt, answer) of a record, for evaluation: the last assistant turn is the answer. Raises ValueError without one."""
    if record.prompt is not None and record.completion is not None:
        return record.prompt, record.completion
    if record.messages and record.messages[-1]["role"] == "assistant":
        return record.messages[:-1], str(record.messages[-1]["content"])
    raise ValueError(
        f"{record.where}: no answer to compare with; give prompt and completion, or end on an assistant turn"
    )


# --- strings -------------------------------------------------------------------------------------------------------


def _encode_strings(record: Record, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    eos = _eos(tokenizer)
    answer = record.text if record.text is not None else record.completion
    if answer is None:
        raise ValueError("a prompt without a completion has nothing to learn; add the field completion")
    # An EOS that the data spells out at the very end is the one that is added here.
    answer = answer.removesuffix(_spelling(tokenizer, eos) or "")
    if record.text is not None:
        prompt, learned = np.zeros(0, np.int32), _encode_text(answer, tokenizer)
    else:
        prompt, learned = _encode_text(record.prompt or "", tokenizer), tokenizer.encode(answer)
    ids = np.concatenate([prompt, learned, [eos]]).astype(np.int32)
    return ids, np.arange(len(ids)) >= len(prompt)


def _encode_text(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """[BOS] text. A BOS that the data spells out at the very start becomes the token, and is never doubled."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return tokenizer.encode(text)
    plain = text.removeprefix(_spelling(tokenizer, bos) or "")
    ids = tokenizer.encode(plain)
    return np.concatenate([[bos], ids]).astype(np.int32) if tokenizer.add_bos or plain != text else ids


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer has no EOS token, so the model can't learn to stop; train it with special tokens "
            f"(it has {list(tokenizer.special_tokens)}), or name eos_token in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def _spelling(tokenizer: Tokenizer, token_id: int | None) -> str | None:
    return None if token_id is None else tokenizer.token_bytes(token_id).decode()


# --- conversations -------------------------------------------------------------------------------------------------


def _encode_messages(record: Record, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[np.ndarray, np.ndarray]:
    messages = list(record.messages or ())
    if not any(message["role"] == "assistant" for message in messages[record.n_prompt_messages :]):
        raise ValueError("no assistant turn to learn from; end the conversation with one, or give a completion")
    marked = _marked(messages, record.tools, tokenizer, template, n_prompt=record.n_prompt_messages)
    ids, mask = _encode_marked(marked, tokenizer)
    if _end_of_turn(tokenizer, template) is None and messages[-1]["role"] == "assistant":
        ids, mask = np.append(ids, np.int32(_eos(tokenizer))), np.append(mask, True)
    return ids, mask


def _marked(
    messages: Sequence[Message],
    tools: Sequence[dict] | None,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    n_prompt: int = 0,  # the first messages, which carry no loss
    add_generation_prompt: bool = False,
) -> str:
    """The rendered conversation with all marks set."""
    guarded = [_guard_message(message, tokenizer) for message in messages]
    guarded_tools = _map_strings(tools, lambda text: _guard(text, tuple(tokenizer.special_tokens)))

    def render(n: int, prompt: bool) -> str:
        return template.render_marked(guarded[:n], guarded_tools, prompt)

    text = render(len(messages), add_generation_prompt)
    end = _end_of_turn(tokenizer, template)
    if not template.has_generation_tags:
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start = _prefix_length(render(i, True), text, i)
                stop = _find_special(end, text, start) if end else None
                spans.append((start, stop or _prefix_length(render(i + 1, False), text, i)))
        for start, stop in reversed(spans):
            text = f"{text[:start]}{LEARN_ON}{text[start:stop]}{LEARN_OFF}{text[stop:]}"
    elif end:  # a template that closes its tag before the end-of-turn token: that token is learned all the same
        text = re.sub(f"{LEARN_OFF}({re.escape(end)})", rf"\1{LEARN_OFF}", text)
    if n_prompt:
        prompt = _marked(messages[:n_prompt], tools, tokenizer, template, add_generation_prompt=True)
        prompt_end = _prefix_length(prompt, text, n_prompt)
        text = re.sub(f"[{LEARN_ON}{LEARN_OFF}]", LITERAL_OFF, text[:prompt_end]) + text[prompt_end:]
    return text


def _prefix_length(prefix: str, text: str, i: int) -> int:
    if not text.startswith(prefix):
        raise ValueError(
            f"the chat template writes earlier messages differently once message {i} follows, so its words can't be "
            f"told from the prompt; put {{% generation %}} ... {{% endgeneration %}} around the assistant's part of it"
        )
    return len(prefix)


def _find_special(special: str, text: str, start: int) -> int | None:
    """Where the first `special` after `start` that the template itself wrote ends."""
    for match in re.compile(f"{LITERAL_ON}.*?{LITERAL_OFF}|({re.escape(special)})", re.DOTALL).finditer(text, start):
        if match.group(1):
            return match.end()
    return None


@lru_cache(maxsize=16)
def _end_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> str | None:
    """The spelling of the special token that the template puts after the assistant's words, if any."""
    turn: list[Message] = [{"role": "user", "content": "graft"}, {"role": "assistant", "content": "probe"}]
    after = template.render(turn).rpartition("probe")[2]
    match = _special_pattern(tuple(tokenizer.special_tokens)).search(after)
    return match.group() if match else None


# --- marks ---------------------------------------------------------------------------------------------------------


def _encode_marked(marked: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(ids, loss mask) of marked text, encoded piece by piece."""
    specials = _special_pattern(tuple(tokenizer.special_tokens)).pattern
    pattern = re.compile(f"{LITERAL_ON}({specials}){LITERAL_OFF}|([{LEARN_ON}-{LITERAL_OFF}])")
    ids, mask, learn, done = [], [], False, 0

    def add(piece: np.ndarray) -> None:
        ids.append(piece)
        mask.append(np.full(len(piece), learn))

    for match in pattern.finditer(marked):
        add(tokenizer.encode(_show(marked[done : match.start()]), allowed_special="all"))
        literal, mark = match.groups()
        if literal:
            add(tokenizer.encode(literal))
        learn = mark == LEARN_ON if mark in (LEARN_ON, LEARN_OFF) else learn
        done = match.end()
    add(tokenizer.encode(_show(marked[done:]), allowed_special="all"))
    return np.concatenate(ids).astype(np.int32), np.concatenate(mask)


def _guard_message(message: Message, tokenizer: Tokenizer) -> Mapping[str, object]:
    """Mark every special token that a message spells; the assistant may write those that are no control tokens."""
    assistant = message["role"] == "assistant"
    names = tuple(token.content for token in tokenizer.definition.added if token.special or not assistant)
    return {key: _map_strings(value, lambda text: _guard(text, names)) for key, value in message.items()}


def _guard(text: str, specials: tuple[str, ...]) -> str:
    return _special_pattern(specials).sub(rf"{LITERAL_ON}\g<0>{LITERAL_OFF}", _hide(text))


@lru_cache(maxsize=16)
def _special_pattern(specials: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(specials, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


def _hide(text: str) -> str:
    """Spell the marks that the data itself holds as ESCAPE and a digit; `_show` takes it back."""
    return re.sub(f"[{_MARKS}]", lambda match: f"{ESCAPE}{ord(match.group()) - ord(LEARN_ON)}", text)


def _show(text: str) -> str:
    return re.sub(f"{ESCAPE}([0-4])", lambda match: chr(ord(LEARN_ON) + int(match.group(1))), text)


def _map_strings(value: object, change: Callable[[str], str]) -> Any:
    """`change` applied to every string in nested lists and dicts, keys left alone."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


# --- what templates may call ---------------------------------------------------------------------------------------


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """json.dumps: jinja's own filter escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
