"""Learning-rate schedules: pure functions of the step."""

import math


def cosine_with_warmup(
    step: int,  # 0 is the first update
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    final_fraction: float = 0.1,  # of peak, reached at the last step
) -> float:
    """Linear warm-up to `peak`, then half a cosine down to peak * final_fraction (Loshchilov & Hutter 2017,
    arXiv:1608.03983, eq. 5, one cycle).

    The first update already has peak / warmup_steps, so no step is lost; the last one, step total_steps - 1, has
    the final rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    span = max(1, total_steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / span)
    final = peak * final_fraction
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
