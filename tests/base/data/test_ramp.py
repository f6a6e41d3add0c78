"""Batch-size warm-up: sizes by hand, every window once, batches that depend on the step alone."""

from pathlib import Path

import numpy as np
import pytest

from graft.base.data.batches import WindowBatches
from graft.base.data.mixture import Mixture
from graft.base.data.ramp import BatchRamp
from graft.base.data.shards import open_tokens, prepare
from graft.base.data.windows import make_windows
from graft.base.pretrain_config import PretrainConfig
from graft.base.tokenizer.tokenizer import Tokenizer


def test_by_hand() -> None:
    """Worked by hand: from 2 to 10 in 4 steps are 2, 4, 6, 8, then 10; before step 5 lie 2 + 4 + 6 + 8 + 10 = 30 rows."""
    ramp = BatchRamp(10, 2, 4)
    assert [ramp.size(step) for step in range(6)] == [2, 4, 6, 8, 10, 10]
    assert [ramp.before(step) for step in range(7)] == [0, 2, 6, 12, 20, 30, 40]
    assert [BatchRamp(32, 0, 3).size(step) for step in range(4)] == [4, 13, 22, 32]  # an eighth, then thirds of 28 more
    assert [BatchRamp(5).size(0), BatchRamp(5).before(3), BatchRamp(3, 0, 2).size(0)] == [5, 15, 1]


@pytest.mark.parametrize("n_readers", [1, 2])
def test_windows_follow_each_other(text_file: Path, tokenizer_dir: Path, tmp_path: Path, n_readers: int) -> None:
    """Law: the ramp's steps read the windows that steps of one size read, in the same order, none twice or left out."""
    prepare([text_file], Tokenizer.load(tokenizer_dir), tmp_path / "tokens", val_fraction=0.1)
    tokens = open_tokens(tmp_path / "tokens", "train")
    windows = make_windows("stream", tokens, seq_len=16, seed=1)
    mixture = Mixture([[(0.0, 1.0)], [(0.0, 1.0), (0.5, 3.0)]], batch_size=BatchRamp(8, 2, 5), steps=8, seed=0)
    for mixed in (None, mixture):
        sources = [windows] * (2 if mixed else 1)
        ramped = WindowBatches(
            sources, batch_size=BatchRamp(8, 2, 5), micro_batch=3, n_readers=n_readers, mixture=mixed
        )
        rows = [ramped.rows_at(step) for step in range(7)]
        found = [len(row) for row in rows]
        assert found == [2, 3, 4, 5, 6, 8, 8]
        for i in range(len(sources)):  # each source's windows in its own order, whatever the steps' sizes
            taken = [ranges for row in rows for source, ranges in row if source == i]
            assert taken == windows.ranges(np.arange(len(taken)))
        assert [sum(len(batch["ids"]) for batch in ramped.batch_at(step)) for step in range(7)] == found
    assert mixture.counts_before(7).sum() == sum(found)
    one = BatchRamp(8, 2, 5)
    assert one.step_of(np.arange(36)).tolist() == [s for s in range(7) for _ in range(one.size(s))]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="batch_warmup_start=9 is more than batch_size=8"):
        BatchRamp(8, 9, 2)
    with pytest.raises(ValueError, match="batch_warmup_start=2 needs batch_warmup_steps"):
        PretrainConfig(batch_warmup_start=2)
    with pytest.raises(ValueError, match="batch_warmup_steps=-1 must be >= 0"):
        PretrainConfig(batch_warmup_steps=-1)
