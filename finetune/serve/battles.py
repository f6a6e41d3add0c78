"""The votes between two answers side by side, one JSON line each: what `graft eval`'s arena reads.

{"a": "spam", "b": "tone", "winner": "a", "prompt": "...", "answer_a": "...", "answer_b": "...", "time": "2026-11-28T15:00:00"}
"""

import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from time import strftime

FILE = "battles.jsonl"


class Arena:
    """A folder whose battles.jsonl grows by a line a vote. `write` may be called from any thread.

    Raises OSError where the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._lock = folder / FILE, threading.Lock()
        with self._path.open("a+b") as file:
            file.seek(0)
            content = file.read()
            if content and not content.endswith(b"\n"):  # a process that was killed within a line
                file.write(b"\n")
        self.n_battles = sum(bool(line.strip()) for line in content.splitlines())

    def write(self, battle: Mapping[str, object]) -> None:
        """Add a battle, whole and on disk before this returns. Raises OSError where that fails; nothing of it stays then."""
        line = json.dumps({**battle, "time": strftime("%Y-%m-%dT%H:%M:%S")}, ensure_ascii=False) + "\n"
        with self._lock, self._path.open("ab", buffering=0) as file:
            before, data = file.tell(), line.encode()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)  # half a line would spoil the next one
                raise
            self.n_battles += 1
