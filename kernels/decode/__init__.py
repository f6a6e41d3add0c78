"""The small operations of one decoding step on the CPU, each in one pass: between the matrix products, what costs is the
number of operators (2 us each at best), not their arithmetic.

    add_rms_norm_       residual += x, then RMSNorm of it                                        5 operators -> 1
    place_token_        QK-norm and RoPE of one token's q and k, k and v written to the cache   20 operators -> 1

Only for inference, float32, contiguous tensors on the CPU; `can_run` tells whether that is so. Elsewhere the layers' usual
operators run (kernels/rms_norm, kernels/rope).
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cpu_loops import has_numba


@cache
def _loops() -> ModuleType:
    """The compiled loops; Numba is imported on the first decoding step and not before."""
    from . import numba_cpu

    return numba_cpu


def add_rms_norm_(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See numba_cpu.add_rms_norm_."""
    return _loops().add_rms_norm_(x, residual, weight, eps)


def place_token_(*tensors: Any, **options: Any) -> None:
    """See numba_cpu.place_token_."""
    _loops().place_token_(*tensors, **options)


def can_run(tensor: Tensor) -> bool:
    """True for a plain float32 CPU tensor while no gradient is recorded and nothing has to see each operator: no dispatch
    mode (FakeTensor, counters), no torch.func transform, no tracing, no torch.compile, no autocast."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype is torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
        and torch._C._get_tracing_state() is None
        and has_numba()
    )
