"""What a run leaves behind: run.json (config, seed, versions), metrics.jsonl (a line a step), summary.json."""

import dataclasses
import json
import math
import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from .checkpoint import read_json, write_file, write_json

RUN_FILE, METRICS_FILE, SUMMARY_FILE = "run.json", "metrics.jsonl", "summary.json"


def versions() -> dict[str, str]:
    """The versions that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("graftlm", "torch", "triton", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON knows them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class RunFolder:
    """A run's output folder. Opening it refuses to overwrite a run unless told to resume or to start over.

    Nothing of a former run is touched before `start`, so a command that is refused in between loses none of it.
    """

    def __init__(self, folder: Path | str, *, stage: str, resume: bool = False, force: bool = False) -> None:
        self.folder, self.stage = Path(folder), stage
        self._metrics: TextIO | None = None
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; an output folder is due")
        if resume and force:
            raise ValueError("--resume and --force exclude each other: go on with the run, or start it over")
        if resume and not self.folder.exists():
            raise FileNotFoundError(f"{folder} holds no run to resume; leave --resume out to start one")
        self.folder.mkdir(parents=True, exist_ok=True)
        is_new_lock = lock(self.folder)  # before the state is read: another process must not change it from here on
        try:
            state = self._state_to_go_on(resume, force)
        except BaseException:
            if is_new_lock:
                unlock(self.folder)
            raise
        self.previous = state if resume else None
        self._ours = state is not None

    def _state_to_go_on(self, resume: bool, force: bool) -> dict[str, Any] | None:
        """What run.json says, None without one; raises FileExistsError when this run may not have the folder."""
        folder = self.folder
        state = read_json(folder / RUN_FILE) if (folder / RUN_FILE).exists() else None
        if force:
            return state
        if state is None:
            # An empty folder is a run killed before its first file: resuming it is starting it.
            if any(not _is_leftover(path) for path in folder.iterdir()):
                raise FileExistsError(f"{folder} is not empty and holds no graft run; choose another folder or --force")
            return None
        if state.get("stage") != self.stage:
            raise FileExistsError(
                f"{folder} holds a {state.get('stage')} run, this is {self.stage}; choose another folder or --force"
            )
        if not resume:
            done = "a finished run" if state.get("status") == "finished" else "an unfinished run"
            raise FileExistsError(f"{folder} holds {done}; use --resume to go on, or --force to start over")
        return state

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _sweep(self) -> None:
        """Remove half-written files of a process that was killed; see checkpoint.beside."""
        for leftover in [*self.folder.iterdir(), *self.checkpoints.glob("*")]:
            if _is_leftover(leftover):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _forget(self) -> None:
        """Remove what a former run of ours wrote; files that are not ours stay.

        The config.json of its result goes too, so that a folder whose new run is not finished never loads as the old one.
        """
        for checkpoint in self.checkpoints.glob("step-*"):
            shutil.rmtree(checkpoint)
        for name in (METRICS_FILE, SUMMARY_FILE, "config.json", "adapter_config.json"):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def start(self, config: dict[str, Any], *, seed: int) -> None:
        """Write run.json with the resolved config; when not resuming, what a former run left goes.

        `starting` stands in run.json while it goes, so that a process killed then is resumed as the new run it was.
        """
        self._sweep()
        self._state = {
            "stage": self.stage,
            "status": "running",
            "seed": seed,
            "command": sys.argv,
            "versions": versions(),
            "config": plain(config),
        }
        if self.previous is None or self.previous.get("status") == "starting":
            write_json(self.folder / RUN_FILE, self._state | {"status": "starting"})
            if self._ours:
                self._forget()
        write_json(self.folder / RUN_FILE, self._state)

    def open_metrics(self, *, after_step: int) -> list[dict[str, Any]]:
        """Open metrics.jsonl to append; lines past `after_step` (from before a crash) are dropped. Returns those kept."""
        path = self.folder / METRICS_FILE
        kept = [line for line in read_metrics(path) if line["step"] <= after_step] if path.exists() else []
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = path.open("a", encoding="utf-8")
        return kept

    def log(self, line: dict[str, Any]) -> None:
        """Append one line and hand it to the system, so that a killed process loses none."""
        assert self._metrics is not None, "open_metrics comes first"
        self._metrics.write(json.dumps(finite(line), allow_nan=False) + "\n")
        self._metrics.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json and mark the run as finished."""
        write_json(self.folder / SUMMARY_FILE, finite(plain(summary)))
        write_json(self.folder / RUN_FILE, self._state | {"status": "finished"})
        self.close()

    def close(self) -> None:
        """Close metrics.jsonl and let other processes into the folder."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        unlock(self.folder)


_locks: dict[tuple[int, int], tuple[int, int]] = {}  # device and inode of a folder -> the process, and its descriptor


def lock(folder: Path) -> bool:
    """Keep other processes from running in the folder; True when this process didn't do so already.

    The system lets go of the lock when the process and its forked children end, however they end. Where there are no such
    locks (Windows, some network disks) nothing is kept out. Raises FileExistsError when another process is in.
    """
    if fcntl is None:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    about = os.fstat(descriptor)
    if _locks.get((about.st_dev, about.st_ino), (0, 0))[0] == os.getpid():
        os.close(descriptor)
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FileExistsError(
            f"another process is training in {folder}; wait for it, or choose another folder"
        ) from None
    except OSError:
        os.close(descriptor)
        return False
    _locks[about.st_dev, about.st_ino] = os.getpid(), descriptor
    return True


def unlock(folder: Path) -> None:
    """Let others in, if it was this process that kept them out. A folder that is gone keeps nobody out."""
    try:
        about = folder.stat()
    except OSError:
        return
    process, descriptor = _locks.get((about.st_dev, about.st_ino), (0, 0))
    if fcntl is not None and process == os.getpid():
        del _locks[about.st_dev, about.st_ino]
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it to forked children
        os.close(descriptor)


def finite(line: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity, which JSON doesn't have, as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def _is_leftover(path: Path) -> bool:
    """A temporary name of checkpoint.beside (.NAME.PID.tmp) or of a checkpoint being removed."""
    return re.fullmatch(r"\..+\.\d+\.tmp|\.step-\d+\.tmp", path.name) is not None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
