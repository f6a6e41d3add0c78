"""A reward function of the user's own: imported here, or run in a child process that is killed when it takes too long.

The child is this file, `python -m graft.finetune.align.reward_child MODULE FUNCTION`. It reads requests from stdin, JSON
lines of [prompt, completion, row], and writes JSON lines to stdout: one when the import is done, then
one a request, {"value": number} or {"error": text}. What the function prints goes to stderr.
"""

import ctypes
import importlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, cast

Row = Mapping[str, Any]
Reward = Callable[[str, str, Row], float]  # (prompt, completion, row) -> reward

START_TIMEOUT_S = 120.0  # for a child to import the user's module


def import_function(module: str, function: str) -> Reward:
    """`function` of `module`, looked for in the working directory too. Raises ValueError that says why it can't be had."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # a script without a __main__ guard may call sys.exit()
        raise ValueError(f"reward {module}:{function} can't be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"module {module} has no function {function!r}; give module:function")
    return cast(Reward, found)


class ChildReward:
    """A reward in a process of its own, which is killed when a call takes longer than timeout_s, and started anew after.

    Raises ValueError when it can't be imported there; a call raises TimeoutError, or RuntimeError with the child's error.
    """

    def __init__(self, module: str, function: str, *, timeout_s: float) -> None:
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise ValueError(f"timeout_s={timeout_s} must be > 0 and finite")
        self.module, self.function, self.timeout_s = module, function, timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._start()

    def __call__(self, prompt: str, completion: str, row: Row) -> float:
        child = self._child or self._start()
        request = json.dumps([prompt, completion, dict(row)]).encode() + b"\n"  # ASCII: a line break inside is escaped
        assert child.stdin is not None
        try:
            child.stdin.write(request)
            child.stdin.flush()
        except BrokenPipeError:
            self.close()
            raise RuntimeError("its process ended between two calls") from None
        reply = self._read(self.timeout_s)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["value"]

    def _start(self) -> subprocess.Popen[bytes]:
        # Not multiprocessing: its children import the user's main script again.
        command = [sys.executable, "-m", "graft.finetune.align.reward_child", self.module, self.function]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        try:
            reply = self._read(START_TIMEOUT_S)
        except (RuntimeError, TimeoutError) as error:
            raise ValueError(f"reward {self.module}:{self.function} can't be imported: {error}") from error
        if "error" in reply:
            self.close()
            raise ValueError(reply["error"])
        return self._child

    def _read(self, timeout_s: float) -> dict[str, Any]:
        """The child's next line. Kills it, and raises, when none comes in time or it has ended."""
        assert self._child is not None
        assert self._child.stdout is not None
        pipe, line = self._child.stdout.fileno(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(
                b"\n"
            ):  # the child writes a line at once, so this loop hardly ever goes around twice
                if not selector.select(timeout_s):
                    self.close()
                    raise TimeoutError(f"no result within {timeout_s:g} s")
                chunk = os.read(pipe, 65536)
                if not chunk:
                    code = self._child.wait()
                    self.close()
                    raise RuntimeError(f"its process ended with exit code {code}")
                line += chunk
        return json.loads(line)

    def close(self) -> None:
        """Kill the child and whatever it started."""
        child, self._child = self._child, None
        if child is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def __del__(self) -> None:
        if getattr(self, "_child", None) is not None:
            self.close()


def main(module: str, function: str) -> None:
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: a call that hangs must not outlive a parent that was killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**fields: object) -> None:
        replies.write(json.dumps(fields) + "\n")
        replies.flush()

    try:
        reward = import_function(module, function)
    except ValueError as error:
        reply(error=str(error))
        return
    reply(value=None)
    for request in sys.stdin.buffer:
        try:
            value = reward(*json.loads(request))
            reply(value=value if isinstance(value, str | None) else float(value))
        except (Exception, SystemExit) as error:
            reply(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
