"""Learning-rate schedules: pure functions of the step. All rise linearly to the peak first."""

import math

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def learning_rate_at(
    step: int,  # 0 is the first update
    *,
    schedule: str = "cosine",
    peak: float,
    warmup_steps: int,
    total_steps: int,
    final_fraction: float = 0.1,  # of peak, reached at the last step; constant: not used
    decay_fraction: float = 0.2,  # wsd: the share of total_steps in which the rate falls
) -> float:
    """The rate of one update.

    The first update already has peak / warmup_steps, so no step is lost; the last one, step total_steps - 1, has
    the final rate. After the warm-up: `cosine` half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, one
    cycle), `linear` a straight line, `constant` the peak, `wsd` the peak and then a straight line over the last
    decay_fraction of the steps (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395, section 4).
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    start = warmup_steps
    if schedule == "wsd":
        start = max(start, total_steps - 1 - math.ceil(decay_fraction * total_steps))
        if step < start:
            return peak
    span = max(1, total_steps - 1 - start)
    progress = min(1.0, (step - start) / span)
    final = peak * final_fraction
    if schedule == "cosine":
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak + (final - peak) * progress
