"""THE loop. Pretraining, fine-tuning and alignment give it their batches and an objective (base/training/ has its parts)."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .callbacks import Callbacks
from .meter import Meter
from .parallel.mesh import check_mesh, parse_mesh
from .parallel.optimizer import ShardedOptimizer
from .parallel.ranks import at, naming_lost_ranks, ranks
from .parallel.stragglers import Stragglers
from .precision import LossScaler
from .run import TrainConfig
from .runlog import RunFolder
from .settings import plain
from .training.checkpoints import ExtraState
from .training.history import History
from .training.objective import Batch, NextToken, Objective
from .training.optimizers import Optimizer
from .training.result import Result, is_out_of_patience
from .training.signals import Interrupted, stop_on_signal
from .training.step import NotFiniteError, one_step


def train(
    model: nn.Module,
    optimizer: Optimizer,
    # step -> its micro-batches. They may depend on the model (rollouts), the step and torch's random state only:
    # resuming restores those.
    batch_at: Callable[[int], Sequence[Batch]],
    config: TrainConfig,
    run: RunFolder,
    *,
    objective: Objective = NextToken(),  # noqa: B008 (it has no state)
    evaluate: Callable[[], dict[str, float]] | None = None,  # named figures, `val_loss` among them
    extra: ExtraState | None = None,  # saved with each checkpoint and restored from it
    on_step: Callable[[dict[str, Any]], None] | None = None,  # sees each line of metrics.jsonl
    meter: Meter | None = None,  # adds figures to each line
    callbacks: Callbacks | None = None,
    export: Callable[[Path], None] | None = None,  # writes more files into each checkpoint, such as an adapter's
    device: str = "cpu",
    resume_hint: str = "run the same command with --resume",
) -> Result:
    """Train in place; checkpoint, log and evaluate in `run`. Starts after the newest checkpoint there, if any.

    Ends after config.steps, or earlier by config.patience. With keep=best the model then has the best step's weights, with
    ema_decay their average.
    Raises Interrupted after SIGINT or SIGTERM, ValueError when the loss is no longer finite or too many updates in a row
    had gradients that were not, OSError when the disk refuses; each names the way to go on.
    """
    scaler = LossScaler(config.dtype)
    if isinstance(optimizer, ShardedOptimizer):
        together = optimizer.sharding
        if config.noise_scale_every:
            raise ValueError("noise_scale_every is not covered where gradients are sharded; use mesh dp with zero=0")
    else:  # every rank holds everything
        together = ranks()
        check_mesh(parse_mesh(config.mesh, together.n), config, None)
    torch.manual_seed(config.seed)  # dropout; a checkpoint's own state takes its place on resume
    callbacks = (callbacks if together.is_first else None) or Callbacks()
    history = History(
        *(optimizer, config, run, scaler),
        evaluate=evaluate,
        extra=extra,
        resume_hint=resume_hint,
        callbacks=callbacks,
        export=export,
    )
    callbacks.call("on_start", run.folder, plain(config), history.start)
    result, stragglers = history.result, Stragglers()
    model.train()
    began = time.perf_counter()
    try:
        with stop_on_signal() as stop, naming_lost_ranks(ranks()):
            for step in range(history.start, config.steps):
                if is_out_of_patience(result.evals, config.patience, config.best_by):
                    break
                step_began = time.perf_counter()
                at(f"step {step + 1}")
                try:
                    line = one_step(
                        *(model, optimizer, together.share(batch_at(step)), config, scaler, step),
                        *(objective.loss, objective.n_labels, device),
                        n_tokens=objective.n_tokens,
                        began=step_began,
                        together=together,
                        stragglers=stragglers,
                    )
                except NotFiniteError as error:
                    raise ValueError(f"{error}; {history.way_back()}") from None
                line |= meter.figures(line) if meter else {}
                figures = None
                if history.is_due(step):
                    model.eval()
                    figures = history.evaluate()
                    model.train()
                stop.signal = together.most(stop.signal or 0) or None
                last = history.record(line, figures, stop=stop, on_step=on_step)
                if stop.signal and not last:
                    raise Interrupted(
                        f"stopped after step {step + 1} of {config.steps}; to go on, {resume_hint}", stop.exit_code
                    )
    except OSError as error:
        raise type(error)(f"{error}; {history.way_back()}") from error
    finally:
        run.close_metrics()
    history.take_result()
    result.seconds = time.perf_counter() - began
    result.slow_steps = stragglers.steps
    model.eval()
    return result
