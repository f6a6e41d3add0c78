"""Batch-size warm-up: small batches while gradients agree with each other (McCandlish et al. 2018, arXiv:1812.06162, section 5)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class BatchRamp:
    """Rows of each step: from `start` at step 0 in a straight line to `end` at step `steps`, then `end`.

    Pure functions of the step, so that resuming needs no saved position. Raises ValueError for what is no ramp.
    """

    end: int  # rows of a step after the ramp
    start: int = 0  # rows of step 0; 0: an eighth of `end`
    steps: int = 0  # 0: no ramp

    def __post_init__(self) -> None:
        if self.steps and self.first_size > self.end:
            raise ValueError(f"batch_warmup_start={self.start} is more than batch_size={self.end}; lower it")

    @property
    def first_size(self) -> int:
        """Rows of step 0."""
        return self.start or max(1, self.end // 8)

    def size(self, step: int) -> int:
        """Rows of a step, rounded down."""
        if step >= self.steps:
            return self.end
        return self.first_size + (self.end - self.first_size) * step // self.steps

    def before(self, step: int) -> int:
        """Rows of all steps before this one."""
        ramped = min(step, self.steps)
        return int(_sums(self)[ramped]) + (step - ramped) * self.end

    def step_of(self, index: np.ndarray) -> np.ndarray:
        """The step of each window, counted from the run's first one; int64."""
        sums = _sums(self)
        ramped = np.searchsorted(sums, index, side="right") - 1
        return np.where(index < sums[-1], ramped, self.steps + (index - sums[-1]) // self.end)


def as_ramp(batch_size: int | BatchRamp) -> BatchRamp:
    """A batch size that never changes is a ramp of no steps."""
    return batch_size if isinstance(batch_size, BatchRamp) else BatchRamp(batch_size)


@lru_cache(maxsize=4)
def _sums(ramp: BatchRamp) -> np.ndarray:
    return np.cumsum([0, *(ramp.size(step) for step in range(ramp.steps))], dtype=np.int64)
