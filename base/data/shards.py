"""Token shards: documents as ids, end to end, in flat memory-mapped files, with meta.json beside them."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..checkpoint import flush, naming, write_json
from ..json_fields import check_fields
from ..runlog import locked
from ..text.documents import PIECE_BYTES, Errors, OnBad, ReadCounts, list_files, read_documents, total_bytes
from .bounds import shared_documents
from .encode import Documents, Progress, Stream, check_size, encode_all
from .split import choose, chosen_by

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer

SHARD_TOKENS = 100_000_000
COPY_TOKENS = 1 << 20
SPLITS = ("train", "val")
SHARD_NAME = r"(train|val)-\d{5}(-\d+)?\.bin"
META = {"dtype": str, "tokenizer": str, "splits": dict}
SPLIT = {"files": list, "n_tokens": int, "n_bytes": int, "n_documents": int}


class TokenShards:
    """One split as one long row of ids: `len(shards)`, `shards[a:b]`. Reads only the ids of the requested slice."""

    def __init__(self, folder: Path, split: str, meta: dict[str, Any]):
        entry = meta["splits"][split]
        self.meta = meta
        self.split = split
        self.n_bytes: int = entry["n_bytes"]  # of UTF-8 text, for bits per byte
        self.n_documents: int = entry["n_documents"]
        self.files = [folder / name for name in entry["files"]]
        self._parts = [_map(folder / name, meta["dtype"]) for name in entry["files"]]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        if len(self) != entry["n_tokens"]:
            raise ValueError(
                f"{folder}: the {split} files hold {len(self)} tokens, meta.json says {entry['n_tokens']}; "
                "a file was cut or changed, run graft data prepare again"
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, where: slice) -> np.ndarray:
        """The ids of a slice with step 1, int64, across file boundaries."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step} is not supported; token shards take slices with step 1")
        out = np.empty(max(0, stop - start), np.int64)
        place = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < len(out):
            part = self._parts[place]
            first = start + filled - int(self._ends[place] - len(part))
            taken = part[first : first + len(out) - filled]
            out[filled : filled + len(taken)] = taken
            filled += len(taken)
            place += 1
        return out

    def blocks(self, n_tokens: int = COPY_TOKENS) -> Iterator[np.ndarray]:
        """All ids in order, in blocks of at most so many: read, since what is mapped counts as this process's memory."""
        for file in self.files:
            with file.open("rb") as source:
                while len(block := np.fromfile(source, self.meta["dtype"], count=n_tokens)):
                    yield block


def _map(file: Path, dtype: str) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing or no regular file; run graft data prepare again")
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)


def open_tokens(folder: str | Path, split: str = "train") -> TokenShards:
    """Open a split of a folder that `graft data prepare` wrote. Raises FileNotFoundError when it isn't a finished one."""
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        raise FileNotFoundError(f"{folder} holds no meta.json; make it with graft data prepare PATH --out {folder}")
    if not (folder / "meta.json").is_file():
        raise ValueError(f"{folder / 'meta.json'} is not a regular file; expected the index of token shards")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        check_fields(meta, META, "index")
        for name, entry in meta["splits"].items():
            check_fields(entry, SPLIT, f"split {name}")
            if not all(isinstance(file, str) for file in entry["files"]):
                raise ValueError(f"split {name}'s files are {entry['files']}; expected names")
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype is {meta['dtype']!r}; expected uint16 or uint32")
        splits = list(meta["splits"])
        if split in splits:
            return TokenShards(folder, split, meta)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        again = f"make it again with graft data prepare PATH --out {folder} --force"
        raise ValueError(f"{folder / 'meta.json'} is damaged ({error}); {again}") from None
    raise ValueError(f"unknown split {split!r}; {folder} has {', '.join(splits)}")


def prepare(
    paths: Iterable[str | Path],
    tokenizer: "Tokenizer",
    out: str | Path,
    *,
    val_fraction: float = 0.01,  # of the tokens
    val_paths: Iterable[str | Path] = (),  # files whose documents validate, instead of a fraction
    seed: int = 0,  # which documents validate
    workers: int | None = None,  # processes that encode; None: by the size of the files
    field: str = "text",  # of JSON, Parquet and Arrow rows
    errors: Errors = "strict",
    on_bad: OnBad = "error",  # rows that give no text: raise at the first, or leave out and count
    shard_tokens: int = SHARD_TOKENS,
    force: bool = False,  # replace a finished folder
    progress: Progress | None = None,  # called with (stage, done, total)
    counts: ReadCounts | None = None,  # is added to on the way, with the first bad rows
) -> dict[str, Any]:
    """Encode files to `train-00000.bin`.., `val-00000.bin`.. and meta.json in `out`; returns the meta.

    EOS follows each document; BOS precedes it where the tokenizer asks for it before each text. Whole documents validate,
    drawn by seed; when no set of documents comes near val_fraction (one long text), the end of the last document does.
    meta.json counts the documents that were left out, and those that validate though they are among the training
    documents too, word for word.
    Memory does not grow with the files' size, but for 24 bytes a document. Shards that `force` replaces stay, and stay
    readable, until the new ones are on disk; other files in `out` are left alone. Raises ValueError for a tokenizer
    without EOS and for an `out` that is finished already, OSError when the disk refuses.
    """
    from ..text.parallel import default_workers
    from ..tokenizer.definition import unicode_versions

    out = Path(out)
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} is out of range; give at least 0 and less than 1")
    if tokenizer.definition.eos is None:
        raise ValueError("the tokenizer has no end-of-text token; train it with special_tokens=['<|endoftext|>']")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; expected a folder for the token shards")
    if (out / "meta.json").exists() and not force:
        raise ValueError(f"{out} holds finished token shards; give another folder or pass --force")
    files, val_files = list_files(paths), list_files(val_paths) if val_paths else []
    total = total_bytes(files + val_files)
    counts = ReadCounts() if counts is None else counts
    created = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".tokens.{os.getpid()}.tmp"
    try:
        with locked(out):
            _sweep(out)
            temporary.mkdir()
            read = partial(
                read_documents,
                separators=[tokenizer.definition.eos],
                field=field,
                errors=errors,
                on_bad=on_bad,
                piece_bytes=PIECE_BYTES if tokenizer.can_stream else None,
            )
            documents = Documents(files, val_files, read, counts, progress)
            n_workers = default_workers(total) if workers is None else workers
            stream = encode_all(documents, tokenizer, temporary / "all", n_workers)
            if val_files:
                ranges = chosen_by(stream, np.arange(len(stream.token_ends)) >= documents.n_train)
            else:
                ranges = choose(stream, val_fraction, seed, tokenizer)
            splits = {split: _write_split(stream, temporary, split, *ranges[split], shard_tokens) for split in SPLITS}
            meta = {
                "format": 1,
                "dtype": stream.dtype.name,
                "vocab_size": tokenizer.vocab_size,
                "bos_token_id": tokenizer.bos_token_id if tokenizer.add_bos else None,  # at the start of each document
                "eos_token_id": tokenizer.eos_token_id,
                "tokenizer": tokenizer.fingerprint(),
                "unicode": unicode_versions(),  # a note; readers do not compare it
                "val_fraction": None if val_files else val_fraction,
                "seed": seed,
                "sources": [str(file) for file in files],
                "val_sources": [str(file) for file in val_files],
                **counts.figures(),
                "splits": splits,
            }
            train, val = (TokenShards(temporary, split, meta) for split in SPLITS)
            meta["n_val_in_train"] = len(shared_documents(train, val))
            del train, val  # an open map would keep a file on some systems from being moved
            replaced = _shards_of(out)
            _move_shards(temporary, out, splits)
            flush(out)
            write_json(out / "meta.json", meta)  # from here on readers see the new shards
            for old in replaced:
                old.unlink(missing_ok=True)
            _take_plain_names(out, meta)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # a folder that is not empty stays
            for path in created:
                path.rmdir()
    return meta


def _sweep(out: Path) -> None:
    """Remove what a process that was killed left half done."""
    for path in out.iterdir():
        if path.is_dir() and re.fullmatch(r"\.tokens\.\d+\.tmp", path.name):
            shutil.rmtree(path)


def _shards_of(out: Path) -> list[Path]:
    """The shards that a folder's meta.json names; none if it can't be read: then no file is known to be graft's."""
    try:
        splits = json.loads((out / "meta.json").read_text(encoding="utf-8"))["splits"].values()
        names = [name for entry in splits for name in entry["files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return [out / name for name in names if isinstance(name, str) and re.fullmatch(SHARD_NAME, name)]


def _move_shards(source: Path, out: Path, splits: dict[str, dict[str, Any]]) -> None:
    """Move the shards to `out`, under names that nothing there has, and put these into `splits`."""
    version = 0
    names = [name for entry in splits.values() for name in entry["files"]]
    while any((out / _versioned(name, version)).exists() for name in names):
        version += 1
    for entry in splits.values():
        for name in entry["files"]:
            os.replace(source / name, out / _versioned(name, version))
        entry["files"] = [_versioned(name, version) for name in entry["files"]]


def _take_plain_names(out: Path, meta: dict[str, Any]) -> None:
    """Give shards written under a versioned name (because the replaced ones still existed) their plain names, if free now.

    Links the plain name, writes meta.json with it, then removes the versioned name, so readers find whole shards at any moment.
    """
    names = [name for entry in meta["splits"].values() for name in entry["files"]]
    plain = {name: re.sub(r"-\d+\.bin$", ".bin", name) if name.count("-") == 2 else name for name in names}
    changed = {name: new for name, new in plain.items() if new != name}
    if not changed or any((out / new).exists() for new in changed.values()):
        return
    try:
        for name, new in changed.items():
            os.link(out / name, out / new)
    except OSError:  # a file system without hard links
        for new in changed.values():
            (out / new).unlink(missing_ok=True)
        return
    for entry in meta["splits"].values():
        entry["files"] = [plain[name] for name in entry["files"]]
    flush(out)
    write_json(out / "meta.json", meta)
    for name in changed:
        (out / name).unlink()


def _versioned(name: str, version: int) -> str:
    """train-00000.bin -> train-00000-1.bin; version 0 is the plain name."""
    return name if version == 0 else f"{name.removesuffix('.bin')}-{version}.bin"


def _write_split(
    stream: Stream, out: Path, split: str, ranges: np.ndarray, n_bytes: int, n_documents: int, shard_tokens: int
) -> dict[str, Any]:
    """Copy ranges of the stream into shards, by reading: a memory map of it would count as this process's memory."""
    width = stream.dtype.itemsize
    names: list[str] = []
    room = 0  # in the open shard, in tokens
    with stream.file.open("rb") as source, ExitStack() as stack:
        target = None
        for start, stop in ranges.tolist():
            source.seek(start * width)
            left = stop - start
            while left:
                if room == 0:
                    stack.close()  # flushes the full shard
                    names.append(f"{split}-{len(names):05d}.bin")
                    target = stack.enter_context(_flushed(out / names[-1]))
                    room = shard_tokens
                assert target is not None
                n = min(left, room, COPY_TOKENS)
                target.write(source.read(n * width))
                left -= n
                room -= n
    n_tokens = int((ranges[:, 1] - ranges[:, 0]).sum()) if len(ranges) else 0
    for i, name in enumerate(names):
        check_size(out / name, min(shard_tokens, n_tokens - i * shard_tokens) * width)
    return {"files": names, "n_tokens": n_tokens, "n_bytes": n_bytes, "n_documents": n_documents}


@contextmanager
def _flushed(path: Path) -> Iterator[IO[bytes]]:
    """A new file to write; on the disk when the block ends. An OSError names it."""
    with naming(path), path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
