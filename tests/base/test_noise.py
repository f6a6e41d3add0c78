"""The gradient noise scale against noise that is known, in the loop's log and over a resumption."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graft.base.optim.adamw import AdamW
from graft.base.run import TrainConfig
from graft.base.runlog import RunFolder, read_metrics
from graft.base.train import train
from graft.base.training.noise import critical_batch, signal_and_noise
from graft.base.training.objective import Batch
from graft.base.training.result import Result


def test_by_hand() -> None:
    """Worked by hand: |G|^2 = 2 and tr(Sigma) = 12 give E|g|^2 = 2 + 12/4 = 5 for 4 labels and 2 + 12/16 = 2.75 for 16."""
    assert signal_and_noise(5.0, 2.75, 4, 16) == pytest.approx((2.0, 12.0))
    assert critical_batch([(9.0, 9.0), (2.0, 10.0), (4.0, 14.0)], share=2 / 3) == pytest.approx(24 / 6)
    assert critical_batch([]) is None
    assert critical_batch([(-1.0, 2.0)]) is None


class Linear(nn.Module):
    """A weight whose gradient for a row x is x itself: mean mu, covariance of x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(20))


class Rows:
    """Summed weight . x over the rows: an objective whose noise scale is known."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return (batch["x"] @ model.get_parameter("weight")).sum()

    def n_labels(self, batch: Batch) -> int:
        return len(batch["x"])

    def n_tokens(self, batch: Batch) -> int:
        return len(batch["x"])


def run(
    folder: Path, steps: int, *, stop: int | None = None, resume: bool = False, every: int = 1, dtype: str = "float32"
) -> Result:
    config = TrainConfig(
        steps=steps,
        batch_size=32,
        micro_batch=8,
        dtype=dtype,
        noise_scale_every=every,
        learning_rate=1e-3,
        checkpoint_every=10,
    )
    model = Linear()

    def batches(step: int) -> list[Batch]:
        if step == stop:
            raise RuntimeError("the power fails")
        x = 0.5 + 3 * torch.randn(32, 20, generator=torch.Generator().manual_seed(step))
        return [{"x": part} for part in x.split(8)]

    opened = RunFolder(folder, stage="test", resume=resume)
    opened.start({}, seed=0)
    return train(model, AdamW(model.named_parameters()), batches, config, opened, objective=Rows())


def test_known_noise(tmp_path: Path) -> None:
    """Law: rows 0.5 + 3 n with n ~ N(0, I_20) have |G|^2 = 20 * 0.25 = 5 and tr(Sigma) = 20 * 9 = 180: a scale of 36 rows. 150
    measurements bring it to within a third (the signal's own deviation is a quarter of it after half of them)."""
    result = run(tmp_path / "a", 150)
    assert result.summary()["critical_batch_labels"] == pytest.approx(36, rel=0.35)
    lines = read_metrics(tmp_path / "a" / "metrics.jsonl")
    signal, noise = (sum(line[key] for line in lines) / 150 for key in ("gradient_square", "gradient_noise"))
    assert signal == pytest.approx(5, rel=0.2)
    assert noise == pytest.approx(180, rel=0.1)


def test_resumption_and_interval(tmp_path: Path) -> None:
    """Law: every third step is measured, and the summary of a resumed run is that of a whole one."""
    whole = run(tmp_path / "whole", 24, every=3)
    with pytest.raises(RuntimeError, match="the power fails"):
        run(tmp_path / "cut", 24, stop=15, every=3)
    resumed = run(tmp_path / "cut", 24, resume=True, every=3)
    assert len(whole.noise) == 8
    assert resumed.noise == whole.noise


def test_the_loss_scale_is_taken_out(tmp_path: Path) -> None:
    """Law: float16, whose loss scale falls until no gradient overflows, measures what float32 does, to float16's digits. These
    gradients don't depend on the weights, which skipped updates leave elsewhere."""
    pairs = [run(tmp_path / dtype, 8, dtype=dtype).noise[-1] for dtype in ("float32", "float16")]
    assert pairs[0] == pytest.approx(pairs[1], rel=0.02)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"noise_scale_every=1 compares a micro-batch .* set micro_batch=16 or less"):
        TrainConfig(noise_scale_every=1, batch_size=32, micro_batch=32)
