"""What fits into a budget: for each method the largest batch and the longest sequence, by prediction."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from ...base.model.config import ModelConfig
from .predict import estimate
from .settings import MemorySettings
from .step import Work
from .units import say_bytes

TRAINING = ("full", "lora", "qlora")
MOST_ROWS = 4096  # larger batches are not looked for; accumulation makes them from smaller ones
SEQ_STEP = 64  # sequences are looked for in multiples of it


@dataclass(frozen=True)
class Fit:
    """One way to train within the budget, or 0 where nothing fits."""

    method: str
    checkpointing: bool
    seq_len: int  # the one asked for
    batch_size: int  # the largest that fits with it
    peak_bytes: int  # of that batch; of a single sequence when not even that fits
    longest_seq_len: int  # with the batch asked for, up to the model's max_seq_len

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def find_fits(
    config: ModelConfig,
    settings: MemorySettings,  # its seq_len and batch_size are asked for; method and checkpointing are searched
    budget: int,  # bytes
    *,
    methods: Sequence[str] = TRAINING,
    device: str = "auto",
    on_try: Callable[[MemorySettings], None] | None = None,  # sees each setting before it is predicted
    work_of: Callable[[MemorySettings], Work | None] = lambda _: None,  # what an alignment stage's step computes
) -> list[Fit]:
    """Every method with and without checkpointing, those that change most of the model first.

    Raises ValueError when nothing fits, with the smallest setting that works and what it needs.
    """
    found = []
    for method in methods:
        for checkpointing in (True,) if method == "generate" else (False, True):
            one = replace(settings, method=method, checkpointing=checkpointing, micro_batch=None)

            @cache
            def peak(batch_size: int, seq_len: int, one: MemorySettings = one) -> int:
                tried = replace(one, batch_size=batch_size, seq_len=seq_len)
                if on_try is not None:
                    on_try(tried)
                return estimate(config, tried, device=device, work=work_of(tried)).peak_bytes

            found.append(_fit_one(config, one, budget, peak))
    if not any(fit.batch_size or fit.longest_seq_len for fit in found):
        raise ValueError(_nothing_fits(config, settings, budget, methods, device, work_of))
    return found


def _fit_one(config: ModelConfig, settings: MemorySettings, budget: int, peak: Callable[[int, int], int]) -> Fit:
    T, B = settings.seq_len, settings.batch_size
    batch_size = largest(lambda rows: peak(rows, T), budget, most=MOST_ROWS)
    steps = max(1, config.max_seq_len // SEQ_STEP)
    unit = min(SEQ_STEP, config.max_seq_len)
    longest = unit * largest(lambda n: peak(B, n * unit), budget, most=steps)
    return Fit(settings.method, settings.checkpointing, T, batch_size, peak(max(batch_size, 1), T), longest)


def largest(peak: Callable[[int], int], budget: int, *, most: int) -> int:
    """The largest n in [1, most] with peak(n) <= budget, or 0; peak must not fall with n.

    Each guess lies on the line through the last two points, since memory is nearly linear in tokens: 4 or 5 predictions
    where halving would need a dozen. A guess that leaves more than half of the range is followed by the middle.
    """
    fits, fits_bytes = 1, peak(1)
    if fits_bytes > budget:
        return 0
    fails, n = most + 1, min(2, most)  # `fails` is known to fail, or past the end
    while fails - fits > 1:
        n_bytes, before = peak(n), fails - fits
        slope = (n_bytes - fits_bytes) / (n - fits)
        if n_bytes <= budget:
            fits, fits_bytes = n, n_bytes
        else:
            fails = n
        guess = fits + int((budget - fits_bytes) / slope) if slope > 0 else most
        if fails <= most and fails - fits > before // 2:
            guess = (fits + fails) // 2
        n = min(max(guess, fits + 1), fails - 1)
    return fits


def _nothing_fits(
    config: ModelConfig,
    settings: MemorySettings,
    budget: int,
    methods: Sequence[str],
    device: str,
    work_of: Callable[[MemorySettings], Work | None],
) -> str:
    """The message: the least that any method needs."""
    seq_len = min(SEQ_STEP, config.max_seq_len)
    least = [
        (estimate(config, tried, device=device, work=work_of(tried)).peak_bytes, tried)
        for method in methods
        for tried in [
            replace(settings, method=method, checkpointing=True, batch_size=1, micro_batch=None, seq_len=seq_len)
        ]
    ]
    n_bytes, smallest = min(least, key=lambda pair: pair[0])
    return (
        f"nothing fits into {say_bytes(budget)}; the smallest that works is {smallest.method} with checkpointing, "
        f"batch 1, sequence {seq_len}: {say_bytes(n_bytes)}"
    )
