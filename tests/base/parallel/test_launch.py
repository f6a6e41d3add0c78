"""graft launch: torchrun's ranks, restarts that go on by themselves, one line for a failure, the exit code and signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from graft.base.data.shards import prepare
from graft.base.parallel.launcher import describe, exit_code, first_cause, launch, tells_launcher
from graft.base.pretrain import pretrain
from graft.base.runlog import read_metrics
from graft.base.tokenizer.tokenizer import Tokenizer

SIZES = {
    "n_layers": 1,
    "d_model": 32,
    "n_heads": 2,
    "max_seq_len": 16,
    "batch_size": 4,
    "checkpoint_every": 5,
    "eval_every": 0,
    "schedule": "constant",
}


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    settings = [word for name, value in SIZES.items() for word in ("--set", f"{name}={value}")]
    command = [
        "pretrain",
        "--data",
        str(folder / "tokens"),
        "--tokenizer",
        str(folder / "tokenizer"),
        "--device",
        "cpu",
    ]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "graft",
            "launch",
            "--nproc",
            "2",
            *options,
            *command,
            "--out",
            str(folder / "run"),
            *settings,
            "--steps",
            "1000000",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank that the launcher has started."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError("no such rank")


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max([int(path.name[5:]) for path in folder.glob("run/checkpoints/step-*")], default=0)


def wait_for(checkpoint: int, folder: Path) -> None:
    deadline = time.monotonic() + 200
    while newest(folder) < checkpoint:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not dist.is_available() or not dist.is_gloo_available(),
    reason="needs /proc, and gloo for ranks on CPUs",
)
def test_a_killed_rank_is_started_again_and_loses_nothing(tmp_path: Path) -> None:
    """Laws: after kill -9 of a rank the restarted ranks go on from the last checkpoint; SIGTERM to the launcher leaves a
    checkpoint and gives 143; the losses are those of one process that nobody stopped (float32: 1e-4)."""
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    tokenizer = Tokenizer.train([tmp_path / "a.txt"], vocab_size=280)
    tokenizer.save(tmp_path / "tokenizer")
    prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "tokens")

    launcher = start(tmp_path, "--max-restarts", "1")
    wait_for(1, tmp_path)
    os.kill(rank_process(launcher.pid, 1), signal.SIGKILL)
    killed_at = newest(tmp_path)
    wait_for(killed_at + 6, tmp_path)  # rank 0 may still finish the checkpoint that was under way, five steps on
    launcher.send_signal(signal.SIGTERM)
    out, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert out == ""
    told = [line for line in errors.splitlines() if line.startswith("graft: ")]
    assert told[0] == "graft: rank 1 was ended by signal 9; restart 1 of 1"
    assert told[1].startswith("graft: stopped after step ")  # rank 0's word, and only its
    assert len(told) == 2
    assert "Traceback" not in errors

    steps = newest(tmp_path) + 1
    inputs = {"data": tmp_path / "tokens", "tokenizer": tmp_path / "tokenizer", "device": "cpu"}
    pretrain(**inputs, out=tmp_path / "run", resume=True, steps=steps)
    pretrain(**inputs, out=tmp_path / "alone", steps=steps, **SIZES)
    lines, alone = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "alone"))
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone], abs=1e-4)


def failure(code: int, message: str = "", *, at: int = 5) -> Any:
    """torchrun's record of a rank that failed."""
    data = {"message": {"message": message, "extraInfo": {}}} if message else {"message": ""}
    name = signal.Signals(-code).name if code < 0 else ""
    return SimpleNamespace(exitcode=code, pid=77, timestamp=at, error_file_data=data, signal_name=lambda: name)


def test_the_first_cause_is_told() -> None:
    """By hand: a killed rank before those that lost it; an error of its own before its consequences; what the agent ended
    last; of equals the earliest."""
    lost = failure(1, "rank 0 of 3: another rank ended or was silent", at=3)
    assert first_cause({0: lost, 1: failure(-9, at=4), 2: failure(-15, at=2)})[0] == 1
    assert first_cause({0: lost, 2: failure(1, "no such file")})[0] == 2
    assert first_cause({0: failure(1, "rank 0 was refused; its message says why"), 1: failure(143)})[0] == 0
    assert first_cause({0: failure(1, "x", at=9), 1: failure(1, "y", at=8)})[0] == 1
    assert first_cause({0: failure(-15, at=1), 1: failure(70)})[0] == 1
    assert describe(1, 3, failure(-9)).startswith(
        "rank 1 of 3 (process 77) was ended by SIGKILL; the machine may be out"
    )
    assert describe(1, 3, failure(-11)).startswith(
        "rank 1 of 3 (process 77) was ended by SIGSEGV; the others were stopped"
    )
    assert describe(2, 3, failure(1, "no such file")) == "rank 2 of 3: no such file"
    assert describe(0, 3, lost) == "rank 0 of 3: another rank ended or was silent"
    assert describe(0, 3, failure(70)) == "rank 0 of 3: ended with exit code 70"
    assert [exit_code(failure(code)) for code in (-9, 1, 70)] == [137, 1, 70]


def test_a_launched_rank_leaves_its_last_line_to_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws: without a launcher a rank speaks for itself; with one it writes the file that torchrun reads, and after a signal
    rank 0 alone speaks."""
    for name in ("GRAFT_LAUNCHED", "TORCHELASTIC_ERROR_FILE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert not tells_launcher("no such file", 1)
    monkeypatch.setenv("GRAFT_LAUNCHED", "1")
    assert not tells_launcher("no such file", 1)
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert tells_launcher("no such file", 1)
    assert json.loads(path.read_text())["message"]["message"] == "no such file"
    for rank, silent in (("0", False), ("1", True)):
        monkeypatch.setenv("RANK", rank)
        assert tells_launcher("stopped", 143) is silent
        assert tells_launcher("stopped", 130) is silent
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))
    assert not tells_launcher("no such file", 1)


def test_impossible_launches() -> None:
    with pytest.raises(ValueError, match="--nproc 0 must be >= 1 and --max-restarts 0 >= 0"):
        launch(["pretrain"], n_ranks=0)
    with pytest.raises(ValueError, match="graft launch needs a command to run"):
        launch([], n_ranks=2)
