"""One parsed row -> a Record: TRL's, Alpaca's and ShareGPT's fields, in three kinds that chat.py encodes each in its own way.

text                  a document: every token carries loss
prompt, completion    two strings: joined without a chat template, loss on the completion
messages              a conversation: goes through the chat template, loss on the assistant's turns
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from .messages import EmptyError, Message, json_field, kind_of, to_messages

FORMATS = (
    "text | messages [{role, content}] | prompt + completion | prompt + chosen + rejected | "
    "instruction, input, output, system, history (Alpaca) | conversations [{from, value}] (ShareGPT)"
)
_BESIDE = (
    "tools",
    "chat_template_kwargs",
    "chosen",
    "rejected",
    "label",
    "kto_tag",
)  # may stand in any format but text
_FIELDS = {  # of each format, those that are read
    "text": ("text",),
    "messages": ("messages", *_BESIDE),
    "conversations": ("conversations", "system", *_BESIDE),
    "instruction": ("instruction", "input", "output", "system", "history", *_BESIDE),
    "prompt": ("prompt", "completion", *_BESIDE),
    "chosen and rejected": _BESIDE,
}


@dataclass(frozen=True)
class Record:
    """One row, checked. Exactly one of `text`, `prompt`, `messages` is set."""

    where: str  # "train.jsonl line 812", for error messages
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None  # None beside a prompt: nothing to learn from (a prompt-only or preference row)
    messages: tuple[Message, ...] | None = None
    n_prompt_messages: int = 0  # the first so many messages are the prompt: their assistant turns carry no loss
    tools: tuple[dict, ...] | None = None
    chosen: str | tuple[Message, ...] | None = None  # the preferred answer, of the prompt's kind (string or messages)
    rejected: str | tuple[Message, ...] | None = None
    label: bool | None = None  # KTO: whether the answer is a good one
    template_args: dict[str, object] | None = None  # the row's chat_template_kwargs
    empty: str | None = None  # what is null or empty, such as "completion is null": nothing can be learned
    format: str | None = field(default=None, compare=False)  # what tells the row's format, such as "messages"
    unused: tuple[str, ...] = field(default=(), compare=False)  # the row's fields that nothing reads

    @property
    def is_preference(self) -> bool:
        """Whether the row says which answer is better: for graft dpo, and wrong to learn from as it stands."""
        return self.chosen is not None or self.rejected is not None or self.label is not None


@dataclass(frozen=True)
class BadRow:
    """A row that can't be parsed; reported with all the others."""

    message: str


def to_record(row: object, where: str, names: Mapping[str, str] | None = None) -> Record:
    """One parsed row -> Record. `where` opens every error message; `names` maps a format's field to the row's.

    Where a row has the fields of several formats, the more structured wins: messages, conversations, instruction, prompt,
    text. Raises ValueError.
    """
    if isinstance(row, BadRow):
        raise ValueError(row.message)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object with named fields, got {kind_of(row)}; known: {FORMATS}")
    row = _renamed(row, names or {}, where)
    try:
        return _parsed(row, where)
    except EmptyError as error:
        return Record(where, text="", empty=str(error))
    except RecursionError:
        raise ValueError(f"{where}: its values are nested too deeply; flatten them") from None


def _renamed(row: dict, names: Mapping[str, str], where: str) -> dict:
    for name, theirs in names.items():
        if theirs not in row:
            known = ", ".join(sorted(map(str, row))) or "none"
            raise ValueError(f"{where}: no field {theirs!r} for {name}; the row has {known}")
    renamed = {key: value for key, value in row.items() if key not in names and key not in names.values()}
    return renamed | {name: row[theirs] for name, theirs in names.items()}


def _parsed(row: dict, where: str) -> Record:
    """The row by the first format whose fields it has. Raises EmptyError where what is to be learned is null."""
    found = {name: value for name, value in row.items() if value is not None}
    kind = _format_of(row, found, where)
    read = {
        "messages": _from_messages,
        "conversations": _from_sharegpt,
        "instruction": _from_alpaca,
        "prompt": _from_prompt,
        "chosen and rejected": _from_implicit_preference,
        "text": _from_text,
    }[kind]
    record = read(found, where)
    strings = "" if record.messages is None or kind != "prompt" else " of messages"
    return replace(record, empty=_blank(record), format=f"{kind}{strings}", unused=_unused(kind, tuple(found)))


def _format_of(row: dict, found: dict, where: str) -> str:
    """The format's name in _FIELDS. `found` is the row without its nulls."""
    for name in ("messages", "conversations"):
        if name in found:
            return name
    if "instruction" in row and set(row) & {"output", "chosen"}:
        _refuse_null(row, ("instruction",) if "chosen" in found else ("instruction", "output"))
        return "instruction"
    if "prompt" in found or ("prompt" in row and "completion" in row):
        _refuse_null(row, ("prompt",) if "chosen" in found else ("prompt", "completion"))
        return "prompt"
    if {"chosen", "rejected"} <= found.keys():
        return "chosen and rejected"
    if "text" in found:
        return "text"
    _refuse_null(row, ("messages", "conversations", "prompt", "text"))
    names = ", ".join(sorted(map(str, row))) or "none"
    raise ValueError(
        f"{where}: the fields found are {names}; graft knows {FORMATS}; rename the fields, for example "
        "--field prompt=question"
    )


@lru_cache(maxsize=256)  # rows of one file have the same fields
def _unused(kind: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in _FIELDS[kind])


def _refuse_null(row: dict, names: Sequence[str]) -> None:
    for name in names:
        if name in row and row[name] is None:
            raise EmptyError(f"{name} is null")


def _blank(record: Record) -> str | None:
    """What is empty where something is to be learned."""
    if record.is_preference:
        return None
    if record.text is not None:
        return "text is empty" if not record.text.strip() else None
    if record.messages is None:
        return "completion is empty" if record.completion is not None and not record.completion.strip() else None
    turns = record.messages[record.n_prompt_messages :]
    answers = [m for m in turns if m["role"] == "assistant" and m.get("train") is not False]
    if answers and not any(str(m["content"]).strip() or _says_more(m) for m in answers):
        return "the assistant says nothing"
    return None


def _says_more(message: Message) -> bool:
    """Whether something stands beside the content: a thought, tool calls, or another template's own."""
    beside = (value for key, value in message.items() if key not in ("role", "content", "name", "id"))
    return any(value.strip() if isinstance(value, str) else value for value in beside)


# --- one function per format ---------------------------------------------------------------------------------------


def _from_text(row: dict, where: str) -> Record:
    return Record(where, text=_string(row, "text", where))


def _from_messages(row: dict, where: str) -> Record:
    return Record(where, messages=to_messages(row["messages"], "messages", where), **_extras(row, where, labelled=True))


def _from_prompt(row: dict, where: str) -> Record:
    prompt, extras = row["prompt"], _extras(row, where, labelled="completion" in row)
    if isinstance(prompt, str):
        completion = _string(row, "completion", where) if "completion" in row else None
        return Record(where, prompt=prompt, completion=completion, **extras)
    turns = to_messages(prompt, "prompt", where)
    answer = to_messages(row["completion"], "completion", where) if "completion" in row else ()
    return Record(where, messages=turns + answer, n_prompt_messages=len(turns), **extras)


def _from_implicit_preference(row: dict, where: str) -> Record:
    """`chosen` and `rejected` without a prompt (TRL's implicit prompt): whole conversations, or whole strings."""
    extras = _extras(row, where)
    if isinstance(row["chosen"], str):
        return Record(where, prompt="", **extras)
    return Record(where, messages=(), **extras)


def _from_alpaca(row: dict, where: str) -> Record:
    turns: list[Message] = []
    if row.get("system"):
        turns.append({"role": "system", "content": _string(row, "system", where)})
    history = json_field(row.get("history") or [], "history", where)
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(said, str) for said in pair)):
            raise ValueError(f"{where}: history must be a list of [user, assistant] pairs of strings, got {pair!r:.60}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = _string(row, "instruction", where)
    if row.get("input"):
        question = f"{question}\n{_string(row, 'input', where)}"
    turns.append({"role": "user", "content": question})
    if "output" in row:
        turns.append({"role": "assistant", "content": _string(row, "output", where)})
    return Record(where, messages=tuple(turns), **_extras(row, where))  # a label here is a class, kto_tag is KTO's


def _from_sharegpt(row: dict, where: str) -> Record:
    turns = to_messages(row["conversations"], "conversations", where)
    if row.get("system"):
        system: Message = {"role": "system", "content": _string(row, "system", where)}
        turns = (system, *turns)
    return Record(where, messages=turns, **_extras(row, where, labelled=True))


def _extras(row: dict, where: str, *, labelled: bool = False) -> dict:
    """tools, template arguments, chosen, rejected and KTO's label, which may stand beside any format."""
    extras: dict = {}
    for name in ("label", "kto_tag") if labelled else ("kto_tag",):
        if isinstance(row.get(name), bool):  # TRL's name and LLaMA-Factory's; a class label is a number or a string
            extras["label"] = row[name]
    if row.get("chat_template_kwargs"):
        args = json_field(row["chat_template_kwargs"], "chat_template_kwargs", where)
        if not isinstance(args, dict):
            raise ValueError(f"{where}: chat_template_kwargs must be an object, got {kind_of(args)}")
        extras["template_args"] = args
    if row.get("tools"):
        tools = json_field(row["tools"], "tools", where)
        if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise ValueError(f"{where}: tools must be a list of objects (JSON schemas), got {kind_of(tools)}")
        extras["tools"] = tuple(tools)
    for name in ("chosen", "rejected"):
        if name in row:
            answer = row[name]
            extras[name] = answer if isinstance(answer, str) else to_messages(answer, name, where)
    return extras


def _string(row: dict, name: str, where: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{where}: {name} must be a string, got {kind_of(row[name])}")
    return row[name]
