"""One run folder for all ranks: rank 0 writes it, the others read it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .json_fields import read_json
from .parallel.ranks import Ranks
from .parallel.restart import resumes_itself
from .parallel.same import check_visible
from .runlog import METRICS_FILE, RUN_FILE, RunFolder, read_metrics


class FollowerFolder(RunFolder):
    """The run's folder as ranks other than 0 see it: they read where the run stands, and write nothing."""

    def __init__(self, folder: Path | str, *, stage: str, resume: bool) -> None:
        self.folder, self.stage = Path(folder), stage
        path = self.folder / RUN_FILE
        self.previous = read_json(path) if resume and path.exists() else None

    def __exit__(self, kind: object, error: object, trace: object) -> None: ...

    def start(self, config: Mapping[str, Any], *, seed: int) -> None:
        """Rank 0 writes run.json, and sets a former run aside; wait for it before looking into the folder."""
        del config, seed

    def open_metrics(self, *, after_step: int) -> list[dict[str, Any]]:
        path = self.folder / METRICS_FILE
        return [line for line in read_metrics(path) if line["step"] <= after_step] if path.exists() else []

    def log(self, line: Mapping[str, Any]) -> None:
        del line

    @contextmanager
    def results(self) -> Iterator[Path]:
        raise RuntimeError("rank 0 alone writes results")
        yield Path()  # a generator, as the other's is

    def finish(self, summary: Mapping[str, Any]) -> None:
        del summary

    def close_metrics(self) -> None: ...

    def close(self) -> None: ...


def open_run(ranks: Ranks, folder: Path | str, *, stage: str, resume: bool, force: bool) -> RunFolder:
    """RunFolder for rank 0, then the others' view of it. Ranks that were started again after a failure resume by themselves.

    Raises ValueError on the others when rank 0 was refused, and on all when one can't see the folder.
    """
    if ranks.most(int(ranks.is_first and resumes_itself(folder))):
        resume, force = True, False
    if ranks.is_first:
        try:
            run = RunFolder(folder, stage=stage, resume=resume, force=force)
        except BaseException:
            ranks.sum(1)
            raise
        ranks.sum(0)
        try:
            check_visible(ranks, run.folder)
        except BaseException:
            run.close()
            raise
        return run
    if ranks.sum(0) != [0.0]:
        raise ValueError("rank 0 was refused; its message says why")
    check_visible(ranks, Path(folder))
    return FollowerFolder(folder, stage=stage, resume=resume)
