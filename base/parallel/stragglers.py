"""Ranks whose own work takes longer than the others': all wait for the slowest at the end of every step."""

from collections import deque
from collections.abc import Sequence
from statistics import median_low

WINDOW = 12  # steps over which each rank's time is averaged: a step alone may be slow for many reasons
FACTOR = 1.5  # times the median: slower is a straggler
LEAST_S = 0.01  # above the median: below it a step is too short to tell


class Stragglers:
    """Watches the ranks' own seconds a step: making the batch, forward and backward, without waiting for others.

    Where forward and backward hold collectives (tensor, pipeline, sharded parallel) the ranks wait for each other in there,
    and only what a rank does before the first of them is told apart.
    """

    def __init__(self) -> None:
        self._window: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self.steps: dict[int, int] = {}  # rank -> steps at which it was found slow

    def see(self, seconds: Sequence[float]) -> dict[str, float]:
        """Figures for the step's line where a rank is slow: which, its seconds and the median's; else none."""
        self._window.append(seconds)
        if len(seconds) < 2 or len(self._window) < WINDOW:
            return {}
        means = [sum(own) / len(self._window) for own in zip(*self._window, strict=True)]
        slowest, middle = max(range(len(means)), key=means.__getitem__), median_low(means)
        if means[slowest] < FACTOR * middle or means[slowest] < middle + LEAST_S:
            return {}
        self.steps[slowest] = self.steps.get(slowest, 0) + 1
        return {
            "slow_rank": slowest,
            "slow_rank_s": round(means[slowest], 5),
            "median_rank_s": round(middle, 5),
        }
