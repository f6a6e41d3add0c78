"""What becomes of a run's steps: its log, evaluations, checkpoints and result."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..callbacks import Callbacks
from ..optim.average import averaged_weights, averages_in, exchange_averages_
from ..parallel.optimizer import ShardedOptimizer
from ..parallel.ranks import ranks
from ..precision import LossScaler
from ..run import TrainConfig
from ..runlog import RunFolder
from .checkpoints import (
    ExtraState,
    checkpoints_in,
    load_checkpoint,
    load_optimizer,
    load_weights,
    remove_checkpoints,
    save_checkpoint,
)
from .optimizers import Optimizer
from .result import best_step, is_out_of_patience, noise_of, resumed_result
from .signals import Stop

MAX_SKIPPED_IN_A_ROW = 20  # updates; float16's loss scale falls from 65,536 to 1 in 16


class History:
    """What becomes of a run's steps: its log, evaluations, checkpoints and result. Made at the run's start or resumption.

    Raises ValueError when the config needs a validation loss and there is no `evaluate`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        config: TrainConfig,
        run: RunFolder,
        scaler: LossScaler,
        *,
        evaluate: Callable[[], dict[str, float]] | None = None,  # named figures, `val_loss` among them
        extra: ExtraState | None = None,
        resume_hint: str = "run the same command with --resume",
        callbacks: Callbacks | None = None,
        export: Callable[[Path], None] | None = None,  # writes more files into each checkpoint, such as an adapter's
    ) -> None:
        check_evaluation(config, has_evaluation=evaluate is not None)
        self.optimizer, self.config, self.run, self.scaler, self.extra = optimizer, config, run, scaler, extra
        self._evaluate, self.resume_hint = evaluate, resume_hint
        self._callbacks, self._export = callbacks or Callbacks(), export
        self.start = self.saved = load_checkpoint(run.checkpoints, optimizer, scaler, extra)  # steps of the newest one
        lines = run.open_metrics(after_step=self.start)
        self.result = resumed_result(self.start, lines)
        self.result.best_by = config.best_by
        self._skipped_in_a_row = next(
            (i for i, line in enumerate(reversed(lines)) if not line.get("skipped")), len(lines)
        )

    def is_due(self, step: int) -> bool:
        """Whether this step, counted from 0, is followed by an evaluation."""
        last = step + 1 == self.config.steps
        return self._evaluate is not None and (last or _is_due(step, self.config.eval_every))

    def evaluate(self) -> dict[str, float]:
        """The figures of an evaluation now, for the step's line: rank 0's, so that all ranks decide alike."""
        assert self._evaluate is not None
        figures, together = self._evaluate(), ranks()
        if averages_in(self.optimizer):
            with averaged_weights(self.optimizer):
                figures = {**figures, **{f"{name}_ema": value for name, value in self._evaluate().items()}}
        values = together.sum(*(value if together.is_first else 0.0 for value in figures.values()))
        return dict(zip(figures, values, strict=True))

    def record(
        self,
        line: Mapping[str, Any],  # of metrics.jsonl
        figures: Mapping[str, float] | None,  # of the evaluation after this step, if there was one
        *,
        stop: Stop,  # a run that is asked to stop writes a checkpoint first
        on_step: Callable[[dict[str, Any]], None] | None = None,
        clear: bool = True,  # remove older checkpoints at once; else the caller does, with `clear`
    ) -> bool:
        """Log a finished step and write a checkpoint if the config asks for one at this step.

        Returns whether it was the last one. Raises ValueError when too many updates in a row were skipped.
        """
        result, config = self.result, self.config
        step = line["step"] - 1
        result.steps, result.loss = step + 1, line["loss"]
        result.n_tokens += line["n_tokens"]
        result.noise += noise_of(line)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if line.get("skipped") else 0
        result.n_skipped += bool(line.get("skipped"))
        last = step + 1 == config.steps
        is_best = False
        if figures is not None:
            result.val_loss = figures.get("val_loss")
            result.evals.append({"step": step + 1, **figures})
            self._check_best_by(figures)
            is_best = best_step(result.evals, config.best_by) == step + 1
            last = last or is_out_of_patience(result.evals, config.patience, config.best_by)
        line = {**line, **(figures or {})}
        self.run.log(line)
        if on_step is not None:
            on_step(line)
        self._callbacks.call("on_step", line)
        if figures is not None:
            self._callbacks.call("on_evaluation", {"step": step + 1, **figures})
        is_kept = _is_due(step, config.kept_every) or (config.keeps_best and is_best)
        if last or stop.signal or is_kept or _is_due(step, config.checkpoint_every):
            self.save()
            if clear:
                self.clear()
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise ValueError(
                f"step {step + 1}: the gradients of {self._skipped_in_a_row} updates in a row were not finite; lower "
                f"learning_rate, or use dtype float32 or bfloat16; {self.way_back()}"
            )
        return last

    def save(self) -> None:
        """Write a checkpoint of where the run stands, unless there is one. Rank 0 writes, or each its part; all wait for it."""
        if not ranks().is_first and not isinstance(self.optimizer, ShardedOptimizer):
            ranks().wait()
            return
        step = self.result.steps
        folder = save_checkpoint(
            self.run.checkpoints, step, self.optimizer, self.scaler, self.extra, export=self._export
        )
        self.saved = step
        self._callbacks.call("on_checkpoint", folder, step)
        ranks().wait()

    def clear(self) -> None:
        """Remove the checkpoints that the config doesn't keep; the newest stays."""
        if not ranks().is_first:
            return
        best = best_step(self.result.evals, self.config.best_by)
        remove_checkpoints(self.run.checkpoints, self.config, best)

    def _check_best_by(self, figures: Mapping[str, float]) -> None:
        """Raise ValueError when keep=best or patience go by a figure that the evaluation doesn't have."""
        config = self.config
        if (config.keeps_best or config.patience) and config.best_by not in figures:
            raise ValueError(
                f"best_by={config.best_by!r} is no figure of this run's evaluation, which has {', '.join(figures)}"
            )

    def take_result(self) -> None:
        """Put the run's result into the model: with keep=best the best step's weights, with ema_result their average."""
        best = best_step(self.result.evals, self.config.best_by)
        if self.config.keeps_best and best is not None:
            folder = self.run.checkpoints / f"step-{best:08d}"
            load_weights(folder, self.optimizer)
            if averages_in(self.optimizer):
                load_optimizer(folder, self.optimizer)
            self.result.best_step = best
        if averages_in(self.optimizer) and self.config.ema_result:
            exchange_averages_(self.optimizer)

    def way_back(self) -> str:
        """What a run that can't go on leaves, and how to use it."""
        return way_back_from(self.run.checkpoints, self.resume_hint)


def check_evaluation(config: TrainConfig, *, has_evaluation: bool) -> None:
    """Raise ValueError when the config needs a validation loss and there is none."""
    for name, needs in (
        ("keep=best", config.keeps_best),
        (f"patience={config.patience}", config.patience > 0),
        (f"best_by={config.best_by}", config.best_by != "val_loss"),
    ):
        if needs and not has_evaluation:
            raise ValueError(f"{name} needs a validation loss; give held-out data, or leave it out")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0


def way_back_from(checkpoints: Path, resume_hint: str) -> str:
    """What a run that can't go on leaves, and how to use it."""
    kept = checkpoints_in(checkpoints)
    if not kept:
        return "no checkpoint was written yet"
    return f"the last good checkpoint is {kept[-1]}; to go on from it, {resume_hint}"
