"""Small things that every Triton kernel's launcher needs. Imports no Triton, so it can be imported anywhere."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)` on the GPU that holds the tensors, whichever is the current one."""
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
        kernel[grid](*args, **options)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """The GPU's multiprocessors; 2 stand for them in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def as_rows(tensor: Tensor) -> Tensor:
    """(..., D) as (N, D) whose last axis is contiguous: a view wherever the strides allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def warps_for(elements: int) -> int:
    """Warps for a memory-bound tile: 16 elements a thread, so that a thread's half-precision loads are 16 bytes wide."""
    return max(1, min(16, elements // (32 * 16)))
