"""THE loop. Pretraining and fine-tuning (and later alignment) give it their batches and a pure loss.

Per step: micro-batches -> autocast forward -> summed loss / the whole batch's label count -> backward -> clip -> update.
Dividing by the count of the whole batch, not of each micro-batch, makes accumulation equal to one large batch.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .checkpoint import (
    folder_beside,
    load_tensors,
    random_state,
    read_json,
    save_tensors,
    set_random_state,
    write_json,
)
from .loss import n_labels, next_token_loss
from .optim.adamw import AdamW
from .optim.clip import clip_gradients_
from .optim.muon import Muon
from .optim.schedule import cosine_with_warmup
from .precision import LossScaler, autocast
from .runlog import RunFolder

Batch = Mapping[str, Tensor]
OPTIMIZERS = ("adamw", "muon", "adamw8bit")
NOT_FOR_PRETRAINING = "optimizer='adamw8bit' is for fine-tuning; use adamw or muon to pretrain"


@dataclass(frozen=True)
class TrainConfig:
    """What the loop needs to know. Raises ValueError for values that can't work."""

    steps: int = 1000  # optimizer updates
    batch_size: int = 32  # sequences an update
    micro_batch: int = 32  # sequences at once on the device; the rest of the batch is accumulated
    learning_rate: float = 1e-3  # peak
    final_lr_fraction: float = 0.1  # of the peak, at the last step
    warmup_steps: int = 20
    optimizer: str = "adamw"  # or muon: orthogonalized updates for hidden matrices, AdamW for the rest
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0  # global 2-norm; 0: never clip
    dtype: str = "float32"  # of the arithmetic: float32, bfloat16 or float16; weights and moments stay float32
    checkpointing: bool = False  # recompute activations layer by layer in the backward pass
    checkpoint_every: int = 200  # steps; 0: only at the end
    eval_every: int = 100  # steps; 0: only at the end
    eval_batches: int = 16  # batches of batch_size sequences
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        for name in (
            *("warmup_steps", "checkpoint_every", "eval_every", "eval_batches", "seed"),
            *("weight_decay", "grad_clip", "learning_rate", "final_lr_fraction", "eps"),
        ):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be >= 0 and finite")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"unknown dtype {self.dtype!r}; choose float32, bfloat16 or float16")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; choose {', '.join(OPTIMIZERS)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")


class Optimizer(Protocol):
    """What the loop asks of an optimizer; base/optim/adamw.py and quant/adamw8bit.py keep it."""

    named: list[tuple[str, Tensor]]

    def step(self, learning_rate: float | None = None) -> None: ...
    def zero_grad(self) -> None: ...
    def state_tensors(self) -> dict[str, Tensor]: ...
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None: ...


def make_optimizer(parameters: Iterable[tuple[str, Tensor]], config: TrainConfig) -> Optimizer:
    """The config's AdamW or Muon over named parameters. (adamw8bit is quant's: finetune/sft.py makes it.)"""
    if config.optimizer == "adamw8bit":
        raise ValueError(NOT_FOR_PRETRAINING)
    kind = {"adamw": AdamW, "muon": Muon}[config.optimizer]
    return kind(
        parameters,
        learning_rate=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


class Interrupted(Exception):
    """Training stopped by a signal after writing a checkpoint; `exit_code` is 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Result:
    """What a run measured."""

    steps: int
    loss: float  # of the last step, nats a label
    val_loss: float | None
    n_tokens: int  # positions read by this process
    seconds: float
    evals: list[dict[str, float]] = field(default_factory=list)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    batch_at: Callable[
        [int], Sequence[Batch]
    ],  # step -> its micro-batches; a pure function, so resume needs only the step
    config: TrainConfig,
    run: RunFolder,
    *,
    loss: Callable[[nn.Module, Batch], Tensor] = next_token_loss,  # summed over the labels, nats
    count: Callable[[Batch], int] = n_labels,
    evaluate: Callable[[], dict[str, float]] | None = None,  # named figures, `val_loss` among them
    on_step: Callable[[dict[str, Any]], None] | None = None,  # sees each line of metrics.jsonl
    device: str = "cpu",
    resume_hint: str = "run the same command with --resume",
) -> Result:
    """Train in place; checkpoint, log and evaluate in `run`. Starts after the newest checkpoint there, if any.

    Raises Interrupted after SIGINT or SIGTERM, ValueError when the loss or the gradient is no longer finite.
    """
    scaler = LossScaler(config.dtype)
    torch.manual_seed(config.seed)  # dropout; a checkpoint's own state takes its place on resume
    start = load_checkpoint(run.checkpoints, optimizer, scaler)
    result = resumed_result(start, run.open_metrics(after_step=start))
    model.train()
    began = time.perf_counter()
    with stop_on_signal() as stop, closing(run):
        for step in range(start, config.steps):
            line = one_step(model, optimizer, batch_at(step), config, scaler, step, loss, count, device)
            result.steps, result.loss = step + 1, line["loss"]
            result.n_tokens += line["n_tokens"]
            last = step + 1 == config.steps
            if evaluate is not None and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
                model.eval()
                figures = evaluate()
                model.train()
                line |= figures
                result.val_loss = figures.get("val_loss")
                result.evals.append({"step": step + 1, **figures})
            run.log(line)
            if on_step is not None:
                on_step(line)
            if last or stop.signal or (config.checkpoint_every and (step + 1) % config.checkpoint_every == 0):
                save_checkpoint(run.checkpoints, step + 1, optimizer, scaler)
            if stop.signal and not last:
                raise Interrupted(
                    f"stopped after step {step + 1} of {config.steps}; to go on, {resume_hint}", stop.exit_code
                )
    result.seconds = time.perf_counter() - began
    model.eval()
    return result


def resumed_result(start: int, lines: Sequence[Mapping[str, Any]]) -> Result:
    """What a run knows from its log before its first new step: a resumed run may have none left to do."""
    evals = [
        {name: value for name, value in line.items() if name == "step" or name.startswith("val_")}
        for line in lines
        if "val_loss" in line
    ]
    loss = lines[-1]["loss"] if lines else math.nan
    return Result(start, loss, evals[-1]["val_loss"] if evals else None, 0, 0.0, evals)


def one_step(
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch],
    config: TrainConfig,
    scaler: LossScaler,
    step: int,
    loss: Callable[[nn.Module, Batch], Tensor],
    count: Callable[[Batch], int],
    device: str,
) -> dict[str, Any]:
    """One update; returns its line of metrics."""
    began = time.perf_counter()
    total = sum(count(batch) for batch in micro_batches)
    if total == 0:
        raise ValueError(f"step {step + 1}: no token of the batch carries loss; check the data's completions")
    summed, n_tokens = 0.0, 0
    for batch in micro_batches:
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with autocast(config.dtype, device):
            value = loss(model, moved) / total
        (value * scaler.scale).backward()
        summed += value.detach()
        n_tokens += batch["ids"].numel()
    parameters = [parameter for _, parameter in optimizer.named]
    if scaler.active:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= scaler.scale
    norm = float(clip_gradients_(parameters, config.grad_clip))
    rate = cosine_with_warmup(
        step,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=config.steps,
        final_fraction=config.final_lr_fraction,
    )
    finite = math.isfinite(norm)
    scaler.update(finite=finite)
    if finite:
        optimizer.step(rate)
    elif not scaler.active or scaler.scale <= 1.0:
        raise ValueError(
            f"step {step + 1}: loss {float(summed)} with gradient norm {norm}; "
            "lower learning_rate, raise warmup_steps, or use dtype float32"
        )
    optimizer.zero_grad()
    seconds = time.perf_counter() - began
    return {
        "step": step + 1,
        "loss": float(summed),
        "lr": rate,
        "grad_norm": norm,
        "n_labels": total,
        "n_tokens": n_tokens,
        "tokens_per_s": round(n_tokens / seconds, 1),
        "step_s": round(seconds, 5),
    }


# --- checkpoints ---------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, optimizer: Optimizer, scaler: LossScaler) -> None:
    """Write folder/step-N: trained weights, optimizer, random state, step. The older ones go once it is complete."""
    target = folder / f"step-{step:08d}"
    if not target.exists():
        with folder_beside(target) as temporary:
            save_tensors(temporary / "weights.safetensors", dict(optimizer.named))
            save_tensors(temporary / "optimizer.safetensors", optimizer.state_tensors())
            save_tensors(temporary / "random.safetensors", random_state())
            write_json(
                temporary / "state.json", {"step": step, "loss_scale": scaler.scale, "n_good_steps": scaler.n_good}
            )
    for old in _checkpoints(folder):
        if old != target:
            _remove(old)


def load_checkpoint(folder: Path, optimizer: Optimizer, scaler: LossScaler) -> int:
    """Put the newest checkpoint of `folder` back in place; returns its step, 0 when there is none."""
    found = _checkpoints(folder)
    if not found:
        return 0
    newest = found[-1]
    weights = load_tensors(newest / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in optimizer.named:
            if name not in weights or weights[name].shape != parameter.shape:
                raise ValueError(f"{newest} does not fit this model: weight {name}; resume with the run's own config")
            parameter.copy_(weights[name])
    optimizer.load_state_tensors(load_tensors(newest / "optimizer.safetensors"))
    set_random_state(load_tensors(newest / "random.safetensors"))
    state = read_json(newest / "state.json")
    scaler.scale, scaler.n_good = state["loss_scale"], state["n_good_steps"]
    return int(state["step"])


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between can't leave a broken one under its name."""
    aside = folder.with_name(f".{folder.name}.tmp")
    folder.rename(aside)
    for file in aside.iterdir():
        file.unlink()
    aside.rmdir()


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
