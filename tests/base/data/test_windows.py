"""Windows of whole documents: laws over random documents, shares counted by hand, and the mask against documents alone."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from graft.base.data import windows as windows_module
from graft.base.data.batches import WindowBatches
from graft.base.data.mixture import Mixture
from graft.base.data.shards import TokenShards
from graft.base.data.windows import AlignedWindows, PackedWindows, StreamWindows, WindowShares, make_windows
from graft.base.loss import IGNORE, next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer, initialize_

EOS = 65535


def shards(folder: Path, lengths: list[int]) -> TokenShards:
    """Documents of so many tokens, EOS included: their ids count on from 0, so that a token tells where it stood."""
    ids = np.arange(sum(lengths), dtype=np.uint16)
    ids[np.cumsum(lengths) - 1] = EOS
    ids.tofile(folder / "train-00000.bin")
    entry = {"n_tokens": len(ids), "n_bytes": 1, "n_documents": len(lengths), "files": ["train-00000.bin"]}
    return TokenShards(folder, "train", {"dtype": "uint16", "eos_token_id": EOS, "splits": {"train": entry}})


LENGTHS = np.random.default_rng(7).geometric(0.08, size=400).clip(2, 90).tolist()
SEQ_LEN = 24


def test_aligned_windows(tmp_path: Path) -> None:
    """Law: each window is full, begins at a document (or a whole number of windows into a long one), goes on by whole
    documents, and within an epoch nothing is read twice; the epochs leave out different tokens."""
    tokens = shards(tmp_path, LENGTHS)
    windows = AlignedWindows(tokens, seq_len=SEQ_LEN, seed=3)
    first, ends = np.concatenate([[0], windows.ends[:-1]]), windows.ends
    left_out = []
    for epoch in range(3):
        read = np.zeros(len(tokens), int)
        for ranges in windows.ranges(np.arange(windows.n_windows) + epoch * windows.n_windows):
            assert sum(stop - start for start, stop in ranges) == SEQ_LEN + 1
            head = first[np.searchsorted(ends, ranges[0][0], side="right")]
            assert (ranges[0][0] - head) % SEQ_LEN == 0
            assert all(start in first for start, _ in ranges[1:])
            assert all(stop in ends for _, stop in ranges[:-1])
            for start, stop in ranges:
                read[start:stop] += 1
                read[stop - 1] -= (start, stop) == ranges[-1]  # only a target, which the next window may read
        assert set(np.unique(read)) == {0, 1}
        left_out.append(set(np.flatnonzero(read == 0)))
    assert len(left_out[0] & left_out[1] & left_out[2]) < 0.5 * len(left_out[0])
    assert np.any(np.diff(windows._layout(0).starts) < 0), "the windows are shuffled, not only the documents"
    shares = windows.shares()
    assert shares.padding == 0
    assert shares.left_out == pytest.approx(len(left_out[0]) / len(tokens), abs=0.03)
    assert len({str(windows.ranges(np.arange(3) + e * windows.n_windows)) for e in range(3)}) == 3


@pytest.mark.parametrize("at_once", [37, 1 << 20])
def test_packed_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Law: an epoch has each label once; a document is cut only when it is longer than a window; few positions are padding."""
    monkeypatch.setattr(windows_module, "PACKED_AT_ONCE", at_once)
    tokens = shards(tmp_path, LENGTHS)
    windows = PackedWindows(tokens, seq_len=SEQ_LEN, seed=3)
    batches = WindowBatches([windows], batch_size=1, micro_batch=1, document_mask=True)
    labels: list[int] = []
    for step in range(windows.n_windows):
        [batch] = batches.batch_at(step)
        targets = batch["targets"]
        before = batch["ids"][targets != IGNORE]
        after = targets[targets != IGNORE]
        assert torch.all((after == before + 1) | (after == EOS))
        labels += before.tolist()
    first = np.concatenate([[0], windows.ends[:-1]])
    expected = [t for a, b in zip(first, windows.ends, strict=True) for t in range(a, b - 1)]
    assert sorted(labels) == expected
    for ranges in windows.ranges(np.arange(windows.n_windows)):
        for start, stop in ranges:
            at = int(np.searchsorted(windows.ends, start, side="right"))
            whole = (start, stop) == (first[at], windows.ends[at])
            assert whole or windows.ends[at] - first[at] > SEQ_LEN + 1
    epochs = [windows.ranges(np.arange(windows.n_windows) + epoch * windows.n_windows) for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    shares = windows.shares()
    assert shares.cut == pytest.approx(np.mean(np.array(LENGTHS) > SEQ_LEN + 1))
    assert shares.left_out == 0
    assert shares.padding < (0.02 if at_once > len(LENGTHS) else 0.2)
    n_labels = sum(
        length for a in windows.ranges(np.arange(windows.n_windows)) for length in [sum(y - x for x, y in a) - 1]
    )
    assert shares.padding == pytest.approx(1 - n_labels / (windows.n_windows * SEQ_LEN))


def test_shares_by_hand(tmp_path: Path) -> None:
    """Documents of 5, 3 and 8 tokens, windows of 4 (and a target). Stream, cut at 0, 4, 8, 12: the first lies in one
    window (its last token is a target), the second lies in one, the third in two, and with offset 0 no token is unread
    but those behind the last window. Packed: the third is cut, 5 + 3 + (5 + 4) tokens are four windows."""
    tokens = shards(tmp_path, [5, 3, 8])
    stream = StreamWindows(tokens, seq_len=4, seed=next(s for s in range(99) if _offset(tokens, s) == 0))
    assert stream.n_windows == 3
    assert stream.shares() == WindowShares(pytest.approx(1 / 3), 0.0, pytest.approx(3 / 16))
    packed = PackedWindows(tokens, seq_len=4, seed=0)
    assert packed.n_windows == 4
    assert packed.shares() == WindowShares(pytest.approx(1 / 3), pytest.approx(1 - 13 / 16), 0.0)


def _offset(tokens: TokenShards, seed: int) -> int:
    return int(StreamWindows(tokens, seq_len=4, seed=seed).starts(np.arange(3)).min())


def test_padding_has_no_label(tmp_path: Path) -> None:
    """Worked by hand: documents of 3 and 2 tokens in a window of 6 are 0 1 E 3 E and one position of padding."""
    tokens = shards(tmp_path, [3, 2, 7])
    windows = PackedWindows(tokens, seq_len=6, seed=0)
    batches = WindowBatches([windows], batch_size=2, micro_batch=2)
    [batch] = batches.batch_at(0)
    rows = sorted(zip(batch["ids"].tolist(), batch["targets"].tolist(), strict=True))
    assert rows[0] == ([0, 1, EOS, 3, EOS, EOS], [1, EOS, 3, EOS, IGNORE, IGNORE])
    assert rows[1] == ([5, 6, 7, 8, 9, 10], [6, 7, 8, 9, 10, EOS])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stream", "aligned", "best_fit"])
def test_the_mask_makes_documents_strangers(tmp_path: Path, kind: str) -> None:
    """Law: with document_mask the loss of a batch is the sum over its documents, each in a batch of its own."""
    tokens = shards(tmp_path, [9, 4, 30, 5, 7, 12, 3, 8])
    for part in tokens._parts:
        assert part.max() == EOS
    config = ModelConfig(vocab_size=80, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=24, max_seq_len=10)
    model = Transformer(config)
    initialize_(model, seed=0)
    windows = make_windows(kind, tokens, seq_len=10, seed=1)
    masked = WindowBatches([windows], batch_size=3, micro_batch=3, document_mask=True)
    plain = WindowBatches([windows], batch_size=3, micro_batch=3)
    for step in range(3):
        [batch], [other] = masked.batch_at(step), plain.batch_at(step)
        small = {**batch, "ids": batch["ids"].clamp(max=79), "targets": batch["targets"].clamp(max=79)}
        alone = 0.0
        for ids, targets in zip(other["ids"].clamp(max=79), other["targets"].clamp(max=79), strict=True):
            cuts = [0, *(torch.flatten((ids == 79).nonzero()) + 1).tolist(), len(ids)]
            for a, b in pairwise(cuts):
                inside = targets[a:b].clone()
                if b < len(ids) or ids[-1] == 79:  # EOS is not asked for the next document's first token
                    inside[-1:] = IGNORE
                if (inside != IGNORE).any():
                    alone += float(next_token_loss(model, {"ids": ids[None, a:b], "targets": inside[None]}))
        assert float(next_token_loss(model, small)) == pytest.approx(alone, rel=1e-5)
        assert int(batch["cu_seqlens"][-1]) == 30
        assert batch["positions"].shape == (1, 30)
        assert torch.all(batch["cu_seqlens"].diff() > 0), "no empty documents"


def test_a_mixture_reads_each_source_in_its_own_order(tmp_path: Path) -> None:
    """Law: whatever the weights, the windows that a source gives are its first, second, ... one, as many as the mixture says."""
    sources = []
    for name, lengths in (("a", LENGTHS), ("b", LENGTHS[:50])):
        (tmp_path / name).mkdir()
        sources.append(make_windows("best_fit", shards(tmp_path / name, lengths), seq_len=SEQ_LEN, seed=3))
    mixture = Mixture([((0.0, 3.0),), ((0.0, 1.0), (0.5, 2.0))], batch_size=6, steps=20, seed=0)
    batches = WindowBatches(sources, batch_size=6, micro_batch=4, mixture=mixture)
    rows = [row for step in range(20) for row in batches.rows_at(step)]
    for i, source in enumerate(sources):
        mine = [ranges for j, ranges in rows if j == i]
        assert mine == source.ranges(np.arange(len(mine)))
        assert len(mine) == mixture.counts_before(20)[i]
    assert batches.rows_at(7) == rows[42:48]


def test_unknown_windows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown windows 'packed'; choose stream, aligned, best_fit"):
        make_windows("packed", shards(tmp_path, [9]), seq_len=4, seed=0)
    with pytest.raises(ValueError, match=r"the data has 9 tokens, one window of max_seq_len=9 needs 10"):
        make_windows("aligned", shards(tmp_path, [9]), seq_len=9, seed=0)
