"""The loop: accumulation is one large batch, resume is bit-identical, signals and kill -9 lose nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graft.base.checkpoint import save_tensors
from graft.base.data.shards import prepare
from graft.base.loss import next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer, initialize_
from graft.base.optim.adamw import AdamW
from graft.base.optim.schedule import SCHEDULES, learning_rate_at
from graft.base.precision import LossScaler
from graft.base.pretrain import run_pretrain
from graft.base.run import TrainConfig
from graft.base.runlog import RunFolder, read_metrics
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.base.train import train
from graft.base.training import checkpoints, history
from graft.base.training.checkpoints import load_checkpoint, save_checkpoint
from graft.base.training.objective import Batch, Figures
from graft.base.training.result import Result
from graft.base.training.signals import stop_on_signal

TINY = ModelConfig(61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=64, max_seq_len=16)

EXPERTS = replace(TINY, n_experts=4, d_expert=16, d_shared_expert=8, balance_loss=0.1)
POST_NORM = replace(TINY, post_norm=True, qk_norm_joint=True)
GEMMA = replace(
    TINY, sandwich_norm=True, offset_norm=True, activation="gelu_tanh", logit_softcap=9.0, attention_softcap=5.0
)
LATENT = replace(
    TINY, qk_norm=False, n_kv_heads=4, d_latent=16, d_rope=4, n_experts=4, d_expert=16, router="sigmoid", router_bias=True,
    bias_rate=0.01, n_predict=1,
)  # fmt: skip
KINDS = {
    "pre-norm": TINY,
    "experts": EXPERTS,
    "post-norm": POST_NORM,
    "Gemma's": GEMMA,
    "latent, balanced by bias": LATENT,
}


def batch_of(rows: int, *, seed: int) -> dict[str, torch.Tensor]:
    """Random ids whose labels are unevenly masked, so that micro-batches have different label counts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (rows, 17), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(rows):
        targets[row, : 3 * row % 14] = -100
    return {"ids": ids[:, :-1], "targets": targets}


def split(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    n = len(batch["ids"])
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, n, size)]


def train_tiny(
    folder: Path, micro: int, *, steps: int = 4, resume: bool = False, model: ModelConfig = TINY, **changes: object
) -> Transformer:
    model = Transformer(model)
    initialize_(model, seed=0)
    config = TrainConfig(steps=6, warmup_steps=1, checkpoint_every=2, **changes)  # pyright: ignore
    run = RunFolder(folder, stage="test", resume=resume)
    run.start({}, seed=0)

    def batches(step: int) -> list[dict[str, torch.Tensor]]:
        if step == steps:
            raise KeyboardInterrupt  # the process dies here
        return split(batch_of(6, seed=step), micro)

    try:
        train(model, AdamW(model.named_parameters()), batches, config, run)
    except KeyboardInterrupt:
        run.close()
    return model


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Law: micro-batches with different label counts give the large batch's weights, up to float32 addition order."""
    whole, parts = train_tiny(tmp_path / "a", 6), train_tiny(tmp_path / "b", 1)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in "ab")
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)
    assert first["n_labels"] == second["n_labels"]


def test_loss_is_the_mean_over_labels(tmp_path: Path) -> None:
    """Parity: the logged loss is torch's cross entropy over all labels of the batch."""
    train_tiny(tmp_path / "a", 2)
    model = Transformer(TINY)
    initialize_(model, seed=0)
    batch = batch_of(6, seed=0)
    expected = nn.functional.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["targets"].flatten())
    assert read_metrics(tmp_path / "a/metrics.jsonl")[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_resume_is_bit_identical(tmp_path: Path, config: ModelConfig) -> None:
    """Law: dying in step 5 and resuming from step 4 gives the uninterrupted run's very weights and log."""
    whole = train_tiny(tmp_path / "whole", 3, steps=99, model=config)
    train_tiny(tmp_path / "cut", 3, steps=5, model=config)
    assert [p.name for p in (tmp_path / "cut/checkpoints").iterdir()] == ["step-00000004"]
    resumed = train_tiny(tmp_path / "cut", 3, steps=99, resume=True, model=config)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    lines = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 6


def test_overfits_one_batch() -> None:
    """Learning: 60 steps on one batch bring the loss from ln 61 = 4.1 to almost none."""
    model = Transformer(TINY)
    initialize_(model, seed=0)
    optimizer = AdamW(model.named_parameters(), learning_rate=1e-2, weight_decay=0.0)
    batch = batch_of(2, seed=0)
    first = None
    for _ in range(60):
        loss = next_token_loss(model, batch) / (batch["targets"] != -100).sum()
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert first == pytest.approx(4.1, abs=0.2)
    assert loss.item() < 0.1


def test_bfloat16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    """Law: mixed precision keeps the weights in float32 and the first loss within bfloat16's precision."""
    model = train_tiny(tmp_path / "a", 6, dtype="bfloat16")
    train_tiny(tmp_path / "b", 6)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in "ab")
    assert first == pytest.approx(second, rel=2**-7)
    assert first != second


def test_loss_scaler_by_hand() -> None:
    """Worked by hand: 65536 halves on an overflow, doubles after two good steps in a row; other dtypes stay at 1."""
    scaler = LossScaler("float16", growth_interval=2)
    scaler.update(finite=False)
    assert scaler.scale == 32768
    scaler.update(finite=True)
    scaler.update(finite=True)
    assert scaler.scale == 65536
    other = LossScaler("bfloat16")
    other.update(finite=False)
    assert other.scale == 1


def test_what_stops_training(tmp_path: Path) -> None:
    model = Transformer(TINY)
    initialize_(model, seed=0)
    run = RunFolder(tmp_path / "a", stage="test")
    run.start({}, seed=0)
    unlabelled = {"ids": torch.zeros(1, 4, dtype=torch.int64), "targets": torch.full((1, 4), -100)}
    with pytest.raises(ValueError, match="step 1: no token of the batch carries loss"):
        train(model, AdamW(model.named_parameters()), lambda step: [unlabelled], TrainConfig(steps=1), run)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"step 1: loss nan .*lower learning_rate"):
        train(model, AdamW(model.named_parameters()), lambda step: [batch_of(2, seed=0)], TrainConfig(steps=1), run)


def test_run_folder_refuses(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a", stage="pretrain")
    run.start({"x": 1}, seed=0)
    with pytest.raises(FileExistsError, match="another thread of this process is writing to"):
        RunFolder(tmp_path / "a", stage="pretrain")
    run.close()
    with pytest.raises(FileExistsError, match="an unfinished run; use --resume to go on, or --force"):
        RunFolder(tmp_path / "a", stage="pretrain")
    run.start({"x": 1}, seed=0)
    run.finish({})
    with pytest.raises(FileExistsError, match="a finished run"):
        RunFolder(tmp_path / "a", stage="pretrain")
    with pytest.raises(FileExistsError, match="holds a pretrain run, this is sft lora"):
        RunFolder(tmp_path / "a", stage="sft lora", resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        RunFolder(tmp_path / "b", stage="pretrain", resume=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="is not empty and holds no graft run"):
        RunFolder(tmp_path / "c", stage="pretrain")
    (tmp_path / "d").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        RunFolder(tmp_path / "d", stage="pretrain")
    again = RunFolder(tmp_path / "a", stage="pretrain", force=True)
    assert (tmp_path / "a/summary.json").exists(), "what comes before start() may still be refused"
    again.start({"x": 2}, seed=0)
    assert not (tmp_path / "a/summary.json").exists()
    assert (tmp_path / "a/replaced/summary.json").exists(), "the old summary stays until there is a new one"
    again.finish({})
    assert not (tmp_path / "a/replaced").exists()


# --- numbers -------------------------------------------------------------------------------------------------------


def one_weight() -> tuple[nn.Linear, AdamW]:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return model, AdamW(model.named_parameters(), weight_decay=0.0)


ROW = {"ids": torch.zeros(1, 1, dtype=torch.int64), "targets": torch.zeros(1, 1, dtype=torch.int64)}


class Scaled:
    """The loss is a factor of each call times the weight, so the factor is its gradient; the figures are known too."""

    def __init__(self, factors: Sequence[float]) -> None:
        self.factors, self.calls = list(factors), 0

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Figures]:
        factor = self.factors[min(self.calls, len(self.factors) - 1)]
        self.calls += 1
        weight = next(model.parameters())
        loss = (weight * factor).sum()
        if factor == math.inf:
            loss = 1 + torch.sqrt(weight - weight.detach()).sum()  # 1, with an infinite gradient
        return loss, {"margin": torch.tensor(3.0), "kl": 5.0}

    def n_labels(self, batch: Batch) -> int:
        return 2

    def n_tokens(self, batch: Batch) -> int:
        return 7


def run_scaled(folder: Path, objective: Scaled, *, resume: bool = False, **changes: object) -> tuple[nn.Linear, Result]:
    model, optimizer = one_weight()
    config = TrainConfig(**{"warmup_steps": 0, "grad_clip": 0.0, "checkpoint_every": 1} | changes)  # pyright: ignore
    with RunFolder(folder, stage="test", resume=resume) as run:
        run.start({}, seed=0)
        return model, train(model, optimizer, lambda step: [ROW, ROW], config, run, objective=objective)


def test_float16_gradients_are_divided_by_the_scale(tmp_path: Path) -> None:
    """Law: float16's first gradient norm is float32's within float16's precision, though its loss was scaled by 65,536."""
    for dtype in ("float32", "float16"):
        train_tiny(tmp_path / dtype, 3, dtype=dtype, grad_clip=0.0)
    exact, half = (read_metrics(tmp_path / dtype / "metrics.jsonl")[0] for dtype in ("float32", "float16"))
    assert half["loss_scale"] == 65_536
    assert half["grad_norm"] == pytest.approx(exact["grad_norm"], rel=1e-2)  # 2**-11 a product, two layers


def test_an_overflow_is_skipped_and_halves_the_scale(tmp_path: Path) -> None:
    """Worked by hand: the gradient 2 * 1e35 / 4 times 8,192 overflows float32, times 4,096 it does not: four steps are
    skipped (65,536 / 2**4 = 4,096), the fifth is not."""
    assert 5e34 * 2**12 < torch.finfo(torch.float32).max < 5e34 * 2**13
    model, result = run_scaled(tmp_path / "a", Scaled([1e35]), steps=4, dtype="float16")
    lines = read_metrics(tmp_path / "a/metrics.jsonl")
    assert [line.get("skipped", False) for line in lines] == [True, True, True, True]
    assert [line["loss_scale"] for line in lines] == [32_768, 16_384, 8_192, 4_096]
    assert model.weight.item() == 1
    assert result.n_skipped == result.summary()["n_skipped_steps"] == 4
    state = json.loads((tmp_path / "a/checkpoints/step-00000004/state.json").read_text())
    assert state["loss_scale"] == 4_096
    model, result = run_scaled(tmp_path / "a", Scaled([1e35]), steps=5, dtype="float16", resume=True)
    assert "skipped" not in read_metrics(tmp_path / "a/metrics.jsonl")[4], "the scale was not restored"
    assert result.n_skipped == 4


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """Law: whatever the dtype, a NaN loss ends the run at once, names the last checkpoint, and leaves it to resume."""
    for dtype in ("float32", "float16"):
        with pytest.raises(
            ValueError, match=r"step 3: loss nan .* last good checkpoint is .*step-00000002; .*--resume"
        ):
            run_scaled(tmp_path / dtype, Scaled([1.0, 1.0, 1.0, 1.0, math.nan]), steps=9, dtype=dtype)
        assert [path.name for path in (tmp_path / dtype / "checkpoints").iterdir()] == ["step-00000002"]
        assert json.loads((tmp_path / dtype / "run.json").read_text())["status"] == "stopped"
        assert len(read_metrics(tmp_path / dtype / "metrics.jsonl")) == 2


def test_too_many_skipped_updates_stop_the_run(tmp_path: Path) -> None:
    """Law: a gradient that is not finite beside a finite loss is skipped and counted; the twentieth in a row ends the run,
    also when the run was resumed in between."""
    factors = [1.0, 1.0, *[math.inf] * 100]
    with pytest.raises(
        ValueError, match=r"step 21: the gradients of 20 updates in a row were not finite; lower learning"
    ):
        run_scaled(tmp_path / "a", Scaled(factors), steps=99)
    lines = read_metrics(tmp_path / "a/metrics.jsonl")
    assert [line.get("skipped", False) for line in lines] == [False] + [True] * 20
    run_scaled(tmp_path / "b", Scaled(factors), steps=15)
    with pytest.raises(ValueError, match="step 21: the gradients of 20 updates"):
        run_scaled(tmp_path / "b", Scaled(factors[2:]), steps=99, resume=True)


def test_figures_are_means_over_labels(tmp_path: Path) -> None:
    """Worked by hand: two micro-batches of 2 labels; margin 2 * 3 / 4, kl 2 * 5 / 4, loss 2 * 6 / 4; 7 tokens each."""
    run_scaled(tmp_path / "a", Scaled([6.0]), steps=1)
    [line] = read_metrics(tmp_path / "a/metrics.jsonl")
    assert (line["margin"], line["kl"], line["loss"], line["n_labels"], line["n_tokens"]) == (1.5, 2.5, 3.0, 4, 14)


class Recorded:
    """An optimizer that notes the rates it is given."""

    def __init__(self, inner: AdamW) -> None:
        self.inner, self.named, self.rates = inner, inner.named, list[float | None]()

    def step(self, learning_rate: float | None = None) -> None:
        self.rates.append(learning_rate)
        self.inner.step(learning_rate)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_optimizer_steps_at_the_schedules_rate(tmp_path: Path, schedule: str) -> None:
    """Law: each update has its own rate, the one that is logged; only a constant schedule stays at the peak."""
    model, optimizer = one_weight()
    recorded = Recorded(optimizer)
    config = TrainConfig(steps=10, warmup_steps=2, learning_rate=0.5, schedule=schedule)
    with RunFolder(tmp_path / "a", stage="test") as run:
        run.start({}, seed=0)
        train(model, recorded, lambda step: [ROW], config, run, objective=Scaled([1.0]))
    expected = [
        learning_rate_at(step, schedule=schedule, peak=0.5, warmup_steps=2, total_steps=10) for step in range(10)
    ]
    assert recorded.rates == expected == [line["lr"] for line in read_metrics(tmp_path / "a/metrics.jsonl")]
    assert expected[:2] == [0.25, 0.5]
    assert expected[-1] == pytest.approx(0.5 if schedule == "constant" else 0.05)


def test_evaluation_is_in_evaluation_mode(tmp_path: Path) -> None:
    """Law: dropout is off while evaluating and on while training."""
    model, optimizer = one_weight()
    modes = []
    objective = Scaled([1.0])
    loss = objective.loss
    objective.loss = lambda model, batch: (modes.append(model.training), loss(model, batch))[1]  # pyright: ignore

    def evaluate() -> dict[str, float]:
        modes.append(model.training)
        return {"val_loss": 1.0}

    with RunFolder(tmp_path / "a", stage="test") as run:
        run.start({}, seed=0)
        train(
            model, optimizer, lambda step: [ROW], TrainConfig(steps=2, eval_every=1), run, objective=objective,
            evaluate=evaluate,
        )  # fmt: skip
    assert modes == [True, False, True, False]


def test_tokens_per_second_counts_the_batchs_making(tmp_path: Path) -> None:
    """Law: a step whose batch takes 50 ms to make takes at least that long."""
    model, optimizer = one_weight()
    with RunFolder(tmp_path / "a", stage="test") as run:
        run.start({}, seed=0)
        slow = lambda step: (time.sleep(0.05), [ROW])[1]  # noqa: E731
        train(model, optimizer, slow, TrainConfig(steps=1), run, objective=Scaled([1.0]))
    [line] = read_metrics(tmp_path / "a/metrics.jsonl")
    assert line["step_s"] >= 0.05
    assert line["tokens_per_s"] <= 7 / 0.05


# --- checkpoints ---------------------------------------------------------------------------------------------------


class Counter:
    """Extra state: a running mean of what batches saw, and a count."""

    def __init__(self) -> None:
        self.mean, self.n = torch.zeros(2), 0

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "n": self.n, "words": ["a"]}

    def restore(self, state: Mapping[str, Any]) -> None:
        assert state["words"] == ["a"]
        self.mean, self.n = state["mean"], state["n"]


def test_rollouts_and_extra_state_resume_bit_identically(tmp_path: Path) -> None:
    """Law: batches drawn from the model itself, with a buffer beside it, go on after a kill as if nothing had been."""

    def go(folder: Path, steps: int, *, resume: bool = False, dies_at: int = -1) -> tuple[Transformer, Counter]:
        model = Transformer(TINY)
        initialize_(model, seed=0)
        counter = Counter()

        def batch_at(step: int) -> list[dict[str, torch.Tensor]]:
            if step == dies_at:
                raise KeyboardInterrupt
            with torch.no_grad():
                start = torch.randint(0, 61, (2, 4))
                drawn = torch.multinomial(model(start)[:, -1].softmax(-1), 4)
            ids = torch.cat([start, drawn], 1)
            counter.n += 1
            counter.mean = counter.mean * 0.9 + ids.float().mean(1) + counter.n
            return [{"ids": ids[:, :-1], "targets": (ids[:, 1:] + int(counter.mean[0])) % 61}]

        config = TrainConfig(steps=steps, checkpoint_every=2, warmup_steps=0)
        with RunFolder(folder, stage="test", resume=resume) as run:
            run.start({}, seed=0)
            train(model, AdamW(model.named_parameters()), batch_at, config, run, extra=counter)
        return model, counter

    whole, counter = go(tmp_path / "whole", 6)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", 6, dies_at=5)
    resumed, again = go(tmp_path / "cut", 6, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert torch.equal(counter.mean, again.mean)
    assert counter.n == again.n == 6


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: an error inside a checkpoint's second file leaves no folder under its name, and the one before stays."""
    run_scaled(tmp_path / "a", Scaled([1.0]), steps=2)
    saved = []

    def fails(path: Path, *rest: Any) -> None:
        saved.append(path.name)
        if len(saved) == 2:
            raise OSError("the disk is full")
        save_tensors(path, *rest)

    monkeypatch.setattr(checkpoints, "save_tensors", fails)
    with pytest.raises(OSError, match=r"the disk is full; the last good checkpoint is .*step-00000002; .*--resume"):
        run_scaled(tmp_path / "a", Scaled([1.0]), steps=4, resume=True)
    assert saved == ["weights.safetensors", "optimizer.safetensors"]
    assert [path.name for path in (tmp_path / "a/checkpoints").iterdir()] == ["step-00000002"]


def test_the_loss_scale_comes_back(tmp_path: Path) -> None:
    """Law: scale and count of good steps are part of a checkpoint."""
    _, optimizer = one_weight()
    scaler = LossScaler("float16", scale=1024.0)
    scaler.n_good = 7
    save_checkpoint(tmp_path, 3, optimizer, scaler)
    fresh = LossScaler("float16")
    assert load_checkpoint(tmp_path, optimizer, fresh) == 3
    assert (fresh.scale, fresh.n_good) == (1024.0, 7)
    (tmp_path / "step-00000003/state.json").write_text(
        '{"step": "3", "loss_scale": 1.0, "n_good_steps": 0, "extra": {}}'
    )
    with pytest.raises(ValueError, match=r"state\.json: step is a string \('3'\); expected a whole number"):
        load_checkpoint(tmp_path, optimizer, fresh)


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    """Worked by hand: validation losses 5 4 3 9 9 9 at steps 1 to 6. keep=best,every=4 leaves step 3 (best), 4 and the
    last; the model ends with step 3's weights; patience=2 ends after step 5. last=3 leaves the newest three of a checkpoint a
    step."""
    found = {}
    for keep, patience, save_every in (("last", 0, 0), ("best,every=4", 0, 0), ("best,last", 2, 0), ("last=3", 0, 1)):
        model, optimizer = one_weight()
        values = iter([5.0, 4.0, 3.0, 9.0, 9.0, 9.0])
        weights = []
        config = TrainConfig(
            steps=6, keep=keep, patience=patience, eval_every=1, checkpoint_every=save_every, warmup_steps=0
        )

        def evaluate(model: nn.Linear = model, weights: list = weights, values: Iterator = values) -> dict[str, float]:
            weights.append(model.weight.item())
            return {"val_loss": next(values)}

        with RunFolder(tmp_path / keep, stage="test") as run:
            run.start({}, seed=0)
            result = train(
                model, optimizer, lambda step: [ROW], config, run, objective=Scaled([1.0]), evaluate=evaluate
            )
        names = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / keep / "checkpoints").iterdir())
        found[keep] = names, result.steps, result.best_step
        assert model.weight.item() == (weights[2] if "best" in keep else weights[-1])
    assert found == {
        "last": ([6], 6, None),
        "best,every=4": ([3, 4, 6], 6, 3),
        "best,last": ([3, 5], 5, 3),
        "last=3": ([4, 5, 6], 6, None),
    }
    with pytest.raises(ValueError, match="best_by=val_accuracy needs a validation loss"):
        history.check_evaluation(TrainConfig(best_by="val_accuracy"), has_evaluation=False)
    with pytest.raises(ValueError, match="keep=best needs a validation loss"):
        run_scaled(tmp_path / "x", Scaled([1.0]), keep="best")
    with pytest.raises(ValueError, match="'sometimes' is none of last, last=K, best, every=N"):
        TrainConfig(keep="last,sometimes")
    with pytest.raises(ValueError, match="'last=0' is none of last"):
        TrainConfig(keep="last=0")


def test_a_second_ctrl_c_acts_at_once() -> None:
    """Law: the first SIGINT asks the loop to stop; the second does what it did before the loop."""
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job is born ignoring SIGINT
    try:
        with stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == signal.SIGINT
            assert stop.exit_code == 130
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)  # the handler runs at one of the next instructions
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# --- with real processes -------------------------------------------------------------------------------------------

SETTINGS = ["n_layers=1", "d_model=32", "n_heads=2", "max_seq_len=16", "batch_size=4", "checkpoint_every=3"]


@pytest.fixture(scope="module")
def prepared(text_file: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    prepare([text_file], Tokenizer.load(tokenizer_dir), tokens, val_fraction=0.1)
    return tokens, tokenizer_dir


def pretrain_command(prepared: tuple[Path, Path], out: Path, *more: str, steps: int = 40) -> list[str]:
    tokens, tokenizer = prepared
    command = [sys.executable, "-m", "graft", "pretrain", "--data", str(tokens), "--tokenizer", str(tokenizer)]
    command += ["--out", str(out), "--steps", str(steps), *more]
    for setting in SETTINGS:
        command += ["--set", setting]
    return command


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def ends_well(process: subprocess.Popen[str]) -> bool:
    """Wait for its end, and close its pipe: pytest reports one that is left open."""
    process.communicate(timeout=240)
    return process.returncode == 0


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = out / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") >= steps:
            return
        if process.poll() is not None:
            raise AssertionError(process.stderr.read() if process.stderr else "")
        time.sleep(0.005)
    raise AssertionError("the run never got there")


@pytest.mark.slow
def test_kill_9_then_resume_ends_with_the_same_weights(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """Law: a run killed twice without warning, at whatever moment, ends bit-identical to one that was never killed."""
    assert ends_well(start(pretrain_command(prepared, tmp_path / "whole")))
    for steps, more in ((5, ()), (20, ("--resume",))):
        process = start(pretrain_command(prepared, tmp_path / "killed", *more))
        wait_for_steps(tmp_path / "killed", steps, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "killed/model.safetensors").exists(), "killed too late for this test to mean anything"
    assert ends_well(start(pretrain_command(prepared, tmp_path / "killed", "--resume")))
    whole, killed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_write_a_checkpoint(prepared: tuple[Path, Path], tmp_path: Path, number: int, code: int) -> None:
    """Law: Ctrl-C and SIGTERM end the step, write a checkpoint, say how to go on, and exit 130 or 143."""
    process = start(pretrain_command(prepared, tmp_path / "run", steps=100_000))
    wait_for_steps(tmp_path / "run", 2, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "--resume" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    [checkpoint] = (tmp_path / "run/checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] >= 2


def test_pretrain_leaves_a_base_folder(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """Law: config, log, summary and base are there; resume refuses to become another run; the same seed, the same loss."""
    tokens, tokenizer = prepared
    tiny = {"n_layers": 1, "d_model": 32, "n_heads": 2, "max_seq_len": 16, "batch_size": 4, "steps": 5, "eval_every": 2}
    arguments = {"data": tokens, "tokenizer": tokenizer, "device": "cpu", "progress": False}
    summaries = [run_pretrain(**arguments, out=tmp_path / name, settings=tiny) for name in ("a", "b")]
    assert summaries[0]["val_loss"] == summaries[1]["val_loss"]
    assert summaries[0]["val_bits_per_byte"] > 0
    run = json.loads((tmp_path / "a/run.json").read_text())
    assert (run["status"], run["config"]["train"]["steps"], run["config"]["model"]["d_model"]) == ("finished", 5, 32)
    assert run["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    lines = read_metrics(tmp_path / "a/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert {"loss", "lr", "grad_norm", "tokens_per_s"} <= set(lines[0])
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4, 5]
    with pytest.raises(FileExistsError, match="finished run"):
        run_pretrain(**arguments, out=tmp_path / "a", settings=tiny)
    with pytest.raises(ValueError, match="--resume goes on with d_model=32, got 64"):
        run_pretrain(**arguments, out=tmp_path / "a", settings={"d_model": 64}, resume=True)
    with pytest.raises(ValueError, match=r"--resume goes on with \w+=.*, preset medium has .*; leave it out"):
        run_pretrain(**arguments, out=tmp_path / "a", preset_name="medium", resume=True)
    again = run_pretrain(**arguments, out=tmp_path / "a", preset_name="micro", settings=tiny, resume=True)  # the same
    assert again["steps"] == 5
    longer = run_pretrain(**arguments, out=tmp_path / "a", settings={"steps": 7}, resume=True)
    assert longer["steps"] == 7


def test_pretrain_refuses(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    tokens, tokenizer = prepared
    arguments = {"data": tokens, "tokenizer": tokenizer, "out": tmp_path / "x", "device": "cpu", "progress": False}
    with pytest.raises(ValueError, match="vocab_size=9 differs from the tokenizer's 300"):
        run_pretrain(**arguments, settings={"vocab_size": 9})
    with pytest.raises(ValueError, match=r"one window of max_seq_len=100000 needs 100001"):
        run_pretrain(**arguments | {"out": tmp_path / "y"}, settings={"max_seq_len": 100_000, "n_layers": 1})
    with pytest.raises(ValueError, match="unknown device 'tpux'"):
        run_pretrain(**arguments | {"device": "tpux"})
    (tmp_path / "other.txt").write_text("another text with other words, other words and more words " * 20)
    other = Tokenizer.train([tmp_path / "other.txt"], vocab_size=270, pattern="gpt2", special_tokens=["<|endoftext|>"])
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="was prepared with another tokenizer"):
        run_pretrain(**arguments | {"tokenizer": tmp_path / "other"})
