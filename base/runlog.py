"""What a run leaves behind: run.json (config, seed, versions), metrics.jsonl (a line a step), summary.json."""

import json
import math
import os
import platform
import re
import shutil
import sys
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from .checkpoint import flush, naming, write_file, write_json
from .json_fields import read_json
from .parallel.restart import launch_id
from .settings import plain

# Files that some reader loads from a folder by their names alone: an older one would be read beside or in place of new ones.
LOADED = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json", "config.json",
    "generation_config.json", "adapter_config.json", "adapter_model.*", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.*",
    "graft.json",
)  # fmt: skip
RUN_FILE, METRICS_FILE, SUMMARY_FILE = "run.json", "metrics.jsonl", "summary.json"
CHECKPOINTS, REPLACED = "checkpoints", "replaced"
ON_RANKS = ("pretrain", "sft", "dpo")  # stages that run on several ranks


def versions() -> dict[str, str]:
    """The versions that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("graftlm", "torch", "triton", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class RunFolder:
    """A run's output folder. Opening it refuses to overwrite a run unless told to resume or to start over.

    Nothing of a former run is touched before `start`, and a command that is refused in between leaves no empty folder.
    `--force` over a former run keeps what that run left whole until the new results are: its log and checkpoints lie in
    replaced/, its results stay in place; `finish` removes what the new run didn't write anew.
    """

    def __init__(self, folder: Path | str, *, stage: str, resume: bool = False, force: bool = False) -> None:
        if stage.split()[0] not in ON_RANKS and os.environ.get("WORLD_SIZE", "1") != "1":
            from .parallel.ranks import refuse_ranks  # imports torch, which reading a log doesn't need

            refuse_ranks(stage)
        self.folder, self.stage = Path(folder), stage
        self._metrics: TextIO | None = None
        self._state: dict[str, Any] | None = None
        self._files: list[str] = []
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; expected a folder for the output")
        if resume and force:
            raise ValueError("--resume and --force exclude each other: go on with the run, or start it over")
        if resume and not self.folder.exists():
            raise FileNotFoundError(f"{folder} holds no run to resume; leave --resume out to start one")
        self._created = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock(self.folder, self)  # before the state is read: nobody else may change it from here on
            state = self._state_to_go_on(resume, force)
        except BaseException:
            self.close()
            raise
        self.forced = force or bool(state and state.get("forced"))
        self.previous = state if resume else None
        self._ours = state is not None

    def _state_to_go_on(self, resume: bool, force: bool) -> dict[str, Any] | None:
        """What run.json says, None without one; raises FileExistsError when this run may not have the folder."""
        folder = self.folder
        state = None
        if (folder / RUN_FILE).exists():
            state = read_json(folder / RUN_FILE, {} if force else {"stage": str, "status": str, "config": dict})
        if force:
            return state
        if state is None:
            # An empty folder is a run killed before its first file: resuming it is starting it.
            if any(not _is_leftover(path) for path in folder.iterdir()):
                raise FileExistsError(f"{folder} is not empty and holds no graft run; choose another folder or --force")
            return None
        if state["stage"] != self.stage:
            raise FileExistsError(
                f"{folder} holds a {state['stage']} run, this is {self.stage}; choose another folder or --force"
            )
        if not resume:
            kind = "a finished run" if state["status"] == "finished" else "an unfinished run"
            raise FileExistsError(f"{folder} holds {kind}; use --resume to go on, or --force to start over")
        return state

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Close; a run that an exception ended says so in run.json, and why."""
        if error is not None and self._state is not None and self._state["status"] == "running":
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")
            self._state |= {"status": "stopped", "reason": reason}
            with suppress(OSError):  # the disk may be full: then the status stays `running`, as after a kill
                write_json(self.folder / RUN_FILE, self._state)
        self.close()

    def _sweep(self) -> None:
        """Remove half-written files of a process that was killed; see checkpoint.beside."""
        for leftover in [*self.folder.iterdir(), *self.checkpoints.glob("*")]:
            if _is_leftover(leftover):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _set_aside(self) -> None:
        """Move the former run's log, summary and checkpoints to replaced/; what lies there already was whole and stays."""
        for name in (METRICS_FILE, SUMMARY_FILE, CHECKPOINTS):
            source, target = self.folder / name, self.folder / REPLACED / name
            if target.exists():
                shutil.rmtree(source, ignore_errors=True) if source.is_dir() else source.unlink(missing_ok=True)
            elif source.exists():
                source.rename(target)

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def start(self, config: Mapping[str, Any], *, seed: int) -> None:
        """Write run.json with the resolved config; when not resuming, a former run's log and checkpoints are set aside.

        `starting` stands in run.json meanwhile, so that a process killed then is resumed as the new run it was.
        """
        self._sweep()
        self._state = {
            "stage": self.stage,
            "status": "running",
            "seed": seed,
            "command": sys.argv,
            "versions": versions(),
            "config": plain(config),
            **({"forced": True} if self.forced else {}),  # what the folder held before goes at the end
            **({"launch": launch} if (launch := launch_id()) else {}),
        }
        replaced = self.folder / REPLACED / RUN_FILE
        if self.previous is None or self.previous.get("status") == "starting":
            if self._ours and not replaced.exists():
                write_file(replaced, (self.folder / RUN_FILE).read_bytes())
            write_json(self.folder / RUN_FILE, self._state | {"status": "starting"})
            if self._ours:
                self._set_aside()
        write_json(self.folder / RUN_FILE, self._state)

    def open_metrics(self, *, after_step: int) -> list[dict[str, Any]]:
        """Open metrics.jsonl to append; returns its lines up to `after_step`.

        Lines past it, and a last line cut short, are from before a crash and are dropped. A damaged line elsewhere stays
        in the file as it is: the lines behind it still count.
        """
        path = self.folder / METRICS_FILE
        raw_lines = path.read_bytes().splitlines() if path.exists() else []
        parsed = [_parse_line(raw) for raw in raw_lines]
        if parsed and parsed[-1] is None:
            raw_lines, parsed = raw_lines[:-1], parsed[:-1]
        kept = [
            (raw, line)
            for raw, line in zip(raw_lines, parsed, strict=True)
            if line is None or line["step"] <= after_step
        ]
        write_file(path, b"".join(raw + b"\n" for raw, _ in kept))
        self._metrics = path.open("a", encoding="utf-8")
        return [line for _, line in kept if line is not None]

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line and hand it to the system, so that a killed process loses none."""
        assert self._metrics is not None, "open_metrics comes first"
        with naming(self.folder / METRICS_FILE):
            self._metrics.write(json.dumps(finite(line), allow_nan=False) + "\n")
            self._metrics.flush()

    @contextmanager
    def results(self) -> Iterator[Path]:
        """A new folder for the run's results; its files move to the run's folder when all of them are written."""
        temporary = self.folder / f".results.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            for file in files:
                target = self.folder / file.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
                self._files.append(file.relative_to(temporary).as_posix())
            flush(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, mark the run as finished, and remove what a run that it replaced left."""
        assert self._state is not None, "start comes first"
        write_json(self.folder / SUMMARY_FILE, finite(plain(summary)))
        self._remove_replaced()
        if self.forced and self._files:
            remove_others(self.folder, self._files)
        self._state |= {"status": "finished", "files": self._files}
        write_json(self.folder / RUN_FILE, self._state)
        self.close()

    def _remove_replaced(self) -> None:
        """Remove the result files that only the replaced run wrote, and its log and checkpoints."""
        replaced = self.folder / REPLACED
        if not (replaced / RUN_FILE).exists():
            return
        with suppress(ValueError):  # a run.json that --force was to get rid of
            former = read_json(replaced / RUN_FILE).get("files")
            for name in former if isinstance(former, list) else []:
                if isinstance(name, str) and Path(name).name == name and name not in self._files:
                    (self.folder / name).unlink(missing_ok=True)
        for name in (METRICS_FILE, SUMMARY_FILE, RUN_FILE):
            (replaced / name).unlink(missing_ok=True)
        shutil.rmtree(replaced / CHECKPOINTS, ignore_errors=True)
        with suppress(OSError):  # somebody else's file lies there
            replaced.rmdir()

    def close_metrics(self) -> None:
        """Close metrics.jsonl; the folder stays locked."""
        if self._metrics is not None:
            metrics, self._metrics = self._metrics, None
            with suppress(OSError):  # only what `log` could not write, and has raised for, is still to be written
                metrics.close()

    def close(self) -> None:
        """Close metrics.jsonl, let others into the folder, and remove it if it is empty and this run made it."""
        self.close_metrics()
        unlock(self.folder, self)
        if self._state is None:
            with suppress(OSError):
                for path in self._created:
                    path.rmdir()


@dataclass
class _Lock:
    process: int
    descriptor: int | None  # None where the system has no locks
    owner: weakref.ref[object]


_locks: dict[str, _Lock] = {}  # by the folder's resolved path
_locks_guard = threading.Lock()


def lock(folder: Path, owner: object) -> None:
    """Keep other processes, and other owners in this one, from running in the folder.

    The system lets go of the lock when the process and its forked children end, however they end; within a process it
    ends with its owner. Where there are no such locks (Windows, some network disks) only this process is watched. Raises
    FileExistsError when somebody else is in.
    """
    key = str(folder.resolve())
    with _locks_guard:
        held = _locks.get(key)
        if held is not None and held.process == os.getpid():
            if held.owner() is not None:
                raise FileExistsError(
                    f"another thread of this process is writing to {folder}; wait for it, or choose another folder"
                )
            _release(key)
        descriptor = _system_lock(folder)
        _locks[key] = _Lock(os.getpid(), descriptor, weakref.ref(owner))


class _Owner:
    """Who holds a folder's lock when it is no run."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block nobody else writes to the folder; see `lock`."""
    owner = _Owner()
    lock(folder, owner)
    try:
        yield
    finally:
        unlock(folder, owner)


def _system_lock(folder: Path) -> int | None:
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FileExistsError(
            f"another process is writing to {folder}; wait for it, or choose another folder"
        ) from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def unlock(folder: Path, owner: object) -> None:
    """Release the folder's lock if `owner` holds it."""
    key = str(folder.resolve())
    with _locks_guard:
        held = _locks.get(key)
        if held is not None and held.process == os.getpid() and held.owner() is owner:
            _release(key)


def _release(key: str) -> None:
    descriptor = _locks.pop(key).descriptor
    if fcntl is not None and descriptor is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it to forked children
        os.close(descriptor)


def remove_others(folder: Path, written: Collection[str]) -> None:
    """Remove the files of a folder that a reader would load and that were not written now."""
    for path in folder.iterdir():
        if path.name not in written and path.is_file() and any(fnmatch(path.name, pattern) for pattern in LOADED):
            path.unlink()


def finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and infinity, which JSON doesn't have, as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def _is_leftover(path: Path) -> bool:
    """A temporary name of checkpoint.beside (.NAME.PID.tmp) or of a checkpoint being removed."""
    return re.fullmatch(r"\..+\.\d+\.tmp|\.step-\d+\.tmp", path.name) is not None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. Damaged ones are left out, such as a last line that a crash cut short."""
    lines = [_parse_line(raw) for raw in Path(path).read_bytes().splitlines()]
    return [line for line in lines if line is not None]


def _parse_line(raw: bytes) -> dict[str, Any] | None:
    """One line of metrics; None when it is damaged."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None
