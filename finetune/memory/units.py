"""Bytes as people write them."""

import math
import re

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600, "hours": 3600, "d": 86_400, "days": 86_400}


def parse_seconds(text: str) -> float:
    """'20min' -> 1200.0. Raises ValueError without a number and a unit."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    if not match or match[2].lower() not in SECONDS or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no time; write a number and one of {', '.join(SECONDS)}, such as 20min")
    return float(match[1]) * SECONDS[match[2].lower()]


def say_seconds(seconds: float) -> str:
    """1200 -> '20.0 min'."""
    for unit, size, least in (("days", 86_400, 2 * 86_400), ("hours", 3600, 2 * 3600), ("min", 60, 120)):
        if seconds >= least:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2f} s"


def parse_bytes(text: str) -> int:
    """'24GiB' -> 25769803776, '24 GB' -> 24000000000. Case does not matter. Raises ValueError without a number and a unit."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if not match or match[2].lower() not in units:
        raise ValueError(
            f"{text!r} is no amount of memory; write a number and one of {', '.join(UNITS)}, such as 24GiB"
        )
    n_bytes = math.floor(float(match[1]) * units[match[2].lower()])
    if n_bytes < 1:
        raise ValueError(f"{text!r} is less than a byte; write for example 24GiB")
    return n_bytes


def say_bytes(n_bytes: float) -> str:
    """25769803776 -> '24.00 GiB'."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if n_bytes >= UNITS[unit]:
            return f"{n_bytes / UNITS[unit]:.2f} {unit}"
    return f"{n_bytes:.0f} B"
