"""Learning: bench/align_learn.py's task: a verifiable reward lifts held-out pass@1 by 30 points, its opposite lowers it."""

import importlib.util
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "bench" / "align_learn.py"


@pytest.mark.slow
def test_a_verifiable_reward_lifts_held_out_pass_at_1(tmp_path: Path) -> None:
    """Measured 0.31 before and 0.66 after 40 steps (75 s of processor time); the sign flipped gives less than before."""
    spec = importlib.util.spec_from_file_location("bench_align_learn", BENCH)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    before = bench.fine_tune(tmp_path, seed=0, steps=250)
    after, flipped = (
        bench.held_out(bench.learn(tmp_path, kind="grpo", rewards=rewards, steps=steps, seed=0))[-1][1]
        for rewards, steps in (("exact", 40), ("-1 * exact", 20))
    )
    assert 0.1 <= before <= 0.5
    assert after >= before + 0.3
    assert flipped < before - 0.1
