"""THE loop. Pretraining, fine-tuning and alignment give it their batches and an objective.

Per step: micro-batches -> autocast forward -> summed loss / the whole batch's label count -> backward -> clip -> update.
Dividing by the count of the whole batch, not of each micro-batch, makes accumulation equal to one large batch.
"""

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .callbacks import Callbacks
from .checkpoint import folder_beside, load_tensors, random_state, save_tensors, set_random_state, write_json
from .json_fields import read_json
from .loss import n_labels, next_token_loss
from .model.init import DECAYED, HIDDEN, Role
from .optim.adamw import AdamW
from .optim.clip import clip_gradients_
from .optim.muon import Muon
from .optim.schedule import learning_rate_at
from .parallel.ranks import Ranks, ranks
from .precision import LossScaler, autocast
from .run import TrainConfig
from .runlog import RunFolder
from .settings import plain

Batch = Mapping[str, Tensor]
Figures = Mapping[str, Tensor | float]
MAX_SKIPPED_IN_A_ROW = 20  # updates; float16's loss scale falls from 65,536 to 1 in 16


class Optimizer(Protocol):
    """What the loop asks of an optimizer; base/optim/adamw.py and quant/adamw8bit.py keep it."""

    @property
    def named(self) -> list[tuple[str, Tensor]]: ...
    def step(self, learning_rate: float | None = None) -> None: ...
    def zero_grad(self) -> None: ...
    def state_tensors(self) -> dict[str, Tensor]: ...
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None: ...


class Objective(Protocol):
    """What is minimized: next-token loss, DPO, GRPO."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Figures]:
        """The loss summed over the batch's labels, () float32, and perhaps figures summed in the same way.

        The loop divides both by the labels of the whole step, and writes the figures to metrics.jsonl.
        """
        ...

    def n_labels(self, batch: Batch) -> int:
        """How many terms the loss of this batch is the sum of: tokens, pairs or answers."""
        ...

    def n_tokens(self, batch: Batch) -> int:
        """How many tokens the model reads for it."""
        ...


class NextToken:
    """Next-token cross entropy over the targets that carry loss, in nats: pretraining and supervised fine-tuning."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Figures]:
        return next_token_loss(model, batch)

    def n_labels(self, batch: Batch) -> int:
        return n_labels(batch)

    def n_tokens(self, batch: Batch) -> int:
        return n_ids(batch)


def n_ids(batch: Batch) -> int:
    """Positions of the batch's ids, padding included."""
    return batch["ids"].numel()


class ExtraState(Protocol):
    """State beside weights and optimizer that a resumed run needs: rollout buffers, running means."""

    def state(self) -> dict[str, Any]:
        """Tensors and JSON values by name."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        ...


# --- optimizers by name --------------------------------------------------------------------------------------------

OptimizerMaker = Callable[..., Optimizer]
OPTIMIZERS: dict[str, OptimizerMaker] = {"adamw": AdamW, "muon": Muon}


def make_optimizer(
    parameters: Iterable[tuple[str, Tensor]],
    config: TrainConfig,
    makers: Mapping[str, OptimizerMaker] = OPTIMIZERS,
    *,
    roles: Mapping[str, Role]
    | None = None,  # of the parameters by name (base/model/init.py); None: told by their shapes
) -> Optimizer:
    """The config's optimizer over named parameters. Raises ValueError for a name that `makers` doesn't have."""
    check_optimizer(config.optimizer, makers)
    options: dict[str, Any] = {}
    if roles is not None:
        options["decay"] = lambda name, _: roles[name] in DECAYED
        if config.optimizer == "muon":
            options["hidden"] = lambda name, _: roles[name] in HIDDEN
    return makers[config.optimizer](
        parameters,
        learning_rate=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        **options,
    )


def check_optimizer(name: str, makers: Mapping[str, OptimizerMaker] = OPTIMIZERS) -> None:
    """Raise ValueError for a name that `makers` doesn't have."""
    if name not in makers:
        raise ValueError(f"unknown optimizer {name!r}; choose {', '.join(makers)}")


# --- the loop ------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Training stopped by a signal after writing a checkpoint; `exit_code` is 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Result:
    """What a run measured."""

    steps: int  # done, earlier processes' included
    loss: float  # mean over the labels of the last step's batch, before its update; nats a label
    val_loss: float | None  # of the newest evaluation
    n_tokens: int  # positions read by this process
    seconds: float  # of this process
    evals: list[dict[str, float]] = field(default_factory=list)
    n_skipped: int = 0  # updates left out because a gradient was not finite
    best_step: int | None = None  # keep=best: whose weights the model has now
    best_by: str = "val_loss"

    def summary(self) -> dict[str, Any]:
        """The figures that every training command reports."""
        figures = {
            "steps": self.steps,
            "train_loss": self.loss,
            "train_loss_is": "of the last step's batch alone, before its update, in nats a label",
            **{name: value for name, value in (self.evals[-1] if self.evals else {}).items() if name != "step"},
            "n_skipped_steps": self.n_skipped,
            "seconds": round(self.seconds, 2),
            "tokens_per_s": round(self.n_tokens / self.seconds, 1) if self.n_tokens and self.seconds else None,
        }
        if self.best_step is not None:
            best = next(line for line in self.evals if line["step"] == self.best_step)
            figures |= {"best_step": self.best_step, f"best_{self.best_by}": best[self.best_by]}
        return figures


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
    callbacks: Callbacks | None = None,
    export: Callable[[Path], None] | None = None,  # writes more files into each checkpoint, such as an adapter's
    device: str = "cpu",
    resume_hint: str = "run the same command with --resume",
) -> Result:
    """Train in place; checkpoint, log and evaluate in `run`. Starts after the newest checkpoint there, if any.

    Ends after config.steps, or earlier by config.patience. With keep=best the model then has the best step's weights.
    Raises Interrupted after SIGINT or SIGTERM, ValueError when the loss is no longer finite or too many updates in a row
    had gradients that were not, OSError when the disk refuses; each names the way to go on.
    """
    scaler = LossScaler(config.dtype)
    together = ranks()
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
    result = history.result
    model.train()
    began = time.perf_counter()
    try:
        with stop_on_signal() as stop:
            for step in range(history.start, config.steps):
                if is_out_of_patience(result.evals, config.patience, config.best_by):
                    break
                step_began = time.perf_counter()
                try:
                    line = one_step(
                        *(model, optimizer, together.share(batch_at(step)), config, scaler, step),
                        *(objective.loss, objective.n_labels, device),
                        n_tokens=objective.n_tokens,
                        began=step_began,
                        together=together,
                    )
                except NotFiniteError as error:
                    raise ValueError(f"{error}; {history.way_back()}") from None
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
    history.take_best()
    result.seconds = time.perf_counter() - began
    model.eval()
    return result


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
        values = together.sum(*(value if together.is_first else 0.0 for value in figures.values()))
        return dict(zip(figures, values, strict=True))

    def record(
        self,
        line: Mapping[str, Any],  # of metrics.jsonl
        figures: Mapping[str, float] | None,  # of the evaluation after this step, if there was one
        *,
        stop: "Stop",  # a run that is asked to stop writes a checkpoint first
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
        """Write a checkpoint of where the run stands, unless there is one. Rank 0 writes, all wait for it."""
        if not ranks().is_first:
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

    def take_best(self) -> None:
        """With keep=best, put the best step's weights in place of the last ones."""
        best = best_step(self.result.evals, self.config.best_by)
        if self.config.keeps_best and best is not None:
            load_weights(self.run.checkpoints / f"step-{best:08d}", self.optimizer)
            self.result.best_step = best

    def way_back(self) -> str:
        """What a run that can't go on leaves, and how to use it."""
        return _way_back(self.run.checkpoints, self.resume_hint)


def check_evaluation(config: TrainConfig, *, has_evaluation: bool) -> None:
    """Raise ValueError when the config needs a validation loss and there is none."""
    for name, needs in (
        ("keep=best", config.keeps_best),
        (f"patience={config.patience}", config.patience > 0),
        (f"best_by={config.best_by}", config.best_by != "val_loss"),
    ):
        if needs and not has_evaluation:
            raise ValueError(f"{name} needs a validation loss; give held-out data, or leave it out")


def best_step(evals: Sequence[Mapping[str, float]], by: str = "val_loss") -> int | None:
    """The step whose figure `by` is best, the earliest of equals; None when none is a number.

    Of a loss, a perplexity and bits per byte the lowest is best, of any other figure the highest.
    """
    numbers = [line for line in evals if _is_number(line.get(by))]
    sign = 1 if by.endswith(("loss", "perplexity", "per_byte")) else -1
    return int(min(numbers, key=lambda line: sign * line[by])["step"]) if numbers else None


def is_out_of_patience(evals: Sequence[Mapping[str, float]], patience: int, by: str = "val_loss") -> bool:
    """Whether the last `patience` evaluations brought none that is better by this figure."""
    best = best_step(evals, by)
    return patience > 0 and len([line for line in evals if best is None or line["step"] > best]) >= patience


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0


def _way_back(checkpoints: Path, resume_hint: str) -> str:
    """What a run that can't go on leaves, and how to use it."""
    kept = checkpoints_in(checkpoints)
    if not kept:
        return "no checkpoint was written yet"
    return f"the last good checkpoint is {kept[-1]}; to go on from it, {resume_hint}"


def resumed_result(start: int, lines: Sequence[Mapping[str, Any]]) -> Result:
    """What a run knows from its log before its first new step: a resumed run may have none left to do."""
    evals = [
        {name: value for name, value in line.items() if name == "step" or name.startswith("val_")}
        for line in lines
        if "val_loss" in line
    ]
    loss = lines[-1].get("loss", math.nan) if lines else math.nan
    n_skipped = sum(bool(line.get("skipped")) for line in lines)
    return Result(start, loss, evals[-1]["val_loss"] if evals else None, 0, 0.0, evals, n_skipped)


class NotFiniteError(ValueError):
    """The loss itself is NaN or infinite: no loss scale and no skipped update mends that."""


def one_step(
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch],
    config: TrainConfig,
    scaler: LossScaler,
    step: int,
    loss: Callable[[nn.Module, Batch], Tensor | tuple[Tensor, Figures]],
    count: Callable[[Batch], int],
    device: str,
    *,
    n_tokens: Callable[[Batch], int] = n_ids,
    began: float | None = None,  # time.perf_counter() when the batch's making began; None: now
    together: Ranks = Ranks(),  # noqa: B008 (it is frozen); the micro-batches are this rank's
) -> dict[str, Any]:
    """One update; returns its line of metrics. An update whose gradients are not finite is left out: `skipped`.

    Raises NotFiniteError when the loss itself is not finite, ValueError when nothing in the batch carries loss.
    """
    began = time.perf_counter() if began is None else began
    total = int(together.sum(sum(count(batch) for batch in micro_batches))[0])
    if total == 0:
        raise ValueError(f"step {step + 1}: no token of the batch carries loss; check the data's completions")
    summed, read = 0.0, 0
    figures: dict[str, Tensor | float] = {}
    for batch in micro_batches:
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with autocast(config.dtype, device):
            found = loss(model, moved)
            value, more = found if isinstance(found, tuple) else (found, {})
            value = value / total
        (value * scaler.scale).backward()
        summed += value.detach()
        for name, figure in more.items():
            figures[name] = figures.get(name, 0.0) + (figure.detach() if isinstance(figure, Tensor) else figure) / total
        read += n_tokens(batch)
    parameters = [parameter for _, parameter in optimizer.named]
    together.sum_gradients_(parameters)
    summed, read = together.sum(float(summed), read)
    if scaler.active:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= scaler.scale
    norm = float(clip_gradients_(parameters, config.grad_clip))
    line = update(optimizer, config, scaler, step, loss=summed, norm=norm)
    seconds = time.perf_counter() - began
    line |= {
        "n_labels": total,
        "n_tokens": int(read),
        "tokens_per_s": round(read / seconds, 1),
        "step_s": round(seconds, 5),
    }
    if taken := line.keys() & figures.keys():
        raise ValueError(f"the objective's figures {sorted(taken)} have names of the loop's own; rename them")
    return line | {name: float(figure) for name, figure in figures.items()}


def update(
    optimizer: Optimizer, config: TrainConfig, scaler: LossScaler, step: int, *, loss: float, norm: float
) -> dict[str, Any]:
    """The optimizer's update from clipped gradients, which are dropped then; returns the first figures of the step's line.

    Gradients that are not finite are left out: `skipped`. Raises NotFiniteError when the loss itself is not finite.
    """
    if not math.isfinite(loss):
        optimizer.zero_grad()
        raise NotFiniteError(
            f"step {step + 1}: loss {loss} with gradient norm {norm}; "
            "lower learning_rate, raise warmup_steps, or use dtype float32"
        )
    rate = learning_rate_at(
        step,
        schedule=config.schedule,
        peak=config.learning_rate,
        warmup_steps=config.n_warmup,
        total_steps=config.steps,
        final_fraction=config.final_lr_fraction,
        decay_fraction=config.decay_fraction,
    )
    finite = math.isfinite(norm)
    scaler.update(finite=finite)
    if finite:
        optimizer.step(rate)
    optimizer.zero_grad()
    return {
        "step": step + 1,
        "loss": loss,
        "lr": rate,
        "grad_norm": norm,
        **({} if finite else {"skipped": True}),
        **({"loss_scale": scaler.scale} if scaler.active else {}),
    }


# --- checkpoints ---------------------------------------------------------------------------------------------------

STATE = {"step": int, "loss_scale": float, "n_good_steps": int, "extra": dict}


def save_checkpoint(
    folder: Path,
    step: int,
    optimizer: Optimizer,
    scaler: LossScaler,
    extra: ExtraState | None = None,
    export: Callable[[Path], None] | None = None,  # writes more files beside these
) -> Path:
    """Write folder/step-N: trained weights, optimizer, random state, step, extra state; whole or not at all. Returns it."""
    target = folder / f"step-{step:08d}"
    if target.exists():
        return target
    more = extra.state() if extra is not None else {}
    with folder_beside(target) as temporary:
        save_tensors(temporary / "weights.safetensors", dict(optimizer.named))
        save_tensors(temporary / "optimizer.safetensors", optimizer.state_tensors())
        save_tensors(temporary / "random.safetensors", random_state())
        if tensors := {name: value for name, value in more.items() if isinstance(value, Tensor)}:
            save_tensors(temporary / "extra.safetensors", tensors)
        state = {"step": step, "loss_scale": scaler.scale, "n_good_steps": scaler.n_good}
        rest = {name: value for name, value in more.items() if name not in tensors}
        write_json(temporary / "state.json", state | {"extra": rest})
        if export is not None:
            export(temporary)
    return target


def load_checkpoint(folder: Path, optimizer: Optimizer, scaler: LossScaler, extra: ExtraState | None = None) -> int:
    """Put the newest checkpoint of `folder` back in place; returns its step, 0 when there is none."""
    found = checkpoints_in(folder)
    if not found:
        return 0
    newest = found[-1]
    state = read_json(newest / "state.json", STATE)
    load_weights(newest, optimizer)
    optimizer.load_state_tensors(load_tensors(newest / "optimizer.safetensors"))
    set_random_state(load_tensors(newest / "random.safetensors"))
    scaler.scale, scaler.n_good = state["loss_scale"], state["n_good_steps"]
    if extra is not None:
        tensors = newest / "extra.safetensors"
        extra.restore(state["extra"] | (load_tensors(tensors) if tensors.exists() else {}))
    return state["step"]


def load_weights(checkpoint: Path, optimizer: Optimizer) -> None:
    """Copy a checkpoint's weights into the parameters that the optimizer trains."""
    weights = load_tensors(checkpoint / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in optimizer.named:
            if name not in weights or weights[name].shape != parameter.shape:
                raise ValueError(
                    f"{checkpoint} does not fit this model: weight {name}; resume with the run's own config"
                )
            parameter.copy_(weights[name])


def remove_checkpoints(folder: Path, config: TrainConfig, best: int | None) -> None:
    """Remove the checkpoints that config.keep doesn't name. The newest always stays: resuming needs it."""
    *older, _ = checkpoints_in(folder)
    for checkpoint in older:
        step = int(checkpoint.name.removeprefix("step-"))
        if not (config.kept_every and step % config.kept_every == 0) and not (config.keeps_best and step == best):
            remove_checkpoint(checkpoint)


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints, the oldest first; other folders are somebody else's."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal())


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between can't leave a broken one under its name."""
    aside = folder.with_name(f".{folder.name}.tmp")
    folder.rename(aside)
    shutil.rmtree(aside)


# --- signals -------------------------------------------------------------------------------------------------------


@dataclass
class Stop:
    """Which signal has asked the loop to stop, if any."""

    signal: int | None = None

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or 0)


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Within the block SIGINT and SIGTERM set a flag instead of killing; a second one acts at once.

    Outside the main thread, where Python allows no handlers, the flag never rises.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
