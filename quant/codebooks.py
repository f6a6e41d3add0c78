"""The sets of values that 4 and 8 bits stand for, derived from their definitions.

A codebook is a tuple of Python floats, each an exact float32 value; a value's index in it is the code that is stored.
numpy instead of torch: a codebook must be real numbers even while a model is built on fake or meta tensors.
"""

from functools import cache
from statistics import NormalDist

import numpy as np

QUANT_TYPES = ("nf4", "fp4", "int4")


def codebook(quant_type: str) -> tuple[float, ...]:
    """The 16 values of a 4-bit type, within -1 and 1. Raises ValueError for an unknown type."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"unknown quant_type {quant_type!r}; choose {', '.join(QUANT_TYPES)}")
    return {"nf4": nf4, "fp4": fp4, "int4": int4}[quant_type]()


@cache
def nf4() -> tuple[float, ...]:
    """NormalFloat: quantiles of N(0, 1) scaled to [-1, 1], with an exact zero (QLoRA, arXiv:2305.14314, section 3, eq. 4).

    Asymmetric: 8 quantiles above zero and 7 below. They are evenly spaced in probability from 1/2 to the mean of
    1 - 1/30 and 1 - 1/32, for which bitsandbytes writes 0.9677083; so do we, or 10 of the 16 differ in the last bits.
    """
    outermost = 0.9677083
    above = _normal_quantiles(_linspace(outermost, 0.5, 9)[:-1])
    below = -_normal_quantiles(_linspace(outermost, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([below, np.zeros(1, np.float32), above]))
    return tuple((values / values.max()).tolist())


@cache
def fp4() -> tuple[float, ...]:
    """1 sign, 2 exponent and 1 mantissa bit, divided by the largest value, 12; the index is the bit pattern.

    bitsandbytes' own variant: of the exponent's patterns 01, 10, 11 the first is the largest (8 and 12, then 4 and 6,
    then 2 and 3), and the one subnormal is 0.0625.
    """
    magnitudes = [0.0, 0.0625] + [power * mantissa for power in (8.0, 4.0, 2.0) for mantissa in (1.0, 1.5)]
    values = np.array(magnitudes + [0.0 - m for m in magnitudes], np.float32) / np.float32(12)
    return tuple(values.tolist())


@cache
def int4() -> tuple[float, ...]:
    """Evenly spaced: k / 7 for k = -7 ... 7. Code 15 repeats 1 and is never chosen."""
    return (*(np.arange(-7, 8, dtype=np.float32) / np.float32(7)).tolist(), 1.0)


@cache
def dynamic8(signed: bool = True) -> tuple[float, ...]:
    """The dynamic 8-bit map: 7 decades, each with twice the steps of the one below (Dettmers 2015, arXiv:1511.04561).

    256 ascending values. Signed: from -0.99297 to 1 with zero at index 127; decade i of 0..6 covers (0.1, 1) x
    10^(i - 6) with 2^i bin centres of either sign. Unsigned (second moments): the sign's bit doubles the steps.
    """
    decades = []
    for i in range(7):
        edges = _linspace(0.1, 1.0, (1 if signed else 2) * 2**i + 1)
        centres = (edges[:-1] + edges[1:]) / np.float32(2)
        decades.append(np.float32(10.0 ** (i - 6)) * centres)
    magnitudes = np.concatenate(decades)
    parts = [magnitudes, np.array([0, 1], np.float32)] + ([-magnitudes] if signed else [])
    return tuple(np.sort(np.concatenate(parts)).tolist())


def _normal_quantiles(probability: np.ndarray) -> np.ndarray:
    """The inverse of N(0, 1)'s cumulative distribution, in float64, rounded to float32."""
    inverse = NormalDist().inv_cdf
    return np.array([inverse(p) for p in probability.tolist()], np.float32)


def _linspace(start: float, end: float, n: int) -> np.ndarray:
    """torch.linspace in float32, to the bit, since the peers' codebooks rest on it: fused multiply-adds from either end."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(n - 1))  # float32; the products below are exact in float64
    i = np.arange(n)
    return np.where(i < n // 2, first + step * i, last - step * (n - 1 - i)).astype(np.float32)
