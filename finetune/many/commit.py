"""Checkpoints of many jobs as one: all are written at the same step of the run, so that a resumed run goes on from there.

What an adapter's update is to the last bit depends on which others are in the batch: products are summed in blocks. So jobs that
went on from different steps would end a rounding error apart from a run that was never stopped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.json_fields import read_json
from ...base.training.checkpoints import checkpoints_in, remove_checkpoint
from .jobs import Job


class Clock:
    """Steps of the run, and who takes part: kept in each job's checkpoints beside its own state (base/train.py's ExtraState)."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.names: list[str] = []

    def state(self) -> dict[str, Any]:
        return {"run_step": self.step, "run_jobs": self.names}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing: the run's step is known before the first job joins."""


def drop_unfinished(jobs: Sequence[Job]) -> int:
    """Remove checkpoints that were written while a process was killed before it had written the others'; returns the run's
    step of those that are left, 0 without any.

    A checkpoint stays where the jobs that it names have none to go back to, such as after one's folder was removed.
    """
    written = {job.name: [(path, _extra(path)) for path in checkpoints_in(job.run.checkpoints)] for job in jobs}
    newest = max((about[0] for found in written.values() for _, about in found), default=0)
    of_newest = {name: [path for path, about in found if about[0] == newest] for name, found in written.items()}
    named = {other for found in written.values() for _, (step, names) in found if step == newest for other in names}
    missing = [job for job in jobs if job.name in named and not of_newest[job.name]]
    if not newest or not missing:
        return newest
    all_can_go_back = all(len(written[name]) > 1 for name, paths in of_newest.items() if paths)
    at_the_first = all(
        job.run.previous is not None and not written[job.name] for job in missing
    ) and all(len(written[name]) == 1 for name, paths in of_newest.items() if paths)  # fmt: skip
    if not (all_can_go_back or at_the_first):
        return newest
    for paths in of_newest.values():
        for path in paths:
            remove_checkpoint(path)
    return max((about[0] for found in written.values() for _, about in found if about[0] != newest), default=0)


def _extra(checkpoint: Path) -> tuple[int, list[str]]:
    """(step of the run, its jobs) of a checkpoint; (0, []) of one that a solo run wrote."""
    extra = read_json(checkpoint / "state.json").get("extra")
    extra = extra if isinstance(extra, dict) else {}
    step, names = extra.get("run_step", 0), extra.get("run_jobs", [])
    return (step if isinstance(step, int) else 0), [str(name) for name in names] if isinstance(names, list) else []
