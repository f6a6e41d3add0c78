"""Which implementation runs: decided from the tensors at hand, or from the device that a memory prediction is made for.

Never from an environment variable or a global.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Literal, TypeVar

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "torch", "triton", "numba"]  # numba: where takes_loops is asked first
Chosen = Literal["reference", "torch", "triton"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_predicted: ContextVar[Literal["cpu", "cuda"] | None] = ContextVar("predicted_device", default=None)
F = TypeVar("F", bound=Callable)
T = TypeVar("T")


def constant(function: F) -> F:
    """torch.compile calls this function once and takes its result for a constant.

    What torch.compiler.assume_constant_result does, which imports torch._dynamo: as long as importing torch itself.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


@contextmanager
def predicting(device: Literal["cpu", "cuda"]) -> Iterator[None]:
    """Within the block memory is predicted: tensors have no values, and kernels are chosen as on `device`, in this thread.

    A GPU's choice needs no GPU. Where Triton is not installed, PyTorch's operators are chosen for it too.
    """
    token = _predicted.set(device)
    try:
        yield
    finally:
        _predicted.reset(token)


@constant
def predicted_device() -> Literal["cpu", "cuda"] | None:
    """The device that memory is predicted for; None outside of a prediction."""
    return _predicted.get()


def sampled(pieces: Sequence[T]) -> Sequence[T]:
    """All pieces of a tiled computation; while memory is predicted the first and the last two, which need the most.

    Those between take the same memory as the last but one, and a large tensor has hundreds of them.
    """
    if len(pieces) <= 3 or predicted_device() is None:
        return pieces
    return [pieces[0], *pieces[-2:]]


@constant
def triton_interprets() -> bool | None:
    """Whether Triton's interpreter is on; None where Triton is not installed. A constant to torch.compile."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return bool(knobs.runtime.interpret)


def triton_problem(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype] = FLOATS) -> str | None:
    """Why Triton can't run on these tensors, or None when it can.

    CPU tensors are accepted while Triton's interpreter is switched on: that is how the kernels are tested without a GPU.
    """
    interprets = triton_interprets()
    if interprets is None:
        return "triton is not installed; pip install triton (Linux x86-64)"
    for tensor in tensors:
        if tensor.device.type != "cuda" and not interprets and predicted_device() != "cuda":
            return f"it needs CUDA tensors, got one on {tensor.device}; move them or use backend='torch'"
        if tensor.dtype not in dtypes:
            return f"it takes {', '.join(name_of(d) for d in dtypes)}, got {name_of(tensor.dtype)}"
    return None


def choose_backend(
    kernel: str,
    backend: Backend,
    tensors: Sequence[Tensor],
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    unsupported: str | None = None,  # the kernel's own reason not to run in Triton (a head size, a flag)
) -> Chosen:
    """Resolve `auto`: Triton for CUDA tensors that it supports, else PyTorch's own operators.

    An explicit backend that can't run raises ValueError with the reason; `auto` never raises.
    """
    if backend == "numba":
        raise ValueError(f"{kernel}: backend 'numba' can't run here: it has no compiled CPU loops; use backend='auto'")
    if backend not in ("auto", "reference", "torch", "triton"):
        raise ValueError(f"unknown backend {backend!r}; choose auto, reference, torch or triton")
    if backend in ("reference", "torch"):
        return backend
    if backend == "auto" and any((predicted_device() or tensor.device.type) != "cuda" for tensor in tensors):
        return "torch"  # decided without asking Triton, whose settings torch.compile can't trace
    problem = triton_problem(tensors, dtypes) or unsupported
    if backend == "triton":
        if problem:
            raise ValueError(f"{kernel}: backend 'triton' can't run here: {problem}")
        return "triton"
    return "triton" if problem is None else "torch"


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on this GPU; sm_90's 227 KB stand for it in the interpreter."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def name_of(dtype: torch.dtype) -> str:
    """`torch.float32` -> `float32`, for messages."""
    return str(dtype).removeprefix("torch.")
