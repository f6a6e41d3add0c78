"""Files -> parsed rows, one at a time: JSON, JSONL, CSV, TSV and Parquet, each also gzipped, and the Arrow files of `datasets`.

A file is read twice: once to find what no row could tell (a byte that is no UTF-8, a bomb), once for its rows. So no more
of it is held than a row; but a .json file that is one list is parsed as a whole.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ...base.extras import needs
from .messages import json_error
from .record import FORMATS, BadRow

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
# A compressed file may hold this many times its own size, beyond the first so many bytes: more is a bomb, not text.
MAX_RATIO, FREE_BYTES = 250, 64 << 20
_CHUNK = 1 << 20
ROWS_AT_ONCE = 1024  # of Parquet and Arrow, whose rows come in batches


def iterate_rows(path: Path) -> Iterator[tuple[object, str]]:
    """(row, where) of each row of the file, in order; a line that is no JSON comes as a BadRow.

    Raises FileNotFoundError, IsADirectoryError, or ValueError that names the file and the line or byte.
    """
    _check_file(path)
    suffix = suffix_of(path)
    if suffix == ".parquet":
        yield from _parquet_rows(path)
    elif suffix == ".arrow":
        yield from _arrow_rows(path)
    else:
        _check_text(path)
        # Lines end at \n alone: U+2028 is legal inside a JSON string, and CSV's cells hold line breaks of their own.
        with io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="" if suffix == ".csv" else "\n") as text:
            yield from _text_rows(text, path, suffix)


def suffix_of(path: Path) -> str:
    """The suffix that tells the format, without .gz."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def is_one_list(path: Path) -> bool:
    """Whether a .json file is one list, which has to be parsed as a whole."""
    if suffix_of(path) != ".json":
        return False
    with io.TextIOWrapper(_opened(path), encoding="utf-8-sig", errors="replace") as text:
        return _opens_with_bracket(text)


def check_regular_file(path: Path) -> None:
    """Refuse pipes, sockets and devices: reading one may never end. Raises ValueError."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe, socket or device, not a file; write its content to a file first")


# --- what is no row's fault ----------------------------------------------------------------------------------------


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give one data file ({', '.join(SUFFIXES)}, each also .gz)")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give a data file ({', '.join(SUFFIXES)}, each also .gz)")
    check_regular_file(path)
    if suffix_of(path) not in SUFFIXES:
        raise ValueError(f"{path}: unknown file type {path.suffix!r}; choose {', '.join(SUFFIXES)}, each also .gz")
    if path.stat().st_size == 0:
        raise ValueError(_no_rows(path))


def _no_rows(path: Path) -> str:
    return f"{path} is empty; a training file needs at least one row with the fields {FORMATS}"


def _opened(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    return gzip.open(path) if path.name.endswith(".gz") else path.open("rb")  # pyright: ignore[reportReturnType]


def _chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes, decompressed, within the limits of a compressed file."""
    n_compressed = path.stat().st_size
    limit, size = max(FREE_BYTES, MAX_RATIO * n_compressed), 0
    try:
        with _opened(path) as file:
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                if path.name.endswith(".gz") and size > limit:
                    raise ValueError(
                        f"{path}: {n_compressed:,} compressed bytes hold more than {limit:,}; text packs at most about "
                        "50-fold, so this is no data; decompress it yourself if it is"
                    )
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); fetch or compress it again") from None


def _check_text(path: Path) -> None:
    """Raise ValueError for a file that is no UTF-8, is blank, or is a bomb."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_blank, n_read = True, 0
    chunks = _chunks(path)
    while True:
        chunk = next(chunks, b"")
        n_waiting = len(decoder.getstate()[0])  # bytes of a character that the chunk before cut
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: not UTF-8 at byte offset {n_read - n_waiting + error.start} "
                f"(byte 0x{error.object[error.start]:02x}); convert it, for example with iconv -f latin1 -t utf-8"
            ) from None
        if not chunk:
            break
        is_blank = is_blank and not chunk.strip()
        n_read += len(chunk)
    if is_blank:
        raise ValueError(_no_rows(path))


# --- text ----------------------------------------------------------------------------------------------------------


def _text_rows(text: IO[str], path: Path, suffix: str) -> Iterator[tuple[object, str]]:
    if suffix == ".csv":
        yield from _csv_rows(text, path)
    elif suffix == ".tsv":
        yield from _tsv_rows(text, path)
    elif suffix == ".json" and _opens_with_bracket(text):
        text.seek(0)
        yield from _json_rows(text.read(), path)
    else:  # a .json file that does not open with a list is read as JSONL, as many tools write it
        text.seek(0)
        yield from _jsonl_rows(text, path)


def _opens_with_bracket(text: IO[str]) -> bool:
    while character := text.read(1):
        if not character.isspace():
            return character == "["
    return False


def _json_rows(text: str, path: Path) -> Iterator[tuple[object, str]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: not JSON ({json_error(error)})") from None
    for i, row in enumerate(rows, start=1):
        yield row, f"{path.name} row {i}"


def _jsonl_rows(text: IO[str], path: Path) -> Iterator[tuple[object, str]]:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            row = json.loads(line.removesuffix("\n"))
        except (ValueError, RecursionError) as error:
            row = BadRow(f"{where}: not JSON ({json_error(error)})")
        yield row, where


def _csv_rows(text: IO[str], path: Path) -> Iterator[tuple[object, str]]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than csv's default of 131,072 characters
    reader = csv.reader(text, strict=True)
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
            header = _checked_header(cells, path)
        elif cells:
            yield _zip_cells(header, cells, where), where


def _tsv_rows(text: IO[str], path: Path) -> Iterator[tuple[object, str]]:
    header: list[str] | None = None
    for number, line in enumerate(text, start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        if header is None:
            header = _checked_header(line.split("\t"), path)
        elif line:
            where = f"{path.name} line {number}"
            yield _zip_cells(header, line.split("\t"), where), where


def _checked_header(names: list[str], path: Path) -> list[str]:
    """The names, each once: of two equal ones a row would keep the last cell alone. Raises ValueError."""
    if twice := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise ValueError(f"{path.name} line 1: two columns are named {twice[0]!r:.60}; rename one of them")
    return names


def _zip_cells(header: list[str], cells: list[str], where: str) -> dict[str, str]:
    if len(cells) != len(header):
        raise ValueError(
            f"{where}: {len(cells)} cells where the header has {len(header)} ({', '.join(header)[:80]}); "
            f"quote or escape the separator"
        )
    return dict(zip(header, cells, strict=True))


# --- columns -------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Iterator[tuple[object, str]]:
    with needs("parquet", f"{path}: reading Parquet"):
        import pyarrow
        import pyarrow.parquet

    data: Any = io.BytesIO(b"".join(_chunks(path))) if path.name.endswith(".gz") else path
    limit = max(
        FREE_BYTES, MAX_RATIO * (len(data.getbuffer()) if isinstance(data, io.BytesIO) else path.stat().st_size)
    )
    size, i = 0, 0
    try:
        with pyarrow.parquet.ParquetFile(data) as file:
            groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
            _check_parquet_size(sum(group.total_byte_size for group in groups), file.metadata.num_rows, limit, path)
            # A page may hold one long text that every row refers to: few rows at once where groups are large.
            largest = max((group.total_byte_size for group in groups), default=0)
            for batch in file.iter_batches(batch_size=min(ROWS_AT_ONCE, max(8, (1 << 30) // max(1, largest)))):
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


def _arrow_rows(path: Path) -> Iterator[tuple[object, str]]:
    """Rows of an Arrow stream or file, mapped into memory: what `datasets` keeps in its cache."""
    with needs("parquet", f"{path}: reading Arrow"):
        import pyarrow
        import pyarrow.ipc

    if path.name.endswith(".gz"):
        raise ValueError(f"{path}: a compressed Arrow file can't be mapped into memory; decompress it")
    i = 0
    try:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source)
            batches = (reader.get_batch(k) for k in range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                    for row in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                        i += 1
                        yield row, f"{path.name} row {i}"
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole Arrow file ({str(error).splitlines()[0]}); write it again") from None
