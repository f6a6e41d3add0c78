"""Random numbers by position: what a micro-batch draws (dropout) depends on the seed, the step and its place in the step alone.

So it is the same whichever rank reads the micro-batch, and after a resumption.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_at(seed: int, step: int, position: int) -> int:
    """A seed below 2^63 for the micro-batch at `position` of a step."""
    return int(np.random.SeedSequence((seed, step, position)).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def drawing_at(seed: int, step: int, position: int, *, device: str) -> Iterator[None]:
    """Within the block torch's generators are at that place; after it they are as they were before."""
    with torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else []):
        torch.manual_seed(seed_at(seed, step, position))
        yield
