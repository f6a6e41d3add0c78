"""What a run leaves: config and versions, a line a step that a crash can cut, nothing lost before the start."""

import json
import platform
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.base.runlog import RunFolder, locked, plain, read_metrics, versions


@dataclass
class Inner:
    path: Path
    sizes: tuple[int, ...]


@dataclass
class Outer:
    inner: Inner
    by_name: dict[str, Inner]


def started(folder: Path, *, resume: bool = False, force: bool = False) -> RunFolder:
    run = RunFolder(folder, stage="test", resume=resume, force=force)
    run.start({"x": 1}, seed=7)
    return run


def test_plain_by_hand() -> None:
    inner = Inner(Path("a/b"), (1, 2))
    expected = {"path": "a/b", "sizes": [1, 2]}
    assert plain(Outer(inner, {"k": inner})) == {"inner": expected, "by_name": {"k": expected}}
    assert plain([None, True, 1.5, (Path("x"),)]) == [None, True, 1.5, ["x"]]
    json.dumps(plain(Outer(inner, {})))


def test_run_json(tmp_path: Path) -> None:
    """Law: seed, versions, config and state of the run are there from the start, the summary at the end."""
    run = started(tmp_path / "a")
    state = json.loads((tmp_path / "a/run.json").read_text())
    assert (state["stage"], state["status"], state["seed"], state["config"]) == ("test", "running", 7, {"x": 1})
    assert state["versions"] == versions()
    assert versions()["python"] == platform.python_version()
    assert versions()["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # the wheel leaves +cu130 out
    run.finish({"loss": 1.5, "where": Path("p")})
    assert json.loads((tmp_path / "a/run.json").read_text()) == state | {"status": "finished", "files": []}
    assert json.loads((tmp_path / "a/summary.json").read_text()) == {"loss": 1.5, "where": "p"}


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    """Law: a process that is killed loses no line it has logged."""
    run = started(tmp_path / "a")
    assert run.open_metrics(after_step=0) == []
    for step in (1, 2):
        run.log({"step": step, "loss": 0.1 * step})
        assert read_metrics(tmp_path / "a/metrics.jsonl")[-1]["step"] == step
    run.close()
    run.close()


def test_resuming_drops_the_lines_past_the_checkpoint(tmp_path: Path) -> None:
    """Law: what a crash left behind the last checkpoint goes, a line that it cut too; nothing is there twice."""
    run = started(tmp_path / "a")
    run.open_metrics(after_step=0)
    for step in (1, 2, 3):
        run.log({"step": step})
    run.close()
    path = tmp_path / "a/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    again = started(tmp_path / "a", resume=True)
    assert [line["step"] for line in again.open_metrics(after_step=2)] == [1, 2]
    again.log({"step": 3, "second": True})
    again.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "second": True}]


def test_starting_over_takes_only_what_was_the_runs(tmp_path: Path) -> None:
    """Law: --force sets log, summary and checkpoints aside, at the start and not before; other files stay."""
    started(tmp_path / "a").finish({})
    checkpoint = tmp_path / "a/checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "a/notes.txt").write_text("mine")
    run = RunFolder(tmp_path / "a", stage="another", force=True)
    assert checkpoint.exists()
    assert (tmp_path / "a/summary.json").exists()
    run.start({}, seed=0)
    assert not checkpoint.exists()
    assert not (tmp_path / "a/summary.json").exists()
    assert (tmp_path / "a/notes.txt").read_text() == "mine"
    assert run.previous is None
    assert (tmp_path / "a/replaced/checkpoints/step-00000001").is_dir()
    run.finish({})
    assert not (tmp_path / "a/replaced").exists()
    with pytest.raises(ValueError, match="--resume and --force exclude each other"):
        RunFolder(tmp_path / "a", stage="another", resume=True, force=True)


def test_a_folder_that_is_not_ours_keeps_everything(tmp_path: Path) -> None:
    """Law: --force into a folder without a run.json removes nothing, even under names that graft uses."""
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        (tmp_path / name).write_text(name)
    run = started(tmp_path, force=True)
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        assert (tmp_path / name).read_text() == name
    del run


def test_a_forced_run_leaves_no_older_file_that_a_reader_would_load(tmp_path: Path) -> None:
    """Law: when the new results are in place, also by way of a resumption, others that are loaded by their names go; notes stay."""
    for name in ("config.json", "model.safetensors", "adapter_config.json", "notes.txt", "LICENSE"):
        (tmp_path / name).write_text("older")
    started(tmp_path, force=True).close()
    run = started(tmp_path, resume=True)
    with run.results() as folder:
        (folder / "config.json").write_text("new")
        (folder / "model-00001-of-00002.safetensors").write_text("new")
    assert (tmp_path / "adapter_config.json").exists()
    run.finish({})
    loaded = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix in (".json", ".safetensors")}
    assert loaded.keys() - {"run.json", "summary.json"} == {"config.json", "model-00001-of-00002.safetensors"}
    assert loaded["config.json"] == "new"
    assert {"notes.txt", "LICENSE"} <= {path.name for path in tmp_path.iterdir()}


def test_killed_while_starting_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a --force that dies while it clears the folder is resumed as the new run, without the old one's checkpoints."""
    started(tmp_path / "a").finish({})
    checkpoint = tmp_path / "a/checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    run = RunFolder(tmp_path / "a", stage="test", force=True)
    monkeypatch.setattr(RunFolder, "_set_aside", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.start({"x": 2}, seed=0)
    monkeypatch.undo()
    assert checkpoint.exists()
    run.close()
    again = RunFolder(tmp_path / "a", stage="test", resume=True)
    assert again.previous is not None
    assert again.previous["config"] == {"x": 2}
    again.start({"x": 2}, seed=0)
    assert not checkpoint.exists()


def test_an_empty_folder_can_be_resumed(tmp_path: Path) -> None:
    """Law: a run killed before its first file left a folder; the same command with --resume starts it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/.run.json.17.tmp").write_text("{")  # and the half-written file is swept away
    run = RunFolder(tmp_path / "a", stage="test", resume=True)
    assert run.previous is None
    run.start({}, seed=0)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run.json"]


def test_a_broken_run_json(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"stage": "test",')
    with pytest.raises(ValueError, match=r"run\.json line 1: not JSON"):
        RunFolder(tmp_path, stage="test", resume=True)


def test_two_processes_cannot_run_in_one_folder(tmp_path: Path) -> None:
    """Law: while a run is under way another process is refused, and touches nothing; killed or finished, it lets go."""
    code = "import sys; from graft.base.runlog import RunFolder; "
    code += (
        "RunFolder(sys.argv[1], stage='test', force=True).start({}, seed=0); print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "in\n"
        before = (tmp_path / "run.json").read_text()
        with pytest.raises(FileExistsError, match=r"another process is writing to .*; wait for it"):
            started(tmp_path, force=True)
        assert (tmp_path / "run.json").read_text() == before
        other.kill()
    run = started(tmp_path, resume=True)
    run.finish({})
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path, stage="test", resume=True):
        _ = 1 / 0
    done = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    assert done.stdout == "in\n"


# --- nothing lost, nothing locked for good ----------------------------------------------------------------------------


def test_a_damaged_line_loses_no_other(tmp_path: Path) -> None:
    """Law: a line damaged in the middle stays as it is, and those behind it are read and kept on resume."""
    run = started(tmp_path / "a")
    run.open_metrics(after_step=0)
    for step in (1, 2, 3):
        run.log({"step": step})
    run.close()
    path = tmp_path / "a/metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xff\x00\n[2]\n{"step": "2"}\n{"step": 2}\n{"step": 3}\n')
    again = started(tmp_path / "a", resume=True)
    assert again.open_metrics(after_step=2) == [{"step": 1}, {"step": 2}]
    again.log({"step": 3, "second": True})
    again.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "second": True}]
    assert b'{"st\xff\x00\n[2]\n' in path.read_bytes()


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    """Law: what fails before `start` leaves nothing behind, parents included; a folder that was there stays."""
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "new/deep", stage="test"):
        _ = 1 / 0
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "mine", stage="test"):
        _ = 1 / 0
    assert (tmp_path / "mine").is_dir()


def test_a_stopped_run_says_so(tmp_path: Path) -> None:
    """Law: an exception after `start` leaves status stopped and the reason; such a run can be resumed."""
    with pytest.raises(ValueError, match="too hot"), RunFolder(tmp_path / "a", stage="test") as run:  # noqa: PT012
        run.start({}, seed=0)
        raise ValueError("too hot")
    state = json.loads((tmp_path / "a/run.json").read_text())
    assert (state["status"], state["reason"]) == ("stopped", "ValueError: too hot")
    started(tmp_path / "a", resume=True).finish({})


def test_two_threads_cannot_run_in_one_folder(tmp_path: Path) -> None:
    """Law: the lock belongs to a run, not to the process; it ends with its run, closed or dropped."""
    first = started(tmp_path / "a")
    errors: list[str] = []

    def enter() -> None:
        try:
            started(tmp_path / "a", resume=True)
        except FileExistsError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "another thread of this process is writing to" in errors[0]
    del first
    started(tmp_path / "a", resume=True).close()
    with locked(tmp_path / "a"), pytest.raises(FileExistsError, match="another thread"):
        started(tmp_path / "a", resume=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"stage": 3, "status": "running", "config": {}}', r"stage is a whole number \(3\); expected a string"),
        ('{"stage": "test", "config": {}}', "status is missing"),
        ('{"stage": "test", "status": "running", "config": []}', r"config is a list \(\[\]\); expected an object"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_run_json_of_wrong_types(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=rf"run\.json.* {message}"):
        RunFolder(tmp_path, stage="test", resume=True)


def test_forcing_keeps_old_results_until_the_new_are_whole(tmp_path: Path) -> None:
    """Law: a forced run that fails leaves the former run's results in place; one that succeeds leaves its own alone."""
    run = started(tmp_path / "a")
    with run.results() as folder:
        (folder / "model.safetensors").write_text("old")
        (folder / "config.json").write_text("old")
    run.finish({"n": 1})
    with pytest.raises(OSError, match="full"), RunFolder(tmp_path / "a", stage="other", force=True) as run:  # noqa: PT012
        run.start({}, seed=0)
        with run.results() as folder:
            (folder / "config.json").write_text("new")
            raise OSError("the disk is full")
    assert (tmp_path / "a/model.safetensors").read_text() == (tmp_path / "a/config.json").read_text() == "old"
    assert json.loads((tmp_path / "a/replaced/summary.json").read_text()) == {"n": 1}
    with RunFolder(tmp_path / "a", stage="other", force=True) as run:
        run.start({}, seed=0)
        with run.results() as folder:
            (folder / "config.json").write_text("new")
        run.finish({"n": 2})
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "run.json", "summary.json"]
    assert (tmp_path / "a/config.json").read_text() == "new"
