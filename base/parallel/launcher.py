"""`graft launch`: torchrun on this machine, its failures told in one line.

torch.distributed.run starts the ranks, watches them, ends all when one has failed and, where told to, starts them again.
Here its report of many lines becomes one that names the rank that failed first and why.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

LAUNCHED = "GRAFT_LAUNCHED"  # set for the ranks: the launcher speaks for them
SHUTDOWN_S = 120  # for ranks to write a checkpoint after a signal, before they are killed
CONSEQUENCES = ("another rank ended", "rank 0 was refused", "a rank differs from rank 0")  # of another rank's failure


def launch(command: Sequence[str], *, n_ranks: int, max_restarts: int = 0, rank_timeout_s: float | None = None) -> int:
    """Run `graft COMMAND...` on n ranks of this machine; returns the exit code: the failed rank's, or 128 + a signal's.

    Raises ValueError for numbers that can't work.
    """
    if n_ranks < 1 or max_restarts < 0:
        raise ValueError(f"--nproc {n_ranks} must be >= 1 and --max-restarts {max_restarts} >= 0")
    if not command:
        raise ValueError("graft launch needs a command to run, such as: graft launch --nproc 2 pretrain --data ...")
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_ranks)))
    if rank_timeout_s is not None:
        os.environ["GRAFT_RANK_TIMEOUT"] = f"{rank_timeout_s:g}"
        from .watch import patience

        patience()  # raises for no time
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    with tempfile.TemporaryDirectory(prefix="graft-launch-") as logs:
        torchrun = ["--standalone", f"--nproc-per-node={n_ranks}", f"--max-restarts={max_restarts}"]
        torchrun += [f"--log-dir={logs}", "--monitor-interval=0.1", f"--shutdown-timeout={SHUTDOWN_S}"]
        _quiet(max_restarts)
        try:
            run(parse_args([*torchrun, "-m", "graft", *command]))
        except ChildFailedError as error:
            rank, failure = first_cause(error.failures)
            print(f"graft: {describe(rank, n_ranks, failure)}", file=sys.stderr)
            return exit_code(failure)
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def first_cause(failures: "Mapping[int, ProcessFailure]") -> "tuple[int, ProcessFailure]":
    """The rank whose failure the others' follow from: killed, else with an error of its own, else the earliest.

    torchrun tells them by whole seconds; ranks that lose a neighbour end in the same one. SIGTERM comes from the agent.
    """

    def order(rank: int) -> tuple[int, int, int]:
        failure = failures[rank]
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            kind = 0
        elif failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM):
            kind = 3
        else:
            kind = 2 if any(words in message_of(failure) for words in CONSEQUENCES) else 1
        return kind, failure.timestamp, rank

    first = min(failures, key=order)
    return first, failures[first]


def message_of(failure: "ProcessFailure") -> str:
    """The rank's own line on why it ended; empty when it left none."""
    message = failure.error_file_data.get("message") if isinstance(failure.error_file_data, dict) else None
    return str(message.get("message", "")) if isinstance(message, dict) else ""


def describe(rank: int, n_ranks: int, failure: "ProcessFailure") -> str:
    """One line on a rank's end."""
    who = f"rank {rank} of {n_ranks}"
    if failure.exitcode < 0:
        hint = "; the machine may be out of memory" if failure.exitcode == -signal.SIGKILL else ""
        return (
            f"{who} (process {failure.pid}) was ended by {failure.signal_name()}{hint}; the others were stopped. To go on "
            "from the last checkpoint, run the same command with --resume, or start with --max-restarts 3"
        )
    message = message_of(failure)
    said = message or f"ended with exit code {failure.exitcode}"
    return said if said.startswith("rank ") else f"{who}: {said}"


def exit_code(failure: "ProcessFailure") -> int:
    """As a shell gives it: 137 for SIGKILL."""
    return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode


def tells_launcher(message: str, code: int) -> bool:
    """In a rank that `graft launch` started: leave the last line to the launcher. Returns whether it is in good hands.

    An orderly end after a signal is rank 0's to tell.
    """
    if not os.environ.get(LAUNCHED):
        return False
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return os.environ.get("RANK", "0") != "0"
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    report = {"message": message, "extraInfo": {"timestamp": str(int(time.time())), "py_callstack": ""}}
    try:
        Path(path).write_text(json.dumps({"message": report}), encoding="utf-8")
    except OSError:
        return False
    return True


class _Restarts(logging.Handler):
    """Prints a line when the agent is about to start the ranks again, which it says in its log alone."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.done, self.most = 0, most

    def emit(self, record: logging.LogRecord) -> None:
        """Other lines of the log are dropped."""
        if not record.getMessage().startswith("failed (exitcode") or not isinstance(record.args, tuple):
            return
        self.done += 1
        if self.done <= self.most:
            code, rank, *_ = record.args
            how = (
                f"was ended by signal {-code}" if isinstance(code, int) and code < 0 else f"ended with exit code {code}"
            )
            print(f"graft: rank {rank} {how}; restart {self.done} of {self.most}", file=sys.stderr)


def _quiet(max_restarts: int) -> None:
    """Keep torch.distributed's log from the screen."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]
    for logger in map(logging.getLogger, names):
        logger.handlers = [logging.NullHandler()]
        logger.propagate = False
    watched = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    watched.handlers, watched.propagate = [_Restarts(max_restarts)], False
    watched.setLevel(logging.ERROR)
