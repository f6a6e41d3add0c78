"""How much of the device's arithmetic a run uses (MFU), and how long it still takes: figures for each step's line."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from .plan import DEVICES

CPU_SIDE = 1024  # rows and columns of the product that tells a CPU's rate
SMOOTH = 0.9  # weight of the past in the pace


def peak_flops(device: str) -> tuple[float | None, str]:
    """The FLOP/s that MFU is a share of, and what that is.

    A GPU's is its data sheet's dense bfloat16 rate, whatever the run's dtype; None for a GPU that base/plan.py doesn't list. A
    CPU has no such figure: it is the best of three float32 products of 1,024 x 1,024 matrices with the threads that torch has.
    """
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, chip in DEVICES.items():
            if key in name.lower().replace(" ", ""):
                return chip.flops, f"{chip.name}, {chip.flops / 1e12:g} TFLOP/s in bfloat16"
        return None, f"{name} is not in graft's table of peaks"
    a = torch.ones(CPU_SIDE, CPU_SIDE)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    flops = 2 * CPU_SIDE**3 / best
    return flops, f"measured: a float32 product of {CPU_SIDE} x {CPU_SIDE}, {flops / 1e9:.0f} GFLOP/s"


class Meter:
    """Adds `mfu` and `left_s` to a step's line."""

    def __init__(
        self,
        *,
        steps: int,  # of the whole run
        flops_per_token: float,
        peak: float | None,  # FLOP/s of all ranks together; None: no mfu
    ) -> None:
        self.steps, self.flops_per_token, self.peak = steps, flops_per_token, peak
        self._step_s: float | None = None

    def figures(self, line: Mapping[str, Any]) -> dict[str, float]:
        """`mfu`: model FLOPs a second over the peak, recomputation not counted; `left_s`: steps left at the running pace."""
        pace = line["step_s"]
        self._step_s = pace if self._step_s is None else SMOOTH * self._step_s + (1 - SMOOTH) * pace
        found = {"left_s": round(self._step_s * (self.steps - line["step"]), 1)}
        if self.peak:
            found["mfu"] = round(line["tokens_per_s"] * self.flops_per_token / self.peak, 4)
        return found
