"""What the arguments of a command name -> files of text: files, folders, globs and Hugging Face ids."""

import glob
from collections.abc import Iterable
from pathlib import Path

from ..hub import dataset_files, is_hub_name
from .compressed import COMPRESSED_SUFFIXES

_MARKUP = ".txt .text .md .rst .tex .html .xml .csv .tsv .toml .yaml .yml"
_CODE = ".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .sh"
TEXT_SUFFIXES = frozenset(f"{_MARKUP} {_CODE}".split())
RECORD_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson", ".parquet", ".arrow"})


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files to read, in order. A folder stands for the readable files under it and a glob for those that it matches,
    sorted by name; a Hugging Face id (base/hub.py) for its split's files in the cache.

    Raises FileNotFoundError for a path that doesn't exist and a glob that matches nothing, ValueError for an empty file or
    a folder with nothing to read, and what `hub.dataset_files` raises.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    files = [file for path in paths for file in _files_of(path)]
    if not files:
        raise ValueError("no files were given; name at least one file or folder")
    return files


def _files_of(name: str | Path) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_readable(file, path)]
        if not found:
            raise ValueError(f"{path} holds no text, JSON, JSONL or parquet files; name the files one by one")
        return found
    if path.exists():
        if not path.is_file():
            raise ValueError(f"{path} is a pipe, socket or device, not a file; write its content to a file first")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; give files with text")
        return [path]
    if any(character in str(name) for character in "*?["):
        matches = [Path(match) for match in sorted(glob.glob(str(name), recursive=True))]
        found = [file for file in matches if file.is_file() and file.stat().st_size > 0]
        if not found:
            raise FileNotFoundError(f"{name} matches no file with text; quote the pattern and check the folder")
        return found
    if is_hub_name(name) and kind_of(path) not in TEXT_SUFFIXES | RECORD_SUFFIXES:
        return dataset_files(name)
    raise FileNotFoundError(f"{path} does not exist")


def _is_readable(file: Path, root: Path) -> bool:
    hidden = any(part.startswith((".", "__pycache__")) for part in file.relative_to(root).parts)
    return not hidden and kind_of(file) in TEXT_SUFFIXES | RECORD_SUFFIXES and file.stat().st_size > 0


def kind_of(file: Path) -> str:
    """The suffix that tells the format, without that of the compression."""
    inner = file.with_suffix("") if file.suffix.lower() in COMPRESSED_SUFFIXES else file
    return inner.suffix.lower()


def total_bytes(files: Iterable[Path]) -> int:
    """The files' sizes on disk."""
    return sum(file.stat().st_size for file in files)
