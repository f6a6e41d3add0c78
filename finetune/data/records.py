"""Supervised data files -> records: TRL, Alpaca and ShareGPT rows in JSON, JSONL, CSV, TSV or Parquet, each also gzipped.

A record holds one of three things, and chat.py encodes each in its own way:

    text                  a document: every token carries loss
    prompt, completion    two strings: joined without a chat template, loss on the completion
    messages              a conversation: goes through the chat template, loss on the assistant's turns
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool", "function_response": "tool", "function_call": "assistant", **{role: role for role in ROLES},
}  # fmt: skip
FORMATS = (
    "text | messages [{role, content}] | prompt + completion | prompt + chosen + rejected | "
    "instruction, input, output, system, history (Alpaca) | conversations [{from, value}] (ShareGPT)"
)
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_TYPE_NAMES = {
    str: "a string",
    list: "a list",
    dict: "an object",
    int: "a number",
    float: "a number",
    bool: "a boolean",
}

# At least role and content; tool_calls, reasoning_content and the like pass through to the template.
Message = dict[str, object]


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


def read_records(path: str | Path) -> list[Record]:
    """Every row of a file as a Record, in file order.

    The format of a row is told by its fields (FORMATS lists them); fields of no format are ignored. Where a row has the
    fields of several, the more structured wins: messages, conversations, instruction, prompt, text. Semantics are TRL's:
    string prompts and completions see no chat template, conversational ones do, Alpaca and ShareGPT become messages.

    TSV is plain: a header line, no quoting. Reads the whole file into memory. Raises FileNotFoundError,
    IsADirectoryError, or ValueError naming the file and the line, row or byte.
    """
    path = Path(path)
    records = [to_record(row, where) for row, where in _rows(path)]
    if not records:
        raise ValueError(f"{path} holds no rows; a training file needs at least one, with the fields {FORMATS}")
    return records


def to_record(row: object, where: str) -> Record:
    """One parsed row -> Record. `where` opens every error message."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object with named fields, got {_kind(row)}; known: {FORMATS}")
    found = {name: value for name, value in row.items() if value is not None}
    fields = set(found)
    if "messages" in fields:
        return _from_messages(found, where)
    if "conversations" in fields:
        return _from_sharegpt(found, where)
    if "instruction" in fields and fields & {"output", "chosen"}:
        return _from_alpaca(found, where)
    if "prompt" in fields:
        return _from_prompt(found, where)
    if {"chosen", "rejected"} <= fields:
        return _from_implicit_preference(found, where)
    if "text" in fields:
        return Record(where, text=_string(found, "text", where))
    names = ", ".join(sorted(map(str, row))) or "none"
    raise ValueError(f"{where}: the fields found are {names}; graft knows {FORMATS}; rename the fields")


# --- one function per format ---------------------------------------------------------------------------------------


def _from_messages(row: dict, where: str) -> Record:
    return Record(where, messages=_messages(row["messages"], "messages", where), **_extras(row, where))


def _from_prompt(row: dict, where: str) -> Record:
    prompt, extras = row["prompt"], _extras(row, where)
    if isinstance(prompt, str):
        completion = _string(row, "completion", where) if "completion" in row else None
        return Record(where, prompt=prompt, completion=completion, **extras)
    turns = _messages(prompt, "prompt", where)
    answer = _messages(row["completion"], "completion", where) if "completion" in row else ()
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
    history = _json_field(row.get("history") or [], "history", where)
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
    return Record(where, messages=tuple(turns), **_extras(row, where))


def _from_sharegpt(row: dict, where: str) -> Record:
    turns = _messages(row["conversations"], "conversations", where)
    if row.get("system"):
        system: Message = {"role": "system", "content": _string(row, "system", where)}
        turns = (system, *turns)
    return Record(where, messages=turns, **_extras(row, where))


def _extras(row: dict, where: str) -> dict:
    """tools, chosen and rejected, which may stand beside any format."""
    extras: dict = {}
    if row.get("tools"):
        tools = _json_field(row["tools"], "tools", where)
        if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise ValueError(f"{where}: tools must be a list of objects (JSON schemas), got {_kind(tools)}")
        extras["tools"] = tuple(tools)
    for name in ("chosen", "rejected"):
        if name in row:
            answer = row[name]
            extras[name] = answer if isinstance(answer, str) else _messages(answer, name, where)
    return extras


def _messages(value: object, field: str, where: str) -> tuple[Message, ...]:
    """A list of {role, content} or {from, value} (one alone counts as a list of one), with roles in graft's names."""
    turns = _json_field(value, field, where)
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not turns:
        got = "an empty list" if turns == [] else _kind(turns)
        raise ValueError(f"{where}: {field} must be a list of {{role, content}} with at least one message, got {got}")
    return tuple(_message(turn, f"{where}: {field}[{i}]") for i, turn in enumerate(turns))


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} must be an object with role and content, got {_kind(turn)}")
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
    if not isinstance(content, str):
        raise ValueError(f"{where}.{content_key} must be a string, got {_kind(content)}")
    rest = {key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None}
    return {"role": roles[role], "content": content, **rest}


def _string(row: dict, name: str, where: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{where}: {name} must be a string, got {_kind(row[name])}")
    return row[name]


def _json_field(value: object, field: str, where: str) -> object:
    """CSV and TSV cells hold lists as JSON text: parse those, and leave what already is a value."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: {field} must be a list, or JSON text of one; not JSON ({error.msg} at column {error.colno})"
        ) from None


def _kind(value: object) -> str:
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


# --- files -> rows -------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[object, str]]:
    """(row, where) of each row of the file, in order."""
    data = _read_bytes(path)
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(data, path)
        return
    text = _decode(data, path)
    if suffix == ".csv":
        yield from _csv_rows(text, path)
    elif suffix == ".tsv":
        yield from _tsv_rows(text, path)
    elif suffix == ".json" and text.lstrip()[:1] == "[":
        yield from _json_rows(text, path)
    else:  # a .json file that does not open with a list is read as JSONL, as many tools write it
        yield from _jsonl_rows(text, path)


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give one data file ({', '.join(SUFFIXES)}, each also .gz)")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give a data file ({', '.join(SUFFIXES)}, each also .gz)")
    if Path(path.name.removesuffix(".gz")).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: unknown file type {path.suffix!r}; choose {', '.join(SUFFIXES)}, each also .gz")
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error}); fetch or compress it again") from None
    if not data.strip():
        raise ValueError(f"{path} is empty; a training file needs at least one row with the fields {FORMATS}")
    return data


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        bad = data[error.start]
        raise ValueError(
            f"{path}: not UTF-8 at byte offset {error.start} (byte 0x{bad:02x}); convert it, for example with "
            f"iconv -f latin1 -t utf-8"
        ) from None


def _json_rows(text: str, path: Path) -> Iterator[tuple[object, str]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    for i, row in enumerate(rows, start=1):
        yield row, f"{path.name} row {i}"


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[object, str]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): U+2028 is legal inside a string
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        yield row, where


def _csv_rows(text: str, path: Path) -> Iterator[tuple[object, str]]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than csv's default of 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path.name} line {reader.line_num + 1}"  # where the row starts: cells may hold line breaks
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{where}: not CSV ({error}); quote cells that hold commas, quotes or line breaks"
            ) from None
        if header is None:
            header = cells
        elif cells:
            yield _zip_cells(header, cells, where), where


def _tsv_rows(text: str, path: Path) -> Iterator[tuple[object, str]]:
    header, *lines = text.replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines, start=2):
        if line:
            where = f"{path.name} line {number}"
            yield _zip_cells(header.split("\t"), line.split("\t"), where), where


def _zip_cells(header: list[str], cells: list[str], where: str) -> dict[str, str]:
    if len(cells) != len(header):
        raise ValueError(
            f"{where}: {len(cells)} cells where the header has {len(header)} ({', '.join(header)[:80]}); "
            f"quote or escape the separator"
        )
    return dict(zip(header, cells, strict=True))


def _parquet_rows(data: bytes, path: Path) -> Iterator[tuple[object, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a whole Parquet file ({str(error).splitlines()[0]}); write it again") from None
    for i, row in enumerate(table.to_pylist(), start=1):
        yield row, f"{path.name} row {i}"
