"""The dial and the budget: by hand, with a timer of known speed."""

import json
import sys
from pathlib import Path

import pytest

from graft import cli
from graft.base import budget
from graft.base.budget import line, plan_budget, time_steps
from graft.base.model.config import ModelConfig
from graft.base.plan import flops_per_token
from graft.base.pretrain import pretrain, resolve
from graft.base.recipe import RECIPE, check_resumed_depth, depth_settings, model_at, sizes, training


def test_sizes_by_hand() -> None:
    """By hand: depth 6 is 6 layers of 384 with 6 heads of 64 on 3; depth 5 has 5 heads, which 2 does not divide."""
    assert sizes(6) == {
        "n_layers": 6, "d_model": 384, "n_heads": 6, "n_kv_heads": 3, "d_head": 64, "d_ff": 1024, "max_seq_len": 256,
    }  # fmt: skip
    assert (sizes(5)["n_heads"], sizes(5)["n_kv_heads"]) == (5, 5)
    assert [sizes(depth)["max_seq_len"] for depth in (6, 7, 11, 17)] == [256, 512, 1024, 2048]
    for wrong in (0, -1, 101, True):
        with pytest.raises(ValueError, match=f"depth={wrong} must be a whole number from 1 to 100"):
            sizes(wrong)


def test_training_by_hand() -> None:
    """By hand: 40M tokens give 1.3 * sqrt(4e7) = 8,222 tokens a step, 8,192 as a power of two, 32 sequences of 256; 4,883 steps. At
    d_model 1024, four times 256, the rate halves."""
    found = training(model_at(4, 8192), 4e7)
    assert (found["batch_size"], found["steps"]) == (32, 4883)
    assert found["learning_rate"] == RECIPE.learning_rate
    assert training(model_at(16, 8192), 4e7)["learning_rate"] == pytest.approx(RECIPE.learning_rate / 2)
    assert training(model_at(2, 8192), 4e7)["learning_rate"] == RECIPE.learning_rate  # no higher below that width
    model = model_at(3, 1000)
    whole = training(model)
    assert whole["steps"] * whole["batch_size"] * 256 == pytest.approx(20 * model.n_params, rel=0.01)


def test_what_is_given_wins_and_the_rest_follows() -> None:
    """Laws: every depth resolves to a config; a given setting is kept, and the steps follow a given size."""
    for depth in range(1, 13):
        config = resolve(depth_settings(depth, vocab_size=512, given={}), preset_name=None, vocab_size=512)
        assert config.model == model_at(depth, 512)
        assert config.train.optimizer == RECIPE.optimizer
    given = depth_settings(4, vocab_size=512, given={"learning_rate": 0.5, "optimizer": "adamw", "d_ff": 64})
    assert (given["learning_rate"], given["optimizer"], given["d_ff"]) == (0.5, "adamw", 64)
    assert given["steps"] < depth_settings(4, vocab_size=512, given={})["steps"]
    mixed = depth_settings(4, vocab_size=512, given={"n_experts": 8, "d_expert": 256})  # of 8 each token meets 2
    assert mixed["steps"] < depth_settings(4, vocab_size=512, given={"n_experts": 2, "d_expert": 1024})["steps"]
    wide = resolve(depth_settings(2, vocab_size=512, given={"d_model": 256}), preset_name=None, vocab_size=512).model
    assert wide is not None
    assert (wide.d_head, wide.d_ff) == (128, 704)  # two heads; 8/3 d_model
    given = {"d_latent": 32, "d_rope": 16}
    latent = resolve(depth_settings(2, vocab_size=512, given=given), preset_name=None, vocab_size=512).model
    assert latent is not None
    assert (latent.n_kv_heads, latent.qk_norm) == (2, False)
    check_resumed_depth(None, {})
    check_resumed_depth(4, {"model": {"n_layers": 4}})
    with pytest.raises(ValueError, match="the run's own model of 4 layers, got --depth 5; leave it out"):
        check_resumed_depth(5, {"model": {"n_layers": 4}})


def timer(rate: float, constant: float = 0.0):
    """A machine of `rate` FLOP/s that takes `constant` seconds more a token."""

    def measure(model: ModelConfig, micro_batch: int) -> tuple[float, float]:
        tokens = micro_batch * model.max_seq_len
        return tokens * (flops_per_token(model, model.max_seq_len) / rate + constant), 0.0

    return measure


def test_the_budget_by_hand() -> None:
    """By hand: at 1e11 FLOP/s a depth's compute-optimal run takes 20 N x FLOPs a token / 1e11 s; the largest within 95% of the
    budget is chosen, and its tokens fill it. A machine that is ten times as fast, or a longer budget, goes deeper."""
    planned = plan_budget(12_000, vocab_size=8192, timer=timer(1e11))

    def seconds(depth: int) -> float:
        model = model_at(depth, 8192)
        return 20 * model.n_params * flops_per_token(model, model.max_seq_len) / 1e11

    assert seconds(planned.depth) <= 0.95 * 12_000 < seconds(planned.depth + 1)
    assert planned.seconds == pytest.approx(12_000, rel=0.01)
    assert planned.tokens_per_param >= 20 * 0.99
    assert [one.depth for one in planned.measured] == sorted({2, 4, planned.depth})
    assert planned.measured[0].flops_per_s == pytest.approx(1e11)
    assert plan_budget(120_000, vocab_size=8192, timer=timer(1e11)).depth > planned.depth
    assert plan_budget(12_000, vocab_size=8192, timer=timer(1e12)).depth > planned.depth
    assert plan_budget(12_000, vocab_size=8192, timer=timer(1e11, constant=1e-3)).depth < planned.depth
    tiny = plan_budget(60, vocab_size=8192, timer=timer(1e10))
    assert tiny.depth == 1
    with pytest.raises(ValueError, match="don't pay for one step"):
        plan_budget(0.001, vocab_size=8192, timer=timer(1e8))
    with pytest.raises(ValueError, match="the budget is 0 seconds"):
        plan_budget(0, vocab_size=8192, timer=timer(1e11))


def test_the_line() -> None:
    assert line([1, 2, 3], [3, 5, 7]) == pytest.approx((1, 2))
    assert line([1, 2], [4, 2]) == (0, 2)  # time that falls with work is noise: the mean rate


def test_steps_are_timed() -> None:
    micro, update = time_steps(ModelConfig(64, 16, 1, 1, 1, 16, 16, 8), 2, device="cpu")
    assert micro > 0
    assert update >= 0


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: JSON holds the plan and a command line that gives what it says."""
    monkeypatch.setattr(budget, "time_steps", lambda model, micro, *, device: timer(1e11)(model, micro))
    for arguments in (["--json"], []):
        monkeypatch.setattr(sys, "argv", ["graft", "plan", "--budget", "20min", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        out = capsys.readouterr().out
        if arguments:
            found = json.loads(out)
            assert f"graft pretrain --depth {found['depth']} --steps {found['settings']['steps']}" in found["command"]
            assert found["peak_bytes"] > 12 * found["n_params"]
        else:
            assert f"depth {found['depth']}: {found['n_params']:,} parameters" in out


def test_pretraining_at_a_depth(tmp_path: Path) -> None:
    """Laws: the run has the recipe's settings but those that were given, resumes with the same dial, and refuses another."""
    from graft.base.data.shards import prepare
    from graft.base.tokenizer.tokenizer import Tokenizer

    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    tokenizer = Tokenizer.train([tmp_path / "a.txt"], vocab_size=280)
    tokenizer.save(tmp_path / "tokenizer")
    prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "tokens")
    run = {"data": tmp_path / "tokens", "tokenizer": tmp_path / "tokenizer", "out": tmp_path / "run", "device": "cpu"}
    small = {"max_seq_len": 32, "batch_size": 2, "steps": 2, "eval_batches": 1}
    with pytest.raises(ValueError, match="--depth 1 and --preset nano contradict each other"):
        pretrain(**run, depth=1, preset="nano")
    pretrain(**run, depth=1, **small)
    saved = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert saved["model"]["d_model"] == 64
    assert saved["train"]["optimizer"] == RECIPE.optimizer
    assert saved["train"]["steps"] == 2
    assert pretrain(**run, depth=1, resume=True, steps=3)["steps"] == 3
    with pytest.raises(ValueError, match="the run's own model of 1 layers, got --depth 2"):
        pretrain(**run, depth=2, resume=True)
