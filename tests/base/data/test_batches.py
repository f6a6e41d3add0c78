"""Pretraining windows: each once an epoch, a pure function of seed and step, targets one token ahead."""

from pathlib import Path

import numpy as np
import pytest
import torch

from graft.base.data.batches import WindowBatches, collate, evaluation_batches
from graft.base.data.shards import TokenShards
from graft.base.data.windows import StreamWindows, make_windows


def shards(folder: Path, n_tokens: int) -> TokenShards:
    """Two files that hold the ids 0, 1, 2, ...: a token tells where it stood."""
    ids = np.arange(n_tokens, dtype=np.uint16)
    ids[: n_tokens // 3].tofile(folder / "train-00000.bin")
    ids[n_tokens // 3 :].tofile(folder / "train-00001.bin")
    entry = {"n_tokens": n_tokens, "n_bytes": 1, "n_documents": 1, "files": ["train-00000.bin", "train-00001.bin"]}
    return TokenShards(folder, "train", {"dtype": "uint16", "eos_token_id": 65535, "splits": {"train": entry}})


def stream(
    tokens: TokenShards, *, seq_len: int, batch_size: int, micro_batch: int, seed: int, n_readers: int = 1
) -> WindowBatches:
    windows = make_windows("stream", tokens, seq_len=seq_len, seed=seed)
    return WindowBatches([windows], batch_size=batch_size, micro_batch=micro_batch, n_readers=n_readers)


def test_windows_by_hand(tmp_path: Path) -> None:
    """Worked by hand: windows of 3 at 0 and 4 of 0, 1, 2, ...; the first crosses the files' border at 3."""
    tokens = shards(tmp_path, 10)
    batch = collate([(tokens, [(1, 5)]), (tokens, [(4, 6), (6, 8)])], 3)
    assert batch["ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["targets"].tolist() == [[2, 3, 4], [5, 6, 7]]
    assert batch["ids"].dtype == torch.int64


def test_each_window_once_an_epoch(tmp_path: Path) -> None:
    """Law: within an epoch no token is an input twice, and all but the slack at both ends are; the next epoch has
    another order and another cut."""
    tokens = shards(tmp_path, 1000)
    windows = StreamWindows(tokens, seq_len=16, seed=5)
    assert windows.n_windows == (1000 - 1 - 15) // 16 == 61
    starts = windows.starts(np.arange(9 * 61))  # nine epochs
    epochs = starts.reshape(9, 61)
    for epoch in epochs:
        assert len(set(epoch)) == 61
        assert len(set(epoch % 16)) == 1
        assert 0 <= epoch.min() < 16
        assert epoch.max() + 16 < 1000
        assert np.all(np.diff(np.sort(epoch)) == 16)
    assert len({tuple(epoch) for epoch in epochs}) == 9
    assert len(set(epochs.min(1))) > 4, "the cuts move"
    assert not np.all(np.diff(epochs[0]) == 16), "the order is shuffled"


def test_a_step_is_a_pure_function_of_seed_and_step(tmp_path: Path) -> None:
    """Law: asked in any order, by any object, after any use of the global generators: the same batch."""
    tokens = shards(tmp_path, 500)

    def make(seed: int) -> WindowBatches:
        return stream(tokens, seq_len=8, batch_size=4, micro_batch=4, seed=seed)

    forward = [make(1).batch_at(step)[0]["ids"] for step in range(40)]
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    one = make(1)
    backward = [one.batch_at(step)[0]["ids"] for step in reversed(range(40))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(make(2).batch_at(0)[0]["ids"], forward[0])


def test_micro_batches_are_the_batch(tmp_path: Path) -> None:
    """Law: cut into micro-batches of 2, a batch of 5 is the same rows in the same order: 2, 2 and 1."""
    tokens = shards(tmp_path, 300)
    whole, parts = (stream(tokens, seq_len=8, batch_size=5, micro_batch=m, seed=0) for m in (99, 2))
    [batch], cut = whole.batch_at(7), parts.batch_at(7)
    assert [len(one["ids"]) for one in cut] == [2, 2, 1]
    for key in ("ids", "targets"):
        assert torch.equal(batch[key], torch.cat([one[key] for one in cut]))
    assert torch.equal(batch["targets"], batch["ids"] + 1)


def test_the_least_data(tmp_path: Path) -> None:
    """Law: seq_len + 1 tokens are one window, again and again; one less is refused, and less than one batch."""
    one = stream(shards(tmp_path, 9), seq_len=8, batch_size=1, micro_batch=2, seed=0)
    assert one.sources[0].n_windows == 1
    assert one.batch_at(3)[0]["ids"].tolist() == [list(range(8))]
    with pytest.raises(ValueError, match=r"the data has 9 tokens, one window of max_seq_len=9 needs 10"):
        stream(shards(tmp_path, 9), seq_len=9, batch_size=1, micro_batch=1, seed=0)

    tokens = shards(tmp_path, 40)
    assert len(stream(tokens, seq_len=8, batch_size=4, micro_batch=4, seed=0).batch_at(0)[0]["ids"]) == 4
    with pytest.raises(
        ValueError, match=r"40 tokens, 4 windows of max_seq_len=8; one batch of batch_size=5 takes 5 of them"
    ):
        stream(tokens, seq_len=8, batch_size=5, micro_batch=4, seed=0)


def test_readers_share_a_step_evenly(tmp_path: Path) -> None:
    """Law: the step is the same for any number of readers; each has equally many micro-batches, every n-th, where it can."""
    tokens = shards(tmp_path, 300)
    one = stream(tokens, seq_len=8, batch_size=6, micro_batch=2, seed=0).batch_at(3)
    two = stream(tokens, seq_len=8, batch_size=6, micro_batch=2, seed=0, n_readers=2).batch_at(3)
    assert [len(batch["ids"]) for batch in one] == [2, 2, 2]
    assert [len(batch["ids"]) for batch in two] == [2, 2, 1, 1]
    rows = torch.cat([batch["ids"] for batch in one])
    assert torch.equal(torch.cat([batch["ids"] for batch in two[0::2]]), rows[:3])
    assert torch.equal(torch.cat([batch["ids"] for batch in two[1::2]]), rows[3:])
    uneven = stream(tokens, seq_len=8, batch_size=5, micro_batch=9, seed=0, n_readers=2).batch_at(3)
    assert [len(batch["ids"]) for batch in uneven] == [3, 2]


def test_evaluation_windows(tmp_path: Path) -> None:
    """Law: spread evenly from the first window to the last, never overlapping, the same at every call."""
    tokens = shards(tmp_path, 101)
    every = evaluation_batches(tokens, seq_len=10, batch_size=4, n_batches=9)
    assert torch.cat([batch["ids"] for batch in every]).flatten().tolist() == list(range(100))
    assert [len(batch["ids"]) for batch in every] == [4, 4, 2]
    few = evaluation_batches(tokens, seq_len=10, batch_size=3, n_batches=1)
    assert [batch["ids"][:, 0].tolist() for batch in few] == [[0, 40, 90]]
    short = evaluation_batches(shards(tmp_path, 5), seq_len=10, batch_size=3, n_batches=1)
    assert short[0]["ids"].tolist() == [[0, 1, 2, 3]]
    assert evaluation_batches(shards(tmp_path, 1), seq_len=10, batch_size=3, n_batches=1) == []
