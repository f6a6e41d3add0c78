"""Files that are whole or absent: everything is written beside its place, flushed, and renamed. No pickle."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: `graft plot` writes and reads files without torch
    from torch import Tensor


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder; renamed onto `path` when the block ends well, removed when it doesn't."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Like `beside` for a new folder: it appears under its name complete, or not at all.

    Raises FileExistsError when the folder is there already: two renames can't replace it in one step.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with naming(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that leaves the block names the file: the system's own "No space left on device" doesn't."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, f"{error.strerror}: can't write", str(path)) from None


def flush(path: Path) -> None:
    """Ask the disk to hold the file or folder entry, so that a rename never outlives what it names."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # Windows opens no folder, and has no call for its entries
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes | str) -> None:
    """Write bytes, or text as UTF-8, whole or not at all."""
    with beside(Path(path)) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: object) -> None:
    """Write JSON with two spaces of indent and a final newline, whole or not at all."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]", *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Raises OSError when the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with beside(Path(path)) as temporary:
        try:
            save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(f"can't write {path}: {error}; is the disk full?") from None


def load_tensors(path: Path, *, device: str = "cpu") -> "dict[str, Tensor]":
    """All tensors of a safetensors file by name."""
    return dict(iterate_tensors(path, device=device))


def iterate_tensors(path: Path, *, device: str = "cpu") -> "Iterator[tuple[str, Tensor]]":
    """(name, tensor) one at a time, so that no more than one is in memory besides what the caller keeps.

    Raises FileNotFoundError, or ValueError when the file is truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); copy or download it again") from None


def random_state() -> "dict[str, Tensor]":
    """The global generators' states (torch's CPU one and each GPU's), as uint8 tensors for a safetensors file."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(states: "Mapping[str, Tensor]") -> None:
    """Put back what `random_state` returned; GPUs that are not here are skipped."""
    import torch

    torch.set_rng_state(states["cpu"])
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(n_gpus):
        if f"cuda.{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{i}"], i)
