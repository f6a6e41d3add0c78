"""When a kernel's compiled CPU loops (Numba) run, and how they are spread over threads. Imports no Numba."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .dispatch import Backend, name_of, predicted_device

SMALLEST = 2**16  # elements for which `auto` takes the loops: a training batch, not a decoding step
PART = 2**17  # elements a thread at least: 50 us or more of work, where handing it over costs 30


@cache
def has_numba() -> bool:
    return find_spec("numba") is not None


def loops_problem(kernel_tensors: Sequence[Tensor]) -> str | None:
    """Why the compiled loops can't run on these tensors, or None when they can.

    Fake tensors are accepted: the loops' functions then allocate what they would and compute nothing, so that memory is
    predicted right.
    """
    if torch.compiler.is_compiling():
        return "torch.compile can't trace it; use backend='torch'"
    for tensor in kernel_tensors:
        if tensor.device.type != "cpu":
            return f"it needs CPU tensors, got one on {tensor.device}; move them or use backend='auto'"
        if tensor.dtype != torch.float32:
            return f"it takes float32, got {name_of(tensor.dtype)}; use backend='torch'"
        if not (has_memory(tensor) or stands_for_memory(tensor)):
            return f"it takes plain tensors, got {type(tensor).__name__}; use backend='torch'"
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return "torch.func's transforms can't see into it; use backend='torch'"
    if torch._C._get_tracing_state() is not None or _is_traced():
        return "a tracer can't see into it; use backend='torch'"
    if not has_numba():
        return "numba is not installed; pip install numba"
    return None


def _is_traced() -> bool:
    """Whether make_fx or another tracer of operators is on."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # pyright: ignore[reportAttributeAccessIssue]


def takes_loops(kernel: str, backend: Backend | str, tensors: Sequence[Tensor]) -> bool:
    """Whether the compiled loops run: if asked for, or under `auto` on CPU tensors of a training step's size.

    `auto` also asks that a gradient is recorded: Numba's import (0.3 s) and compilation then pay off, and commands that only
    generate or evaluate do without. Raises ValueError with the reason for backend="numba" where they can't run.
    """
    if backend == "numba":
        problem = loops_problem(tensors)
        if problem:
            raise ValueError(f"{kernel}: backend 'numba' can't run here: {problem}")
        return True
    if backend != "auto" or torch.compiler.is_compiling():
        return False
    if (
        predicted_device() == "cuda"
        or tensors[0].device.type != "cpu"
        or tensors[0].numel() < SMALLEST
        or not torch.is_grad_enabled()
    ):
        return False
    return any(tensor.requires_grad for tensor in tensors) and loops_problem(tensors) is None


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, with its sign bit resolved: what an address may stand for."""
    return tensor.contiguous().resolve_neg()


def has_memory(tensor: Tensor) -> bool:
    """True for a plain tensor; False for one that stands for another, on which nothing is computed."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def stands_for_memory(tensor: Tensor) -> bool:
    """Whether a tensor of shapes alone stands for a real one: finetune/memory's ShapeTensor, or torch's FakeTensor (known by
    its name: importing its class would import the compiler)."""
    return getattr(type(tensor), "STANDS_FOR_MEMORY", False) or type(tensor).__name__ == "FakeTensor"


def in_parts(part: Callable[[int, int], None], n: int, size: int) -> None:
    """part(first, last) over n pieces of `size` elements each, on as many threads as torch uses where they pay."""
    n_parts = min(torch.get_num_threads(), n * size // PART, n)
    if n_parts <= 1:
        if n:
            part(0, n)
        return
    bounds = [n * i // n_parts for i in range(n_parts + 1)]
    list(_pool(n_parts, os.getpid()).map(part, bounds[:-1], bounds[1:]))


@lru_cache
def _pool(n: int, process: int) -> ThreadPoolExecutor:
    """The process's own threads: a forked child can't use its parent's."""
    del process
    return ThreadPoolExecutor(n)
