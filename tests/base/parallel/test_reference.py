"""The readable forms of parallel training: three ranks give what one process gives; pipeline schedules as tables."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st

from graft.base.parallel.reference.pipeline import Task, bubble, kept, order, table

N_RANKS = 3
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo, which is how ranks talk on CPUs",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("ranks.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(N_RANKS), folder / "store", folder / f"{rank}.json"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(N_RANKS)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(N_RANKS)]


@pytest.mark.parametrize("case", ["one bucket", "a bucket a parameter", "micro-batches", "sharded"])
def test_ranks_train_as_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    """Law: after five steps all ranks hold the weights of one process that read all rows, whatever each began with."""
    weights = [found[case]["weights"] for found in ranks]
    assert weights[0] == weights[1] == weights[2]
    # Not the first: net 0 is everybody's after the broadcast, its buffer included.
    assert weights[0] == pytest.approx(ranks[0]["alone"]["weights"], abs=1e-5)


def test_buckets(ranks: list[dict[str, Any]]) -> None:
    """Known answer: four linears but the frozen one are six trained tensors; the tied one counts once."""
    assert [ranks[0][case]["buckets"] for case in ("one bucket", "a bucket a parameter")] == [1, 6]
    assert 1 < ranks[0]["micro-batches"]["buckets"] < 6


def test_each_rank_keeps_a_share_of_the_state(ranks: list[dict[str, Any]]) -> None:
    """Law: the ranks' states add up to AdamW's 8 bytes a trained number (and 4 a tensor for its step)."""
    n_numbers, n_tensors = 6 * 12 + 12 + 12 * 6 + 6 + 3 * 3 + 3, 6
    shares = [found["sharded"]["state_bytes"] for found in ranks]
    assert sum(shares) == 8 * n_numbers + 4 * n_tensors
    assert all(0 < share < 8 * n_numbers for share in shares)


def test_two_backward_passes_without_saying_so_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert all("wrap all but the last in no_sync()" in found["second backward"] for found in ranks)


def test_ranks_whose_losses_reach_different_layers(ranks: list[dict[str, Any]]) -> None:
    """Parity: the mean of all ranks' gradients, though their buckets become full in different orders."""
    assert all(max(found["paths"]["gaps"]) < 1e-6 for found in ranks)


def test_groups_of_a_sharded_optimizer(ranks: list[dict[str, Any]]) -> None:
    """Parity with AdamW of one process: a generator, names, defaults that a schedule reads, a later group, a loaded state."""
    assert all(found["groups"]["gap"] < 1e-6 for found in ranks)
    assert all(found["groups"]["rates"] == pytest.approx([0.0005, 0.05]) for found in ranks)


def test_ring(ranks: list[dict[str, Any]]) -> None:
    """Parity with torch's all-reduce; every rank has the same bits; 2 (n - 1) / n of 21 numbers are sent."""
    assert all(found["ring"]["gap"] < 1e-6 for found in ranks)
    assert ranks[0]["ring"]["sum"] == ranks[1]["ring"]["sum"] == ranks[2]["ring"]["sum"]
    assert all(found["ring"]["sent"] == 2 * (N_RANKS - 1) * 21 * 4 // N_RANKS for found in ranks)


def test_tensor_parallel(ranks: list[dict[str, Any]]) -> None:
    """Parity: a column and a row linear give the whole ones' output, input gradient and their parts of the gradients."""
    for found in ranks:
        assert max(found["tensor parallel"]["gaps"]) < 2e-5
        assert "out_features=13 is not divisible by 3 ranks; use 1, 13 ranks" in found["tensor parallel"]["message"]


def test_a_schedule_by_hand() -> None:
    """Known answer: two ranks, three micro-batches, one forward and one backward pass in turn."""
    text = [" ".join(f"{t.kind}{t.micro_batch}" if t else ".." for t in row) for row in table("1f1b", 2, 3)]
    assert text == ["F0 F1 .. B0 F2 B1 .. B2", ".. F0 B0 F1 B1 F2 B2 .."]


@given(n_ranks=st.integers(1, 6), n_micro=st.integers(1, 9), schedule=st.sampled_from(["gpipe", "1f1b"]))
def test_schedules(n_ranks: int, n_micro: int, schedule: str) -> None:
    """Laws: each rank runs every pass once; what is kept and the bubble are the papers'."""
    rows = table(schedule, n_ranks, n_micro)
    for rank, row in enumerate(rows):
        tasks = [task for task in row if task is not None]
        assert sorted(tasks) == sorted(Task(kind, m) for kind in ("F", "B") for m in range(n_micro))
        assert tasks == order(schedule, rank, n_ranks, n_micro)
    most = [n_micro if schedule == "gpipe" else min(n_ranks - rank, n_micro) for rank in range(n_ranks)]
    assert kept(rows) == most
    assert bubble(rows) == pytest.approx((n_ranks - 1) / (n_micro + n_ranks - 1))


def test_schedules_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'zb'; choose gpipe or 1f1b"):
        order("zb", 0, 2, 4)
    with pytest.raises(ValueError, match="sizes must be >= 1"):
        order("gpipe", 0, 2, 0)
