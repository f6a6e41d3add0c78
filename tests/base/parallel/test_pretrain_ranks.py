"""graft pretrain under torchrun: the same losses and weights as one process, one folder, kills lose nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed

from graft.base.checkpoint import load_tensors
from graft.base.data.shards import prepare
from graft.base.parallel.ranks import Ranks, buckets, join, refuse_ranks
from graft.base.runlog import read_metrics
from graft.base.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo, which is how ranks talk on CPUs",
)
STEPS = 6
SETTINGS = (
    *("--device", "cpu"),
    *("--set", "n_layers=1", "--set", "d_model=32", "--set", "n_heads=2", "--set", "max_seq_len=16"),
    *("--set", "eval_every=3", "--set", "eval_batches=2", "--set", "checkpoint_every=2", "--set", "keep=best,last"),
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    tokenizer = Tokenizer.train([folder / "a.txt"], vocab_size=280)
    tokenizer.save(folder / "tokenizer")
    prepare([folder / "a.txt"], tokenizer, folder / "tokens")
    return folder / "tokens", folder / "tokenizer"


def start(
    prepared: tuple[Path, Path], out: Path, n_ranks: int, *more: str, steps: int = STEPS
) -> list[subprocess.Popen[str]]:
    """The command on each rank, as torchrun starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, tokenizer = map(str, prepared)
    command = [sys.executable, "-m", "graft", "pretrain", "--data", data, "--tokenizer", tokenizer, "--out", str(out)]
    together = {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(together if n_ranks > 1 else {})}
    return [
        subprocess.Popen(
            [
                *command,
                *SETTINGS,
                "--steps",
                str(steps),
                *(() if "--batch-size" in more else ("--batch-size", "6")),
                *more,
            ],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n_ranks)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    spoken = [process.communicate(timeout=240) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, spoken, strict=True)]


def test_two_ranks_train_as_one_process(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """Laws: losses, norms and evaluations of every step and the weights are one process's (float32, 1e-5); one log, one
    voice."""
    alone = finish(start(prepared, tmp_path / "alone", 1))
    assert alone[0][0] == 0, alone
    pair = finish(start(prepared, tmp_path / "pair", 2))
    assert [code for code, *_ in pair] == [0, 0], pair
    assert pair[1][1] == ""  # rank 0 speaks
    lines = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("alone", "pair")}
    assert [line["step"] for line in lines["pair"]] == list(range(1, STEPS + 1))
    for one, other in zip(lines["alone"], lines["pair"], strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() & {"loss", "grad_norm", "lr", "n_labels", "n_tokens", "val_loss"}:
            assert one[key] == pytest.approx(other[key], rel=1e-5), key
    weights = [load_tensors(tmp_path / name / "model.safetensors") for name in ("alone", "pair")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "pair/summary.json").read_text())["n_ranks"] == 2
    # Started over in the same folder: no rank takes the former run's checkpoints for its own.
    # On another mesh, whose ranks hold halves of the model, the result is the same folder.
    again = finish(start(prepared, tmp_path / "pair", 2, "--force", "--set", "mesh=fsdp:2"))
    assert [code for code, *_ in again] == [0, 0], again
    sharded = load_tensors(tmp_path / "pair/model.safetensors")
    assert sharded.keys() == weights[0].keys()
    for name, tensor in sharded.items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-5, rtol=0)
    assert [line["loss"] for line in read_metrics(tmp_path / "pair/metrics.jsonl")] == pytest.approx(
        [line["loss"] for line in lines["pair"]], abs=1e-5
    )


def test_a_rank_without_rows(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """Law: a step of one sequence on two ranks leaves one of them nothing to read, and is the step of one process."""
    for n_ranks in (1, 2):
        found = finish(
            start(prepared, tmp_path / str(n_ranks), n_ranks, "--set", "micro_batch=1", "--batch-size", "1", steps=2)
        )
        assert all(code == 0 for code, *_ in found), found
    alone, pair = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("1", "2"))
    assert [line["loss"] for line in pair] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    assert [line["grad_norm"] for line in pair] == pytest.approx([line["grad_norm"] for line in alone], rel=1e-5)


def test_a_rank_that_dies_ends_the_other_and_loses_nothing(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """Law: the other rank ends with one line that says so and how to go on; one rank alone goes on from the checkpoint."""
    processes = start(prepared, tmp_path / "run", 2, "--set", "mesh=fsdp:2", steps=100_000)
    checkpoints = tmp_path / "run/checkpoints"
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].kill()
    (code, _, errors), (killed, *_) = finish(processes)
    assert killed == -signal.SIGKILL
    assert code == 1
    assert "rank 0 of 2: another rank ended" in errors
    assert "rank 1 has ended, last seen in step " in errors
    assert "run the same command with --resume" in errors
    assert "Traceback" not in errors
    done = max(int(path.name[5:]) for path in checkpoints.glob("step-*"))
    [(code, _, errors)] = finish(start(prepared, tmp_path / "run", 1, "--resume", steps=done + 1))
    assert code == 1
    assert "mesh='fsdp:2' needs 2 processes and there is one" in errors
    [(code, _, errors)] = finish(start(prepared, tmp_path / "run", 1, "--resume", "--set", "mesh=dp", steps=done + 1))
    assert code == 0, errors
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"] == done + 1


def test_a_refusal_is_one_line_on_each_rank(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """Law: rank 0 says what is wrong, the other ends at once and says where to look; nothing is written."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    found = finish(start(prepared, tmp_path / "out", 2))
    assert [code for code, *_ in found] == [1, 1]
    assert "is not empty and holds no graft run" in found[0][2]
    assert "rank 0 was refused; its message says why" in found[1][2]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_shares() -> None:
    """Law: every item of a step belongs to one rank."""
    items = list(range(7))
    assert [Ranks(rank, 3).share(items) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert Ranks().share(items) == items


def test_buckets_hold_one_dtype_and_a_limit() -> None:
    tensors = [torch.zeros(4), torch.zeros(4), torch.zeros(90), torch.zeros(2, dtype=torch.float64), torch.zeros(1)]
    assert [[t.numel() for t in bucket] for bucket in buckets(tensors, limit=40)] == [[4, 4], [90], [2], [1]]


def test_what_torchrun_must_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert join("cpu") == (Ranks(), "cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="RANK, MASTER_ADDR, MASTER_PORT is missing; start with torchrun"):
        join("cpu")
    with pytest.raises(ValueError, match="graft sft runs in one process; torchrun started 4"):
        refuse_ranks("sft")
