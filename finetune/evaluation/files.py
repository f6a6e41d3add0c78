"""The files in which benchmarks come: JSON lines, plain or compressed, many in a zip, HellaSwag's blocks of lines."""

import bz2
import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 30  # of text in one file, so that a compressed bomb is refused
BLOCK = 6  # lines of a HellaSwag question: context, label, four endings
SUFFIXES = (".jsonl", ".json", ".gz", ".zip", ".bz2", ".txt")


def rows_of(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each row. Raises FileNotFoundError, or ValueError for what can't be read, naming file and line."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist or is not a regular file")
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: unknown kind of file {file.suffix!r}; graft reads {', '.join(SUFFIXES)}")
    try:
        if file.suffix == ".zip":
            yield from _zip_rows(file)
            return
        opened = {".gz": gzip.open, ".bz2": bz2.open}.get(file.suffix, open)(file, "rb")
        with opened as stream:
            text = _decoded(stream.read(MAX_BYTES + 1), file)
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} can't be read: {error or type(error).__name__}") from None
    plain = Path(file.stem) if file.suffix in (".gz", ".bz2") else file
    yield from _block_rows(text, file) if plain.suffix == ".txt" else _json_rows(text, str(file))


def _zip_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with zipfile.ZipFile(file) as archive:
        # macOS puts a file of its own, ._name, beside each.
        named = [m for m in archive.infolist() if m.filename.endswith(".jsonl") and "/._" not in f"/{m.filename}"]
        members = sorted(named, key=lambda m: m.filename)
        if not members:
            raise ValueError(f"{file} holds no .jsonl file")
        if sum(member.file_size for member in members) > MAX_BYTES:
            raise ValueError(f"{file} unpacks to more than {MAX_BYTES:,} bytes")
        for member in members:
            with archive.open(member) as stream:
                yield from _json_rows(_decoded(stream.read(MAX_BYTES + 1), file), f"{file}/{member.filename}")


def _decoded(data: bytes, file: Path) -> str:
    if len(data) > MAX_BYTES:
        raise ValueError(f"{file} unpacks to more than {MAX_BYTES:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}") from None


def _json_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{name} line {number}: a row must be an object, got {line.strip()[:40]}")
        yield f"{name} line {number}", row


def _block_rows(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = text.split("\n")
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) % BLOCK:
        raise ValueError(f"{file} has {len(lines):,} lines, not a multiple of {BLOCK} (context, label, four endings)")
    for start in range(0, len(lines), BLOCK):
        context, label, *endings = lines[start : start + BLOCK]
        where = f"{file} line {start + 1}"
        if not label.strip().isdecimal():
            raise ValueError(f"{where}: the label is {label!r}, not a number from 0 to 3")
        yield where, {"query": context, "choices": endings, "gold": int(label)}
