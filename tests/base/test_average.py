"""The exponential average of the weights: by hand, in evaluation, in the result, over a resumption."""

from pathlib import Path

import pytest
import torch

from graft.base.model.config import ModelConfig
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.optim.adamw import AdamW
from graft.base.optim.average import Averaged, averaged_weights, averages_in
from graft.base.run import TrainConfig
from graft.base.runlog import RunFolder, read_metrics
from graft.base.train import train
from graft.base.training.objective import Batch
from graft.base.training.optimizers import make_optimizer
from graft.base.training.result import Result

TINY = ModelConfig(61, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_head=8, d_ff=32, max_seq_len=16)


def batch(seed: int) -> Batch:
    ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids[:, :-1], "targets": ids[:, 1:]}


def test_by_hand() -> None:
    """Worked by hand: AdamW's first steps with equal gradients move w by the rate: 1, 0.9, 0.8. d is min(0.25, 2/11) = 2/11,
    then min(0.25, 3/12) = 0.25: the average is 2/11 * 1 + 9/11 * 0.9 = 0.91818..., then 0.25 * that + 0.75 * 0.8."""
    w = torch.ones(1, 1, requires_grad=True)
    optimizer = Averaged(AdamW([("w", w)], weight_decay=0.0), decay=0.25)
    assert averages_in(optimizer)[0].averages[0].item() == 1.0
    for _ in range(2):
        w.grad = torch.ones(1, 1)
        optimizer.step(0.1)
    first = 2 / 11 + 9 / 11 * 0.9
    assert optimizer.averages[0].item() == pytest.approx(0.25 * first + 0.75 * 0.8, abs=1e-6)
    with averaged_weights(optimizer):
        assert w.item() == pytest.approx(0.25 * first + 0.75 * 0.8, abs=1e-6)
        assert optimizer.averages[0].item() == pytest.approx(0.8, abs=1e-6)
    assert w.item() == pytest.approx(0.8, abs=1e-6)


def run(
    folder: Path, *, stop: int | None = None, resume: bool = False, **settings: object
) -> tuple[Transformer, Averaged, Result]:
    """Six steps with an evaluation and a checkpoint after each second; the loss on one held-out batch."""
    options = {"steps": 6, "ema_decay": 0.5, "checkpoint_every": 2, "eval_every": 2, "learning_rate": 1e-2}
    config = TrainConfig(**options | settings)  # pyright: ignore[reportArgumentType]
    model = Transformer(TINY)
    initialize_(model, seed=0)
    optimizer = make_optimizer(model.named_parameters(), config, roles=parameter_roles(model))
    assert isinstance(optimizer, Averaged)
    opened = RunFolder(folder, stage="test", resume=resume)
    opened.start({}, seed=0)

    def batches(step: int) -> list[Batch]:
        if step == stop:
            raise RuntimeError("the power fails")
        return [batch(step)]

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            return {"val_loss": float(model(batch(99)["ids"], batch(99)["targets"])) / 32}

    return model, optimizer, train(model, optimizer, batches, config, opened, evaluate=evaluate)


def test_evaluated_and_exported(tmp_path: Path) -> None:
    """Law: the model ends with the average, which val_loss_ema is of; with ema_result=false it ends with the last weights."""
    averaged, optimizer, result = run(tmp_path / "a")
    plain, other, _ = run(tmp_path / "b", ema_result=False)
    for p, a, (_, q) in zip(averaged.parameters(), other.averages, other.named, strict=True):
        assert torch.equal(p, a)
        assert not torch.equal(p, q)
    assert all(torch.equal(a, p) for a, p in zip(optimizer.averages, plain.parameters(), strict=True))
    with torch.no_grad():
        losses = [float(m(batch(99)["ids"], batch(99)["targets"])) / 32 for m in (plain, averaged)]
    assert [result.evals[-1][name] for name in ("val_loss", "val_loss_ema")] == pytest.approx(losses, abs=1e-6)
    assert len(result.evals) == 3
    assert result.summary()["val_loss_ema"] == result.evals[-1]["val_loss_ema"]


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    """Law: killed at step 5, the run ends with the average and the log of one that wasn't."""
    whole, optimizer, _ = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the power fails"):
        run(tmp_path / "cut", stop=5)
    resumed, second, _ = run(tmp_path / "cut", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    state = second.state_tensors()
    assert all(torch.equal(t, state[name]) for name, t in optimizer.state_tensors().items())
    logs = [[line["val_loss_ema"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "val_loss" in line]
            for name in ("whole", "cut")]  # fmt: skip
    assert logs[0] == logs[1]


def test_best_by_the_average(tmp_path: Path) -> None:
    """Law: with keep=best the result is the average at the best step by val_loss_ema, the lowest."""
    model, _, result = run(tmp_path / "a", keep="best", best_by="val_loss_ema", learning_rate=0.3)
    best = min(result.evals, key=lambda line: line["val_loss_ema"])
    assert result.best_step == best["step"] < 6
    with torch.no_grad():
        loss = float(model(batch(99)["ids"], batch(99)["targets"])) / 32
    assert loss == pytest.approx(best["val_loss_ema"], abs=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"ema_decay=1\.0 must lie in \[0, 1\)"):
        TrainConfig(ema_decay=1.0)
    optimizer = Averaged(AdamW([("w", torch.ones(2, 2, requires_grad=True))]), decay=0.5)
    with pytest.raises(ValueError, match=r"optimizer state w\.average: nothing saved, \(2, 2\) due"):
        optimizer.load_state_tensors({k: t for k, t in optimizer.state_tensors().items() if k != "w.average"})
