"""Who is missing when ranks wait in vain: each leaves word of where it is, and the others read it.

The word lies in the store through which the ranks met: one short write a step. A collective that breaks or times out tells
only that somebody didn't come; a rank to which that happens says so in the store, and whoever doesn't is missing.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

GRACE_S = 3.0  # for the others to notice too, before those that haven't are called missing
ANSWER_S = 10.0  # for the store's answer


class Store(Protocol):
    """What is used of torch.distributed's stores."""

    def set(self, key: str, value: str, /) -> object: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


@dataclass
class Watch:
    """Tells the other ranks where this one is, and finds those that don't answer; all by the store that they share."""

    store: Store
    rank: int
    n: int
    grace_s: float = GRACE_S
    place: str = "the start"

    def __post_init__(self) -> None:
        self.store.set(f"who/{self.rank}", json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self.at("the start")

    def at(self, place: str) -> None:
        """Tell the others where this rank is: `step 12`."""
        self.place = place
        self.store.set(f"at/{self.rank}", place)

    def missing(self) -> str:
        """Which ranks have not noticed that something is wrong, each with where it was last; call it when this one has.

        Waits up to `grace_s` for the others. Empty when all have noticed, or the store is gone.
        """
        try:
            return self._missing()
        except (RuntimeError, OSError, ValueError):  # the store's process has ended: rank 0's without torchrun
            return ""

    def _missing(self) -> str:
        self.store.set(f"waits/{self.rank}", self.place)
        until = time.monotonic() + self.grace_s
        absent = [rank for rank in range(self.n) if rank != self.rank]
        while absent:
            absent = [rank for rank in absent if not self.store.check([f"waits/{rank}"])]
            dead = [rank for rank in absent if self._is_dead(rank)]
            if dead or time.monotonic() > until:
                absent = dead or absent
                break
            time.sleep(0.05)
        return "; ".join(self._about(rank) for rank in absent)

    def _about(self, rank: int) -> str:
        said = self.store.get(f"at/{rank}").decode() if self.store.check([f"at/{rank}"]) else "nowhere"
        how = "has ended" if self._is_dead(rank) else "does not come"
        return f"rank {rank} {how}, last seen in {said}"

    def _is_dead(self, rank: int) -> bool:
        """Whether that rank's process is known to have ended: only on this machine can it be seen."""
        if not self.store.check([f"who/{rank}"]):
            return False
        who = json.loads(self.store.get(f"who/{rank}"))
        return who["host"] == socket.gethostname() and not is_alive(who["pid"])


def is_alive(pid: int) -> bool:
    """Whether the process runs on this machine; one that has ended and isn't yet waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):  # no Linux
        return True


def patience() -> timedelta:
    """How long a rank waits for another: GRAFT_RANK_TIMEOUT seconds, 600 when it isn't set. Raises ValueError."""
    text = os.environ.get("GRAFT_RANK_TIMEOUT", "") or "600"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise ValueError(f"GRAFT_RANK_TIMEOUT={text!r} is no time; write seconds, such as 600")
    return timedelta(seconds=seconds)
