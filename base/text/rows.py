"""Files of rows (JSON, JSONL, Parquet, Arrow) -> the text of one field, row by row; a bad row is an item of its own."""

import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any

from ..extras import needs
from .utf8 import Errors, checked

ROWS_AT_ONCE = 1024  # of Parquet and Arrow, whose rows come in batches


@dataclass(frozen=True)
class BadRow:
    """A row that gives no text; `message` names the file, the row and what is wrong."""

    message: str


Rows = Iterator[str | BadRow]
OnReplaced = Callable[[], None] | None


def rows_of(
    kind: str, stream: IO[bytes], file: Path, field: str, errors: Errors, on_replaced: OnReplaced = None
) -> Rows:
    """The texts of a file of rows, by its suffix. A null or empty one is "".

    Raises ValueError for a file that isn't of its kind as a whole, or has no column `field`.
    """
    if kind in (".parquet", ".arrow"):
        return (_parquet_rows if kind == ".parquet" else _arrow_rows)(stream, file, field)
    return (_json_rows if kind == ".json" else _jsonl_rows)(stream, file, field, errors, on_replaced)


# ------------------------------------------------------------------------------------------------------------- JSON


def _field(row: object, field: str, where: str) -> str | BadRow:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        return BadRow(f"{where}: expected an object with the field {field!r}, got {type(row).__name__}")
    value = row.get(field)
    if value is None and field in row:
        return ""
    if not isinstance(value, str):
        fields = ", ".join(map(repr, row)) or "nothing"
        return BadRow(f"{where}: no text in the field {field!r}; the row has {fields}; name one with --field")
    return value


def _jsonl_rows(stream: IO[bytes], file: Path, field: str, errors: Errors, on_replaced: OnReplaced) -> Rows:
    offset = 0
    for number, line in enumerate(stream, 1):
        where = f"{file} line {number}"
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):  # a byte order mark, as some editors write it
            line, offset = line[3:], 3
        try:
            text = checked(line, file, offset, errors, on_replaced).decode()
            if text.strip():
                yield _field(json.loads(text), field, where)
        except json.JSONDecodeError as error:
            yield BadRow(f"{where}: not JSON ({error.msg} at column {error.colno})")
        except RecursionError:
            yield BadRow(f"{where}: nested too deeply")
        except ValueError as error:  # not UTF-8
            yield BadRow(str(error))
        offset += len(line)


def _json_rows(stream: IO[bytes], file: Path, field: str, errors: Errors, on_replaced: OnReplaced) -> Rows:
    """A JSON array, held in memory as a whole; a file of JSON lines under this name is read as such."""
    data = stream.read()
    try:
        rows = json.loads(checked(data, file, 0, errors, on_replaced))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise ValueError(f"{file} line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
        yield from _jsonl_rows(io.BytesIO(data), file, field, errors, None)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield _field(row, field, f"{file} row {number}")


# -------------------------------------------------------------------------------------------------- Parquet and Arrow


def _parquet_rows(stream: IO[bytes], file: Path, field: str) -> Rows:
    with needs("parquet", f"{file}: reading Parquet"):
        import pyarrow as pa
        import pyarrow.parquet as parquet

    with _seekable(stream) as source:
        try:
            table = parquet.ParquetFile(source)
            _check_column(file, field, table.schema_arrow.names)
            yield from _column(table.iter_batches(columns=[field], batch_size=ROWS_AT_ONCE), file, field)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} is not a parquet file, or damaged ({_first_line(error)})") from None


def _arrow_rows(stream: IO[bytes], file: Path, field: str) -> Rows:
    """Rows of an Arrow stream or file: what `datasets` keeps in its cache. Uncompressed ones are mapped, not read."""
    with needs("parquet", f"{file}: reading Arrow"):
        import pyarrow as pa
        import pyarrow.ipc

    with _seekable(stream) as seekable:
        try:
            source: Any = pa.memory_map(str(file)) if seekable is stream else seekable
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source)
            _check_column(file, field, reader.schema.names)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
            slices = (b.slice(start, ROWS_AT_ONCE) for b in batches for start in range(0, b.num_rows, ROWS_AT_ONCE))
            yield from _column((one.select([field]) for one in slices), file, field)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} is not an Arrow file, or damaged ({_first_line(error)})") from None


def _column(batches: Iterable[Any], file: Path, field: str) -> Rows:
    number = 0
    for batch in batches:
        for value in batch.column(0).to_pylist():
            number += 1
            if value is None or isinstance(value, str):
                yield value or ""
            else:
                yield BadRow(f"{file} row {number}: the column {field!r} holds {type(value).__name__}, not text")


def _check_column(file: Path, field: str, names: list[str]) -> None:
    if field not in names:
        raise ValueError(f"{file}: no column {field!r}; it has {', '.join(map(repr, names))}; name one with --field")


def _seekable(stream: IO[bytes]) -> IO[bytes]:
    """The stream itself, or its bytes in a temporary file that the end of the block removes."""
    if stream.seekable():
        return stream
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller's block closes it)
    copyfileobj(stream, copy, 1 << 20)
    copy.seek(0)
    return copy


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
