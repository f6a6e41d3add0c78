"""Readers: files of text, JSON, JSONL or parquet (each also gzipped) to documents, in pieces of bounded size."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import regex

from ..extras import needs
from .utf8 import to_utf8

PIECE_BYTES = 4 << 20  # a longer document comes in pieces of about this size
_MARKUP = ".txt .text .md .rst .tex .html .xml .csv .tsv .toml .yaml .yml"
_CODE = ".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .sh"
TEXT_SUFFIXES = frozenset(f"{_MARKUP} {_CODE}".split())
RECORD_SUFFIXES = frozenset({".json", ".jsonl", ".parquet"})
Errors = Literal["strict", "replace"]


@dataclass(frozen=True)
class Piece:
    """UTF-8 text of one document, or a stretch of it that ends where no word of the known patterns can go on."""

    data: bytes
    ends: bool  # the document ends here
    path: Path


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files to read, in order; a folder stands for the readable files under it, sorted by name.

    Raises FileNotFoundError for a path that doesn't exist, ValueError for an empty file or a folder with nothing to read.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_readable(file, path)]
            if not found:
                raise ValueError(f"{path} holds no text, JSON, JSONL or parquet files; name the files one by one")
            files += found
        elif not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        elif path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; give files with text")
        else:
            files.append(path)
    if not files:
        raise ValueError("no files were given; name at least one file or folder")
    return files


def _is_readable(file: Path, root: Path) -> bool:
    hidden = any(part.startswith((".", "__pycache__")) for part in file.relative_to(root).parts)
    return not hidden and _kind(file) in TEXT_SUFFIXES | RECORD_SUFFIXES and file.stat().st_size > 0


def _kind(file: Path) -> str:
    """The suffix that tells the format, without .gz."""
    return file.with_suffix("").suffix.lower() if file.suffix.lower() == ".gz" else file.suffix.lower()


def total_bytes(files: Iterable[Path]) -> int:
    """The files' sizes on disk."""
    return sum(file.stat().st_size for file in files)


def batch_pieces(pieces: Iterable[Piece], n_bytes: int = PIECE_BYTES) -> Iterator[list[Piece]]:
    """Neighbouring pieces together, until they hold n_bytes."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.data)
        if size >= n_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_documents(
    paths: Iterable[str | Path],
    *,
    separators: Sequence[str] = (),  # special tokens at which a text file is cut into documents; they are dropped
    field: str = "text",  # which field of JSON and parquet rows
    errors: Errors = "strict",
    piece_bytes: int | None = PIECE_BYTES,  # None: whole documents, however long
    on_read: Callable[[int], None] | None = None,  # called with how many bytes of the files have been read so far
) -> Iterator[Piece]:
    """The documents of the files, in order. Never yields an empty document.

    A text file is one document unless it holds a separator. Raises ValueError that names the file and the byte offset
    (text) or the line (JSONL) where it can't be read.
    """
    total = 0
    for file in list_files(paths):
        with _open(file) as (stream, position):
            kind = _kind(file)
            if kind in RECORD_SUFFIXES:
                rows = {".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[kind]
                pieces = (Piece(to_utf8(text), True, file) for text in rows(stream, file, field, errors) if text)
            else:
                pieces = _text_pieces(stream, file, [s.encode() for s in separators], errors, piece_bytes)
            for piece in pieces:
                yield piece
                if on_read:
                    on_read(total + position())
        total += file.stat().st_size
        if on_read:
            on_read(total)


@contextmanager
def _open(file: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The file's bytes, unzipped, and a function that returns how many bytes of the file itself have been read."""
    with file.open("rb") as raw:
        if file.suffix.lower() == ".gz":
            try:
                with gzip.open(raw) as stream:
                    yield stream, raw.tell  # pyright: ignore[reportReturnType]
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{file} is not a whole gzip file ({error}); fetch it again") from None
        else:
            yield raw, raw.tell


# ------------------------------------------------------------------------------------------------------------- text

# Places where all four split patterns begin a new word whatever lies further left or right: before a blank or tab that
# follows something visible, after a lone line break, and between a letter and punctuation. (?r) searches from the end.
_CUT = regex.compile(r"(?r)(?<=\S)(?=[ \t])|(?<=\S\n)(?=\S)|(?<=\p{L})(?=[,.!?;:。，、！？；：…])")


def find_cut(data: bytes, limit: int) -> int:
    """The last place at or before `limit` where a text can be cut without changing its words; 0 when there is none."""
    for window in (1 << 12, 1 << 18, len(data)):
        start = max(0, limit - window)
        # Up to 4 bytes right of the limit are enough: each rule looks at one character on its right.
        text = data[start : limit + 4].decode("utf-8", "surrogateescape")
        right = len(data[limit : limit + 4].decode("utf-8", "surrogateescape"))
        match = _CUT.search(text, 1, max(1, len(text) - right))
        if match:
            return start + len(text[: match.start()].encode("utf-8", "surrogateescape"))
    return 0


def _text_pieces(
    stream: IO[bytes], file: Path, separators: list[bytes], errors: Errors, piece_bytes: int | None
) -> Iterator[Piece]:
    splitter = re.compile(b"|".join(map(re.escape, sorted(separators, key=len, reverse=True)))) if separators else None
    longest = max(map(len, separators), default=1)
    offset = 0  # of `rest` in the file
    rest = b""
    while chunk := stream.read(piece_bytes or PIECE_BYTES):
        rest += chunk
        done = 0
        for match in splitter.finditer(rest) if splitter else ():
            if match.start() > done:
                yield Piece(checked(rest[done : match.start()], file, offset + done, errors), True, file)
            done = match.end()
        rest, offset = rest[done:], offset + done
        cut = find_cut(rest, len(rest) - longest) if piece_bytes and len(rest) >= piece_bytes else 0
        if cut:
            yield Piece(checked(rest[:cut], file, offset, errors), False, file)
            rest, offset = rest[cut:], offset + cut
    if rest:
        yield Piece(checked(rest, file, offset, errors), True, file)


def checked(data: bytes, file: Path | str, offset: int, errors: Errors) -> bytes:
    """The bytes, which lie at `offset` of the file, as valid UTF-8. Raises ValueError with the offset of one that isn't."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if errors == "replace":
            return data.decode("utf-8", "replace").encode()
        at = offset + error.start
        raise ValueError(
            f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at byte offset {at}; fix the file or pass "
            "--errors replace to put U+FFFD there"
        ) from None
    return data


# ---------------------------------------------------------------------------------------------------------- records


def _field(row: object, field: str, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with the field {field!r}, got {type(row).__name__}")
    if not isinstance(row.get(field), str):
        fields = ", ".join(map(repr, row)) or "nothing"
        raise ValueError(f"{where}: no text in the field {field!r}; the row has {fields}; name one with --field")
    return row[field]


def _jsonl_rows(stream: IO[bytes], file: Path, field: str, errors: Errors) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(stream, 1):
        text = checked(line, file, offset, errors).decode()
        offset += len(line)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} line {number}: not JSON ({error.msg} at column {error.colno})") from None
        yield _field(row, field, f"{file} line {number}")


def _json_rows(stream: IO[bytes], file: Path, field: str, errors: Errors) -> Iterator[str]:
    """A JSON array, held in memory as a whole; a file of JSON lines under this name is read as such."""
    data = stream.read()
    try:
        rows = json.loads(checked(data, file, 0, errors))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise ValueError(f"{file} line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
        yield from _jsonl_rows(io.BytesIO(data), file, field, errors)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield _field(row, field, f"{file} row {number}")


def _parquet_rows(stream: IO[bytes], file: Path, field: str, errors: Errors) -> Iterator[str]:
    with needs("parquet", f"{file}: reading Parquet"):
        import pyarrow as pa
        import pyarrow.parquet as parquet

    source = io.BytesIO(stream.read()) if file.suffix.lower() == ".gz" else stream
    try:
        table = parquet.ParquetFile(source)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a parquet file ({error})") from None
    names = table.schema_arrow.names
    if field not in names:
        raise ValueError(f"{file}: no column {field!r}; it has {', '.join(map(repr, names))}; name one with --field")
    for batch in table.iter_batches(columns=[field]):
        for number, value in enumerate(batch.column(0).to_pylist(), 1):
            if not isinstance(value, str):
                raise ValueError(f"{file} row {number}: the column {field!r} holds {type(value).__name__}, not text")
            yield value
