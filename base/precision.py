"""Mixed precision: float32 weights, cheaper arithmetic (Micikevicius et al. 2018, arXiv:1710.03740)."""

from contextlib import AbstractContextManager, nullcontext

import torch

from .dtypes import dtype_named


def autocast(dtype: str, device: str) -> AbstractContextManager[object]:
    """Run matrix products in `dtype` ('float32': nothing changes); reductions and norms stay in float32."""
    chosen = dtype_named(dtype)
    if chosen is torch.float32:
        return nullcontext()
    return torch.autocast(device_type=torch.device(device).type, dtype=chosen)


class LossScaler:
    """Dynamic loss scaling for float16, whose smallest gradients would be zero (arXiv:1710.03740, section 3.2).

    bfloat16 and float32 have the range and use scale 1. A step whose gradients overflow is skipped and halves the scale;
    2,000 good steps double it.
    """

    def __init__(self, dtype: str, *, scale: float = 65_536.0, growth_interval: int = 2_000) -> None:
        self.active = dtype == "float16"
        self.scale = scale if self.active else 1.0
        self.growth_interval, self.n_good = growth_interval, 0

    def update(self, *, finite: bool) -> None:
        """Tell whether the last step's gradients were finite."""
        if not self.active:
            return
        if not finite:
            self.scale, self.n_good = max(self.scale / 2, 1.0), 0
            return
        self.n_good += 1
        if self.n_good >= self.growth_interval:
            self.scale, self.n_good = self.scale * 2, 0
