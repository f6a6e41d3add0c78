"""One message of a conversation, as a row spells it -> as templates read it: {role, content, ...} in graft's names."""

import json

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool", "function_response": "tool", "function_call": "assistant", **{role: role for role in ROLES},
}  # fmt: skip
# What a model thought before it answered; render.py gives it to a template under the name that the template reads.
REASONING = ("reasoning_content", "reasoning", "thinking")
TRAIN = ("train", "training", "weight")  # whether a turn carries loss: axolotl's two names, OpenAI's weight of 0 or 1
_TYPE_NAMES = {
    str: "a string",
    list: "a list",
    dict: "an object",
    int: "a number",
    float: "a number",
    bool: "a boolean",
}

# At least role and content. "train": False: an assistant's turn that carries no loss. "reasoning_content": its thoughts.
# tool_calls and the like pass through to the template.
Message = dict[str, object]


class EmptyError(Exception):
    """A row of a known format in which what is to be learned is null."""


def to_messages(value: object, field: str, where: str) -> tuple[Message, ...]:
    """A list of {role, content} or {from, value} (one alone counts as a list of one), with roles in graft's names.

    Raises ValueError that names the message, EmptyError for a null content.
    """
    turns = json_field(value, field, where)
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not turns:
        got = "an empty list" if turns == [] else kind_of(turns)
        raise ValueError(f"{where}: {field} must be a list of {{role, content}} with at least one message, got {got}")
    return tuple(_message(turn, f"{where}: {field}[{i}]") for i, turn in enumerate(turns))


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} must be an object with role and content, got {kind_of(turn)}")
    role_key, content_key, roles = "role", "content", {role: role for role in ROLES}
    if "from" in turn and "role" not in turn:
        role_key, content_key, roles = "from", "value", SHAREGPT_ROLES
    role, content = turn.get(role_key), turn.get(content_key)
    if role is None:
        raise ValueError(
            f"{where} has no role; its fields are {', '.join(map(str, turn))}; each needs role and content"
        )
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"{where} has the unknown role {role!r}; use {', '.join(roles)}")
    if content is None and turn.get("tool_calls"):
        content = ""
    if content is None and content_key in turn:
        raise EmptyError(f"{where.partition(': ')[2]}.{content_key} is null")
    if isinstance(content, list):
        content = _joined_parts(content, f"{where}.{content_key}")
    if not isinstance(content, str):
        raise ValueError(f"{where}.{content_key} must be a string, got {kind_of(content)}")
    named = (role_key, content_key, *REASONING, *TRAIN)
    rest = {key: value for key, value in turn.items() if key not in named and value is not None}
    return {
        "role": roles[role],
        "content": content,
        **rest,
        **_thoughts(turn, where),
        **_loss(turn, roles[role], where),
    }


def _thoughts(turn: dict, where: str) -> Message:
    """{"reasoning_content": ...} of a turn that has any of its names. Raises ValueError for two that differ."""
    found = {name: turn[name] for name in REASONING if turn.get(name) is not None}
    texts = list(found.values())
    if len(texts) > 1 and texts[0] != texts[1]:
        raise ValueError(f"{where} has {' and '.join(found)}, which mean the same and differ; keep one of them")
    if texts and not isinstance(texts[0], str):
        raise ValueError(f"{where}.{next(iter(found))} must be a string, got {kind_of(texts[0])}")
    return {"reasoning_content": texts[0]} if texts else {}


def _loss(turn: dict, role: str, where: str) -> Message:
    """{"train": False} where the row says that an assistant's turn is not to be learned. Raises ValueError for two that differ."""
    found = [name for name in TRAIN if turn.get(name) is not None]
    for name in found:
        value = turn[name]
        if not (isinstance(value, bool) or (name == "weight" and value in (0, 1))):
            expected = "0 or 1" if name == "weight" else "true or false"
            raise ValueError(f"{where}.{name} is {value!r:.40}; expected {expected}")
        if value and role != "assistant":
            raise ValueError(f"{where}.{name} asks for loss on a turn of {role}; only the assistant's turns carry loss")
    if len({bool(turn[name]) for name in found}) > 1:
        raise ValueError(f"{where} has {' and '.join(found)}, which mean the same and differ; keep one of them")
    return {"train": False} if found and not turn[found[0]] and role == "assistant" else {}


def _joined_parts(parts: list, where: str) -> str:
    """[{"type": "text", "text": ...}, ...] -> one string; other kinds of parts are refused."""
    texts = []
    for i, part in enumerate(parts):
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise ValueError(f"{where}[{i}] is {kind!r:.40}; graft reads parts of type text with a string")
        texts.append(part["text"])
    return "".join(texts)


def json_field(value: object, field: str, where: str) -> object:
    """CSV and TSV cells hold lists as JSON text: parse those, and leave what already is a value."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: {field} must be a list, or JSON text of one; not JSON ({json_error(error)})"
        ) from None


def json_error(error: Exception) -> str:
    """Why a text isn't JSON, without the text."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def kind_of(value: object) -> str:
    """A value's type as a reader of JSON calls it."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)
