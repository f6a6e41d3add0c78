"""Callbacks and loggers: each event once and in order, no number changed, an event file read back."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from graft.base.callbacks import Callbacks
from graft.base.loggers import loggers
from graft.base.optim.adamw import AdamW
from graft.base.run import TrainConfig
from graft.base.runlog import RunFolder, read_metrics
from graft.base.train import train
from graft.base.training.result import Result

CONFIG = TrainConfig(steps=6, batch_size=2, micro_batch=2, eval_every=2, checkpoint_every=3, warmup_steps=0)


class Objective:
    """Squares of a linear layer's output on batches that dropout makes random."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(nn.functional.dropout(batch["ids"])).square().sum()

    def n_labels(self, batch: Any) -> int:
        return len(batch["ids"])

    n_tokens = n_labels


def run(folder: Path, callbacks: Callbacks, *, config: TrainConfig = CONFIG, resume: bool = False) -> Result:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = AdamW(list(model.named_parameters()), learning_rate=config.learning_rate)
    with RunFolder(folder, stage="test", resume=resume) as opened:
        opened.start({"train": config}, seed=0)
        result = train(
            model,
            optimizer,
            lambda step: [{"ids": torch.full((2, 4), float(step + 1))}],
            config,
            opened,
            objective=Objective(),
            evaluate=lambda: {"val_loss": float(model.weight.detach().square().sum()), "val_accuracy": 0.5},
            callbacks=callbacks,
        )
        opened.finish({})
    return result


class Recorder:
    """Notes every event, and spoils the random state."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_start(self, folder: Path, config: dict, step: int) -> None:
        self.events.append(("start", config["steps"], step))

    def on_step(self, line: dict) -> None:
        torch.manual_seed(7)
        self.events.append(("step", line["step"]))

    def on_evaluation(self, line: dict) -> None:
        torch.rand(3)
        self.events.append(("evaluation", line["step"], sorted(line)))

    def on_checkpoint(self, folder: Path, step: int) -> None:
        assert (folder / "weights.safetensors").exists()
        self.events.append(("checkpoint", folder.name, step))


def test_every_event_in_order_and_no_number_changed(tmp_path: Path) -> None:
    """Worked by hand: 6 steps, evaluated after 2, 4 and 6, saved after 3 and 6. Law: the losses are those without callbacks,
    although one of them seeds the generator that dropout uses."""
    recorder, lines = Recorder(), []
    run(tmp_path / "with", Callbacks([recorder, lines.append]))
    figures = ["step", "val_accuracy", "val_loss"]
    assert recorder.events == [
        ("start", 6, 0), ("step", 1), ("step", 2), ("evaluation", 2, figures), ("step", 3),
        ("checkpoint", "step-00000003", 3), ("step", 4), ("evaluation", 4, figures), ("step", 5), ("step", 6),
        ("evaluation", 6, figures), ("checkpoint", "step-00000006", 6),
    ]  # fmt: skip
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    run(tmp_path / "without", Callbacks())
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("with", "without")
    ]
    assert losses[0] == losses[1]


def test_what_is_no_callback() -> None:
    with pytest.raises(TypeError, match=r"callback 3 has none of on_start, on_step, .*, and is no function"):
        Callbacks([3])


def test_the_best_by_another_figure(tmp_path: Path) -> None:
    """A figure that no evaluation has is named with those that there are; of one that is no loss the highest is best."""
    from graft.base.training.result import best_step, is_out_of_patience

    evals = [{"step": 1, "val_loss": 1.0, "val_accuracy": 0.2}, {"step": 2, "val_loss": 2.0, "val_accuracy": 0.9}]
    assert (best_step(evals), best_step(evals, "val_accuracy")) == (1, 2)
    assert best_step([{"step": n, "val_bits_per_byte": 3.0 - n} for n in (1, 2)], "val_bits_per_byte") == 2
    assert (is_out_of_patience(evals, 1), is_out_of_patience(evals, 1, "val_accuracy")) == (True, False)
    wrong = TrainConfig(steps=2, warmup_steps=0, keep="best", best_by="val_f1", eval_every=1)
    with pytest.raises(
        ValueError, match="best_by='val_f1' is no figure of this run's evaluation, which has val_loss, val_acc"
    ):
        run(tmp_path / "a", Callbacks(), config=wrong)


# --- loggers -------------------------------------------------------------------------------------------------------


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    """Parity: TensorBoard's own reader gives the numbers of metrics.jsonl, float32 as it stores them."""
    callbacks = Callbacks(loggers(["tensorboard"]))
    run(tmp_path / "a", callbacks)
    callbacks.call("on_close")
    events = EventAccumulator(str(tmp_path / "a/tensorboard"))
    events.Reload()
    lines = read_metrics(tmp_path / "a/metrics.jsonl")
    for name in ("loss", "lr", "val_loss"):
        expected = [(line["step"], line[name]) for line in lines if name in line]
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in expected
        ]


@pytest.mark.parametrize("step", [0, 2])
def test_tensorboard_drops_what_is_trained_again(step: int, tmp_path: Path) -> None:
    """Law: one value a step, though a process before this one, killed or replaced by --force, had written others."""
    for first, last, loss in ((0, 4, 1.0), (step, 3, 2.0)):
        callbacks = Callbacks(loggers(["tensorboard"]))
        callbacks.call("on_start", tmp_path, {}, first)
        for number in range(first + 1, last + 1):
            callbacks.call("on_step", {"step": number, "loss": loss})
        callbacks.call("on_close")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = [(n, 1.0 if n <= step else 2.0) for n in (1, 2, 3)]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected


def test_every_callback_is_closed() -> None:
    """One that fails when it is closed keeps no other open; the first failure is told."""
    closed = []

    class Fails:
        def on_step(self, line: dict) -> None:
            raise OSError("step")

        def on_close(self) -> None:
            closed.append(self)
            raise OSError(f"close {len(closed)}")

    callbacks = Callbacks([Fails(), Fails()])
    with pytest.raises(OSError, match="step"):
        callbacks.call("on_step", {})
    with pytest.raises(OSError, match="close 1"):
        callbacks.call("on_close")
    assert len(closed) == 2


class Wandb:
    """Stands for the package: what it was called with."""

    def __init__(self) -> None:
        self.inits: list[dict] = []
        self.lines: list[tuple[int | None, dict]] = []
        self.codes: list[int] = []

    def init(self, **settings: Any) -> None:
        self.inits.append(settings)

    def log(self, metrics: dict, step: int | None = None) -> None:
        self.lines.append((step, metrics))

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


def test_wandb_keeps_a_runs_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a resumed run goes on as the run it was; one that starts over is another. Booleans and texts are not drawn."""
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # pyright: ignore[reportArgumentType]
    watcher = Callbacks(loggers(["wandb,wandb"]))
    assert len(watcher) == 1
    for step in (0, 3, 0):
        watcher.call("on_start", tmp_path, {"steps": 6}, step)
        watcher.call("on_step", {"step": step + 1, "loss": 2.0, "skipped": True, "note": "x"})
        watcher.call("on_close")
    first, resumed, over = (settings["id"] for settings in wandb.inits)
    assert first == resumed != over
    assert (wandb.inits[0]["project"], wandb.inits[0]["name"]) == ("graft", tmp_path.name)
    assert wandb.lines[1] == (4, {"loss": 2.0})
    assert wandb.codes == [1, 1, 1]  # none of them came to its end
    watcher.call("on_close")
    watcher.call("on_start", tmp_path, {"steps": 6}, 3)
    watcher.call("on_end", {"val_loss": 1.5, "device": "cpu"})
    watcher.call("on_close")
    assert wandb.codes == [1, 1, 1, 0]
    assert wandb.lines[-1] == (None, {"summary/val_loss": 1.5})


def test_a_logger_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--log wandb needs wandb; run pip install 'graftlm\[wandb\]'"):
        loggers(["wandb"])


def test_unknown_loggers() -> None:
    with pytest.raises(ValueError, match=r"--log 'mlflow' is unknown; choose tensorboard, wandb"):
        loggers(["tensorboard,mlflow"])
