"""Mixtures: shares kept to within a few windows at every step, schedules, epochs counted, what --data may say."""

from pathlib import Path

import numpy as np
import pytest

from graft.base.data.mixture import Mixture, Source, parse_source, parse_sources


def test_shares_hold_at_every_step() -> None:
    """Law: after n windows each source has had its share of n within 4, for any step asked first; the counts are those of
    the windows themselves."""
    mixture = Mixture([((0.0, 7.0),), ((0.0, 2.0),), ((0.0, 1.0),)], batch_size=8, steps=500, seed=1)
    counts = np.zeros(3, int)
    for step in range(500):
        assert mixture.counts_before(step).tolist() == counts.tolist()
        assert np.abs(counts - 8 * step * np.array([0.7, 0.2, 0.1])).max() < 4
        counts += np.bincount(mixture.sources_at(step), minlength=3)
    for step in (499, 3, 250):
        fresh = Mixture([((0.0, 7.0),), ((0.0, 2.0),), ((0.0, 1.0),)], batch_size=8, steps=500, seed=1)
        assert fresh.counts_before(step).tolist() == mixture.counts_before(step).tolist()
    other = Mixture([((0.0, 7.0),), ((0.0, 2.0),), ((0.0, 1.0),)], batch_size=8, steps=500, seed=2)
    assert other.sources_at(0).tolist() != mixture.sources_at(0).tolist()


def test_a_schedule() -> None:
    """Weights 1:0, from 60% of the run on 1:3: the second source comes at step 6 of 10, with three quarters."""
    mixture = Mixture([((0.0, 1.0),), ((0.0, 0.0), (0.6, 3.0))], batch_size=40, steps=10, seed=0)
    assert [int(mixture.sources_at(step).sum()) for step in range(6)] == [0] * 6
    later = [int(mixture.sources_at(step).sum()) for step in range(6, 10)]
    assert all(28 <= n <= 32 for n in later)
    assert mixture.counts_before(10).tolist() == [400 - sum(later), sum(later)]
    assert mixture.largest == [1.0, 0.75]
    with pytest.raises(ValueError, match="all weights are 0 from 50% of the run on"):
        Mixture([((0.0, 1.0), (0.5, 0.0)), ((0.0, 0.0),)], batch_size=1, steps=2, seed=0)


def test_specs(tmp_path: Path) -> None:
    assert parse_source("web=0.7") == Source(Path("web"), ((0.0, 0.7),))
    assert parse_source("a=b/web=0.9,0.5@0.8") == Source(Path("a=b/web"), ((0.0, 0.9), (0.8, 0.5)))
    assert parse_source("web") == Source(Path("web"))
    (tmp_path / "odd=1").mkdir()
    assert parse_source(str(tmp_path / "odd=1")) == Source(tmp_path / "odd=1")
    for spec, message in (
        ("web=much", "'much' is no weight; write web=0.7"),
        ("web=0.5,0.2", r"must begin at 0 and rise, all below 1|'0.2' is no weight"),
        ("web=0.5@0.2", r"must begin at 0 and rise, all below 1; got \[0.2\]"),
        ("web=0.5,1@0.9,2@0.4", r"must begin at 0 and rise"),
        ("web=-1", "weights must be 0 or more and finite"),
        ("web=nan", "weights must be 0 or more and finite"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_source(spec)
    with pytest.raises(ValueError, match="--data b has no weight while others have"):
        parse_sources(["a=1", "b"])
    with pytest.raises(ValueError, match="--data a is given twice"):
        parse_sources(["a=1", "a=2"])
    with pytest.raises(ValueError, match="no data given"):
        parse_sources([])
