"""One update: micro-batches -> autocast forward -> summed loss / the whole batch's label count -> backward -> clip -> update.

Dividing by the count of the whole batch, not of each micro-batch, makes accumulation equal to one large batch.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..optim.clip import clip_gradients_
from ..optim.schedule import learning_rate_at
from ..parallel.part import Part
from ..parallel.ranks import Ranks, ranks
from ..parallel.sharding import Sharding
from ..parallel.stragglers import Stragglers
from ..precision import LossScaler, autocast
from ..run import TrainConfig
from .balance import balance, start_counting
from .draws import drawing_at
from .noise import noise_figures, square_norm
from .objective import Batch, Figures, n_ids
from .optimizers import Optimizer


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
    together: Ranks | Sharding = Ranks(),  # noqa: B008 (it is frozen); the micro-batches are this rank's
    stragglers: Stragglers | None = None,  # told every rank's seconds
) -> dict[str, Any]:
    """One update; returns its line of metrics. An update whose gradients are not finite is left out: `skipped`.

    Raises NotFiniteError when the loss itself is not finite, ValueError when nothing in the batch carries loss.
    """
    began = time.perf_counter() if began is None else began
    own_s = time.perf_counter() - began  # this rank's own time, without waiting for others
    total = int(together.sum(sum(count(batch) for batch in micro_batches))[0])
    all_here = time.perf_counter()
    if total == 0:
        raise ValueError(f"step {step + 1}: no token of the batch carries loss; check the data's completions")
    mixtures = start_counting(model)
    summed, read = 0.0, 0
    figures: dict[str, Tensor | float] = {}
    measures_noise = config.noise_scale_every > 0 and step % config.noise_scale_every == 0
    first = 0.0, 0  # squared norm of the first micro-batch's part of the gradient, and its labels
    part = together.part if isinstance(together, Sharding) else Part()
    if part.pipeline is not None:  # the ranks that share the layers run all micro-batches in their own order
        summed = part.backward(micro_batches, factor=scaler.scale / total) / scaler.scale
        read = sum(n_tokens(batch) for batch in micro_batches)
    for i, batch in enumerate(micro_batches if part.pipeline is None else ()):
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with drawing_at(config.seed, step, together.place(i), device=device):
            with autocast(config.dtype, device):
                found = loss(model, moved)
                value, more = found if isinstance(found, tuple) else (found, {})
                value = value / total
            (value * scaler.scale).backward()
        if measures_noise and not read:
            first = square_norm(p for _, p in optimizer.named) / scaler.scale**2, count(batch)
        summed += value.detach()
        for name, figure in more.items():
            figures[name] = figures.get(name, 0.0) + (figure.detach() if isinstance(figure, Tensor) else figure) / total
        read += n_tokens(batch)
    summed = float(summed)  # waits for a GPU
    own_s += time.perf_counter() - all_here
    parameters = together.finish_gradients(optimizer.named)
    summed, read = together.sum(summed, read)
    if scaler.active:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= scaler.scale
    norm = float(clip_gradients_(parameters, config.grad_clip, norm=together.norm(parameters)))
    own_figures = summed_figures(figures, together)
    line = update(optimizer, config, scaler, step, loss=summed, norm=norm)
    if measures_noise and math.isfinite(norm):
        line |= noise_figures(*first, norm, total, together)
    line |= balance(mixtures, together.sum, updated="skipped" not in line)
    seconds = time.perf_counter() - began
    line |= {
        "n_labels": total,
        "n_tokens": int(read),
        "tokens_per_s": round(read / seconds, 1),
        "step_s": round(seconds, 5),
        **(stragglers.see(ranks().each(own_s)) if stragglers is not None else {}),
    }
    if taken := line.keys() & own_figures.keys():
        raise ValueError(f"the objective's figures {sorted(taken)} have names of the loop's own; rename them")
    return line | own_figures


def summed_figures(figures: Mapping[str, Tensor | float], together: Ranks | Sharding) -> dict[str, float]:
    """Each figure summed over ranks. A rank that read nothing has none, and adds nothing to the others'."""
    values = [float(figure) for figure in figures.values()]
    n = together.most(len(values))
    summed = together.sum(*values, *[0.0] * (n - len(values))) if n else []
    return dict(zip(figures, summed, strict=False))


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
