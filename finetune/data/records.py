"""Supervised data files -> records: TRL, Alpaca and ShareGPT rows in JSON, JSONL, CSV, TSV or Parquet, each also gzipped.

A record holds one of three things, and chat.py encodes each in its own way:

    text                  a document: every token carries loss
    prompt, completion    two strings: joined without a chat template, loss on the completion
    messages              a conversation: goes through the chat template, loss on the assistant's turns
"""

import csv
import glob
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...base.extras import needs

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
# A compressed file may hold this many times its own size, beyond the first so many bytes: more is a bomb, not text.
MAX_RATIO, FREE_BYTES = 250, 64 << 20
SHOWN = 5  # bad rows that a message quotes; it counts the others
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
    label: bool | None = None  # KTO: whether the answer is a good one
    template_args: dict[str, object] | None = None  # the row's chat_template_kwargs
    empty: str | None = None  # what is null or empty, such as "completion is null": nothing can be learned

    @property
    def is_preference(self) -> bool:
        """Whether the row says which answer is better: for graft dpo, and wrong to learn from as it stands."""
        return self.chosen is not None or self.rejected is not None or self.label is not None


class _EmptyError(Exception):
    """A row of a known format in which what is to be learned is null."""


@dataclass(frozen=True)
class _BadRow:
    """A row that can't be parsed; reported with all the others."""

    message: str


def read_records(path: str | Path, fields: Mapping[str, str] | None = None) -> list[Record]:
    """Every row of a file as a Record, in file order. `fields` gives a format's field the name it has in the file.

    The format of a row is told by its fields (FORMATS lists them); fields of no format are ignored. Where a row has the
    fields of several, the more structured wins: messages, conversations, instruction, prompt, text. Semantics are TRL's:
    string prompts and completions see no chat template, conversational ones do, Alpaca and ShareGPT become messages.

    A null or empty cell makes a Record with `empty` set, for `encode_dataset` to count, drop or refuse. TSV is plain: a
    header line, no quoting. Reads the whole file into memory; a compressed file of more than MAX_RATIO times its size
    (beyond FREE_BYTES) is refused. Raises FileNotFoundError, IsADirectoryError, or ValueError that names the file and
    every bad line, row or byte.
    """
    path = Path(path)
    records, bad = [], []
    for row, where in _rows(path):
        try:
            records.append(to_record(row, where, fields))
        except ValueError as error:
            bad.append(str(error))
    if bad:
        raise ValueError(join_errors(bad))
    if not records:
        raise ValueError(f"{path} holds no rows; a training file needs at least one, with the fields {FORMATS}")
    return records


def read_rows(path: str | Path) -> Iterator[tuple[dict, Record]]:
    """Each row of a file as it was parsed, with its Record: for rewards, which may read any of its fields. Raises as
    `read_records`, at the first bad row."""
    for row, where in _rows(Path(path)):
        record = to_record(row, where)
        assert isinstance(row, dict)
        yield row, record


def join_errors(messages: Sequence[str]) -> str:
    """One line of several messages: the first few, and how many more there are."""
    if len(messages) == 1:
        return messages[0]
    more = f"; and {len(messages) - SHOWN:,} more" if len(messages) > SHOWN else ""
    return f"{len(messages):,} rows can't be used: " + "; ".join(messages[:SHOWN]) + more


def read_all(specs: Sequence[str | Path], fields: Mapping[str, str] | None = None) -> list[Record]:
    """The records of several files, folders and globs, one after the other: what `--data A --data B` means.

    A spec may end in =WEIGHT (all of them, or none). Then the list is the smallest in which every record stands at least
    once and the files' shares are as the weights: the records of a file that is too small for its share are repeated in
    turn. Raises as `read_records`, and ValueError for weights that aren't positive numbers.
    """
    named = named_files(specs)
    parts = [[record for file in files for record in read_records(file, fields)] for files, _ in named]
    weights = [weight for _, weight in named]
    if all(weight is None for weight in weights):
        return [record for part in parts for record in part]
    shares = [weight for weight in weights if weight is not None]
    unit = max(len(part) / share for part, share in zip(parts, shares, strict=True))
    sizes = [max(len(part), round(unit * share)) for part, share in zip(parts, shares, strict=True)]
    if sum(sizes) > 1000 * sum(map(len, parts)):
        raise ValueError(
            f"the weights would repeat {sum(map(len, parts)):,} records to {sum(sizes):,}; give the smaller file more weight"
        )
    return [part[i % len(part)] for part, size in zip(parts, sizes, strict=True) for i in range(size)]


def named_files(specs: Sequence[str | Path]) -> list[tuple[list[Path], float | None]]:
    """(files, weight) of each spec. Raises ValueError where some specs have a weight and others don't."""
    if not specs:
        raise ValueError("no data given; name at least one file, folder or glob")
    split = [_split_weight(str(spec)) for spec in specs]
    missing = [name for name, weight in split if weight is None]
    if 0 < len(missing) < len(split):
        raise ValueError(f"--data {missing[0]} has no weight while others have; give all of them one, or none")
    return [(data_files(name), weight) for name, weight in split]


def _split_weight(spec: str) -> tuple[str, float | None]:
    name, equals, text = spec.rpartition("=")
    if not equals or Path(spec).exists():
        return spec, None
    try:
        weight = float(text)
    except ValueError:
        return spec, None  # a file name that holds an equals sign
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"--data {spec}: the weight {text} is not a positive number; write for example {name}=0.7")
    return name, weight


def data_files(name: str | Path) -> list[Path]:
    """The data files that a file, a folder or a glob names, in the order of their names. Raises FileNotFoundError."""
    path = Path(name)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and _suffix(file) in SUFFIXES]
        if not files:
            raise FileNotFoundError(f"{path} holds no data file; graft reads {', '.join(SUFFIXES)}, each also .gz")
        return files
    if not path.exists() and any(character in str(name) for character in "*?["):
        files = [Path(match) for match in sorted(glob.glob(str(name), recursive=True)) if Path(match).is_file()]
        if not files:
            raise FileNotFoundError(f"{name} matches no file; graft reads {', '.join(SUFFIXES)}, each also .gz")
        return files
    return [path]


def to_record(row: object, where: str, names: Mapping[str, str] | None = None) -> Record:
    """One parsed row -> Record. `where` opens every error message; `names` maps a format's field to the row's."""
    if isinstance(row, _BadRow):
        raise ValueError(row.message)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object with named fields, got {_kind(row)}; known: {FORMATS}")
    row = _renamed(row, names or {}, where)
    try:
        record = _parsed(row, where)
    except _EmptyError as error:
        return Record(where, text="", empty=str(error))
    except RecursionError:
        raise ValueError(f"{where}: its values are nested too deeply; flatten them") from None
    return replace(record, empty=_blank(record)) if record.empty is None else record


def _renamed(row: dict, names: Mapping[str, str], where: str) -> dict:
    for field, theirs in names.items():
        if theirs not in row:
            known = ", ".join(sorted(map(str, row))) or "none"
            raise ValueError(f"{where}: no field {theirs!r} for {field}; the row has {known}")
    renamed = {key: value for key, value in row.items() if key not in names and key not in names.values()}
    return renamed | {field: row[theirs] for field, theirs in names.items()}


def _parsed(row: dict, where: str) -> Record:
    found = {name: value for name, value in row.items() if value is not None}
    fields = set(found)
    for name in ("messages", "conversations"):
        if name in fields:
            return _from_messages(found, where) if name == "messages" else _from_sharegpt(found, where)
    if "instruction" in row and set(row) & {"output", "chosen"}:
        _refuse_null(row, ("instruction",))
        if "chosen" not in fields:
            _refuse_null(row, ("output",))
        return _from_alpaca(found, where)
    if "prompt" in fields or ("prompt" in row and "completion" in row):
        _refuse_null(row, ("prompt",))
        if "chosen" not in fields:
            _refuse_null(row, ("completion",))
        return _from_prompt(found, where)
    if {"chosen", "rejected"} <= fields:
        return _from_implicit_preference(found, where)
    if "text" in fields:
        return Record(where, text=_string(found, "text", where))
    _refuse_null(row, ("messages", "conversations", "prompt", "text"))
    names = ", ".join(sorted(map(str, row))) or "none"
    raise ValueError(
        f"{where}: the fields found are {names}; graft knows {FORMATS}; rename the fields, for example "
        "--field prompt=question"
    )


def _refuse_null(row: dict, names: Sequence[str]) -> None:
    for name in names:
        if name in row and row[name] is None:
            raise _EmptyError(f"{name} is null")


def _blank(record: Record) -> str | None:
    """What is empty where something is to be learned."""
    if record.is_preference:
        return None
    if record.text is not None:
        return "text is empty" if not record.text.strip() else None
    if record.messages is None:
        return "completion is empty" if record.completion is not None and not record.completion.strip() else None
    answers = [m for m in record.messages[record.n_prompt_messages :] if m["role"] == "assistant"]
    if answers and not any(str(m["content"]).strip() or len(m) > 2 for m in answers):
        return "the assistant says nothing"
    return None


# --- one function per format ---------------------------------------------------------------------------------------


def _from_messages(row: dict, where: str) -> Record:
    return Record(where, messages=_messages(row["messages"], "messages", where), **_extras(row, where, labelled=True))


def _from_prompt(row: dict, where: str) -> Record:
    prompt, extras = row["prompt"], _extras(row, where, labelled="completion" in row)
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
    return Record(where, messages=tuple(turns), **_extras(row, where))  # a label here is a class, kto_tag is KTO's


def _from_sharegpt(row: dict, where: str) -> Record:
    turns = _messages(row["conversations"], "conversations", where)
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
        args = _json_field(row["chat_template_kwargs"], "chat_template_kwargs", where)
        if not isinstance(args, dict):
            raise ValueError(f"{where}: chat_template_kwargs must be an object, got {_kind(args)}")
        extras["template_args"] = args
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
    if content is None and content_key in turn:
        raise _EmptyError(f"{where.partition(': ')[2]}.{content_key} is null")
    if isinstance(content, list):
        content = _joined_parts(content, f"{where}.{content_key}")
    if not isinstance(content, str):
        raise ValueError(f"{where}.{content_key} must be a string, got {_kind(content)}")
    rest = {key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None}
    return {"role": roles[role], "content": content, **rest}


def _joined_parts(parts: list, where: str) -> str:
    """[{"type": "text", "text": ...}, ...] -> one string; other kinds of parts are refused."""
    texts = []
    for i, part in enumerate(parts):
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise ValueError(f"{where}[{i}] is {kind!r:.40}; graft reads parts of type text with a string")
        texts.append(part["text"])
    return "".join(texts)


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
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: {field} must be a list, or JSON text of one; not JSON ({_json_error(error)})"
        ) from None


def _json_error(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _kind(value: object) -> str:
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


# --- files -> rows -------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[object, str]]:
    """(row, where) of each row of the file, in order."""
    data = _read_bytes(path)
    suffix = _suffix(path)
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


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def check_regular_file(path: Path) -> None:
    """Refuse pipes, sockets and devices: reading one may never end. Raises ValueError."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe, socket or device, not a file; write its content to a file first")


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give one data file ({', '.join(SUFFIXES)}, each also .gz)")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give a data file ({', '.join(SUFFIXES)}, each also .gz)")
    check_regular_file(path)
    if _suffix(path) not in SUFFIXES:
        raise ValueError(f"{path}: unknown file type {path.suffix!r}; choose {', '.join(SUFFIXES)}, each also .gz")
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        data = _decompress(data, path)
    if not data.strip():
        raise ValueError(f"{path} is empty; a training file needs at least one row with the fields {FORMATS}")
    return data


def _decompress(data: bytes, path: Path) -> bytes:
    pieces, size = [], 0
    limit = max(FREE_BYTES, MAX_RATIO * len(data))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while piece := file.read(1 << 20):
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise ValueError(
                        f"{path}: {len(data):,} compressed bytes hold more than {limit:,}; text packs at most about "
                        "50-fold, so this is no data; decompress it yourself if it is"
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); fetch or compress it again") from None
    return b"".join(pieces)


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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: not JSON ({_json_error(error)})") from None
    for i, row in enumerate(rows, start=1):
        yield row, f"{path.name} row {i}"


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[object, str]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): U+2028 is legal inside a string
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = _BadRow(f"{where}: not JSON ({_json_error(error)})")
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
    with needs("parquet", f"{path}: reading Parquet"):
        import pyarrow
        import pyarrow.parquet

    limit, size, i = max(FREE_BYTES, MAX_RATIO * len(data)), 0, 0
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
        _check_parquet_size(sum(group.total_byte_size for group in groups), file.metadata.num_rows, limit, path)
        # A page may hold one long text that every row refers to: few rows at once where groups are large.
        largest = max((group.total_byte_size for group in groups), default=0)
        for batch in file.iter_batches(batch_size=min(1024, max(8, (1 << 30) // max(1, largest)))):
            for row in batch.to_pylist():
                i += 1
                size += sum(len(value) if isinstance(value, str) else 8 for value in row.values())
                _check_parquet_size(size, 0, limit, path)
                yield row, f"{path.name} row {i}"
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file ({str(error).splitlines()[0]}); write it again") from None


def _check_parquet_size(n_bytes: int, n_rows: int, limit: int, path: Path) -> None:
    if n_bytes > limit or n_rows > limit // 8:
        raise ValueError(
            f"{path}: its rows take {max(n_bytes, 8 * n_rows):,} bytes, more than {MAX_RATIO} times the file; that is no "
            "data; write it again without compression if it is"
        )
