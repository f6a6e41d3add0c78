"""A rank that torchrun's elastic agent has started again after a failure (--max-restarts) goes on by itself."""

import os
from collections.abc import Mapping
from pathlib import Path

from ..json_fields import read_json

RUN_FILE = "run.json"


def launch_id() -> str | None:
    """Of the agent that started this process, the same after a restart; None without one.

    The run's id alone can be torchrun's default, `none`, so the agent's process belongs to it.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{run_id}-{os.getppid()}" if run_id else None


def restarts() -> int:
    """How often the agent has started the ranks again."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(text) if text.isdecimal() else 0


def resumes_itself(folder: Path | str) -> bool:
    """Whether this is a restart of a run that the same agent had started in the folder: then it goes on from there,
    whatever --resume and --force said at first."""
    path = Path(folder) / RUN_FILE
    if not restarts() or not path.is_file():
        return False
    try:
        state: Mapping[str, object] = read_json(path)
    except ValueError:
        return False
    return state.get("launch") == launch_id()
