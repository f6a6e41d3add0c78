"""Many jobs resumed: all from one step of the run, those that ended left alone, new ones joining, left-out trials staying out."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.base.runlog import read_metrics
from graft.base.training.checkpoints import checkpoints_in
from graft.finetune.many import commit, sweep
from graft.finetune.many import run as many
from graft.finetune.many.commit import drop_unfinished
from graft.finetune.many.predict import Plan
from graft.finetune.many.trainer import Trainer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "bird", "in", "tree"]


@pytest.fixture(autouse=True)
def _no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second, and decides nothing."""
    plan = lambda config, ready, **how: Plan(len(ready), how["at_once"] or len(ready), "cpu", 0, 0.0, 0.0, 1)  # noqa: E731
    monkeypatch.setattr(many, "plan_jobs", plan)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 9))), "completion": " cat"} for _ in range(12)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def three_jobs(rows: Path, out: Path) -> list[dict[str, Any]]:
    """Unlike steps, ranks and checkpoints."""
    shared = {"data": rows, "batch_size": 2, "warmup_steps": 0}
    return [
        {**shared, "out": out / "a", "steps": 6, "rank": 2, "seed": 1, "checkpoint_every": 2, "dropout": 0.2},
        {**shared, "out": out / "b", "steps": 9, "rank": 4, "seed": 2, "checkpoint_every": 5},
        {**shared, "out": out / "c", "steps": 4, "rank": 3, "seed": 3, "checkpoint_every": 3},
    ]


def outcome(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")], load_file(
        folder / "adapter_model.safetensors"
    )


def assert_equal(folder: Path, other: Path) -> None:
    """To the last bit."""
    (losses, weights), (expected, theirs) = outcome(folder), outcome(other)
    assert losses == expected
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights.items())


def stop_at(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """The n-th step of the run raises, as a crash would."""
    step, count = Trainer.step, 0

    def stopping(self: Trainer, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == n:
            raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(Trainer, "step", stopping)


@pytest.mark.parametrize("n", [4, 8])
def test_unlike_checkpoints_are_one(
    n: int, base_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: whatever each job's checkpoints and end, two at a time and the third when one has ended, a run that was stopped
    and resumed is to the bit the one that was not."""
    graft.sft_many(base=base_dir, jobs=three_jobs(rows, tmp_path / "whole"), at_once=2)
    jobs = three_jobs(rows, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_at(patch, n)
        with pytest.raises(KeyboardInterrupt):
            graft.sft_many(base=base_dir, jobs=jobs, at_once=2)
    summaries = graft.sft_many(base=base_dir, jobs=jobs, at_once=2, resume=True)
    assert [summary["steps"] for summary in summaries] == [6, 9, 4]
    for name in "abc":
        assert_equal(tmp_path / "stopped" / name, tmp_path / "whole" / name)


def test_a_commit_that_was_cut_short_is_dropped(
    base_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: killed when one job has written its checkpoint and the other hasn't, both go back to the one before."""
    jobs = three_jobs(rows, tmp_path)[:2]
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            graft.sft_many(base=base_dir, jobs=jobs)
    checkpoints = tmp_path / "a/checkpoints"
    assert [path.name for path in checkpoints_in(checkpoints)] == ["step-00000004"]
    whole = checkpoints / "step-00000004"
    ahead = checkpoints / "step-00000006"
    ahead.mkdir()
    for path in whole.iterdir():
        (ahead / path.name).write_bytes(path.read_bytes())
    state = json.loads((ahead / "state.json").read_text())
    state |= {"step": 6, "extra": state["extra"] | {"run_step": 6}}
    (ahead / "state.json").write_text(json.dumps(state))

    class Folder:
        def __init__(self, name: str) -> None:
            self.name, self.run, self.checkpoints, self.previous = name, self, tmp_path / name / "checkpoints", {}

    folders: Any = [Folder(name) for name in "ab"]
    for folder, job in zip(folders, jobs, strict=True):
        folder.name = str(job["out"])
    assert drop_unfinished(folders[:1]) == 6, "a job without the other knows of no other"
    assert drop_unfinished(folders) == 4
    assert [path.name for path in checkpoints_in(checkpoints)] == ["step-00000004"]
    (tmp_path / "b/checkpoints").rename(tmp_path / "gone")
    folders[1].previous = None
    assert drop_unfinished(folders) == 4, "a job whose folder was removed starts over; the other keeps what it has"
    assert whole.exists()


def test_a_new_job_joins_a_resumed_run(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: --resume with one more job trains that one; those that ended are left alone, byte for byte."""
    jobs = three_jobs(rows, tmp_path)
    first = graft.sft_many(base=base_dir, jobs=jobs[:2])
    before = {path: path.stat().st_mtime_ns for job in jobs[:2] for path in job["out"].rglob("*") if path.is_file()}
    summaries = graft.sft_many(base=base_dir, jobs=jobs, resume=True)
    assert summaries[:2] == first
    assert summaries[2]["steps"] == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert graft.sft_many(base=base_dir, jobs=jobs, resume=True) == summaries
    longer = [job | {"steps": job["steps"] + 2} for job in jobs]
    assert [summary["steps"] for summary in graft.sft_many(base=base_dir, jobs=longer, resume=True)] == [8, 11, 6]


def test_a_job_that_failed_keeps_nobody_back(
    base_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: a job that diverged before its first checkpoint takes no checkpoint of the others with it."""
    jobs = three_jobs(rows, tmp_path / "one")[:2]
    jobs[1] |= {"learning_rate": 1e38, "alpha": 8.0}
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            graft.sft_many(base=base_dir, jobs=jobs)
    kept = checkpoints_in(tmp_path / "one/a/checkpoints")
    assert kept
    monkeypatch.setattr(commit, "remove_checkpoint", lambda path: pytest.fail(f"{path} was dropped"))
    summaries = graft.sft_many(base=base_dir, jobs=jobs, resume=True)
    assert "loss nan" in summaries[1]["error"]
    assert summaries[0]["steps"] == 6
    assert len(read_metrics(tmp_path / "one/a/metrics.jsonl")) == 6


def test_halving_goes_on_where_it_was(
    base_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: a sweep with halving that was stopped and resumed chooses, and trains, what it would have."""

    def run(out: Path, resume: bool) -> dict[str, Any]:
        grid = {"learning_rate": [1e-6, 1e-4, 1e-3, 1e-2]}
        return sweep.run_sweep(
            base=base_dir, data=rows, eval_data=rows, out=out, grid=grid, halving=True, resume=resume, progress=False,
            settings={"steps": 8, "batch_size": 2, "rank": 2, "warmup_steps": 0, "checkpoint_every": 3},
        )  # fmt: skip

    expected = run(tmp_path / "whole", False)
    assert sorted(line["steps"] for line in expected["trials"]) == [4, 4, 8, 8]
    for n in (6,):
        out = tmp_path / str(n)
        with monkeypatch.context() as patch:
            stop_at(patch, n)
            with pytest.raises(KeyboardInterrupt):
                run(out, False)
        assert run(out, True) == expected
        for line in expected["trials"]:
            found, whole = (read_metrics(folder / "trials" / line["trial"] / "metrics.jsonl")
                            for folder in (out, tmp_path / "whole"))  # fmt: skip
            assert [one["loss"] for one in found] == [one["loss"] for one in whole]
