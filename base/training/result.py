"""What a run measured, which of its evaluations was best, and whether it should go on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .noise import NOISE_KEYS, critical_batch


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
    noise: list[tuple[float, float]] = field(default_factory=list)  # signal and noise of gradients (noise.py)
    slow_steps: Mapping[int, int] = field(default_factory=dict)  # rank -> steps in which it kept the others waiting

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
        if self.slow_steps:
            figures["slow_ranks"] = ", ".join(f"rank {rank} in {n} steps" for rank, n in self.slow_steps.items())
        if self.best_step is not None:
            best = next(line for line in self.evals if line["step"] == self.best_step)
            figures |= {"best_step": self.best_step, f"best_{self.best_by}": best[self.best_by]}
        if self.noise:
            figures["critical_batch_labels"] = critical_batch(self.noise)
        return figures


def noise_of(line: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The measurement of gradient noise in a line of metrics.jsonl, if it has one."""
    return [(line[NOISE_KEYS[0]], line[NOISE_KEYS[1]])] if NOISE_KEYS[0] in line else []


def resumed_result(start: int, lines: Sequence[Mapping[str, Any]]) -> Result:
    """What a run knows from its log before its first new step: a resumed run may have none left to do."""
    evals = [
        {name: value for name, value in line.items() if name == "step" or name.startswith("val_")}
        for line in lines
        if "val_loss" in line
    ]
    loss = lines[-1].get("loss", math.nan) if lines else math.nan
    n_skipped = sum(bool(line.get("skipped")) for line in lines)
    noise = [pair for line in lines for pair in noise_of(line)]
    return Result(start, loss, evals[-1]["val_loss"] if evals else None, 0, 0.0, evals, n_skipped, noise=noise)


def best_step(evals: Sequence[Mapping[str, float]], by: str = "val_loss") -> int | None:
    """The step whose figure `by` is best, the earliest of equals; None when none is a number.

    Of a loss, a perplexity and bits per byte the lowest is best, of any other figure the highest.
    """
    numbers = [line for line in evals if _is_number(line.get(by))]
    sign = 1 if by.removesuffix("_ema").endswith(("loss", "perplexity", "per_byte")) else -1
    return int(min(numbers, key=lambda line: sign * line[by])["step"]) if numbers else None


def is_out_of_patience(evals: Sequence[Mapping[str, float]], patience: int, by: str = "val_loss") -> bool:
    """Whether the last `patience` evaluations brought none that is better by this figure."""
    best = best_step(evals, by)
    return patience > 0 and len([line for line in evals if best is None or line["step"] > best]) >= patience


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
