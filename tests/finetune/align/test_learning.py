"""Learning: bench/align.py's task, in which a verifiable reward lifts held-out pass@1 by 30 points, and its opposite doesn't."""

import importlib.util
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "bench" / "align.py"


@pytest.mark.slow
def test_a_verifiable_reward_lifts_held_out_pass_at_1(tmp_path: Path) -> None:
    """Measured 0.31 before and 0.66 after 40 steps (75 s of processor time); the sign flipped gives less than before."""
    spec = importlib.util.spec_from_file_location("bench_align", BENCH)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    curves = bench.learn(tmp_path, steps=40, sft_steps=250, method="grpo", seed=0)
    before = bench.pass_at_1(tmp_path)
    after, flipped = (
        [line["val_reward.exact"] for line in curves[name] if "val_reward" in line][-1]
        for name in ("reward", "sign flipped")
    )
    assert 0.1 <= before <= 0.5
    assert after >= before + 0.3
    assert flipped < before - 0.1
