"""The gate of the feed-forward block: silu(gate) * up."""

from torch import Tensor

from ..checks import check_floats, check_shape
from ..cpu_loops import takes_loops
from ..dispatch import Backend, choose_backend, name_of
from .reference import swiglu_reference
from .torch_swiglu import swiglu_torch


def swiglu(
    gate: Tensor,  # (..., F)
    up: Tensor,  # (..., F)
    *,
    backend: Backend = "auto",
) -> Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020, arXiv:2002.05202, eq. 6).

    The backward pass recomputes silu(gate); only gate and up are kept. Raises ValueError unless both have one shape and dtype.
    """
    check_floats("swiglu", gate=gate, up=up)
    check_shape("swiglu", "up", up, tuple(gate.shape), "it has gate's shape")
    if gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate is {name_of(gate.dtype)} but up is {name_of(up.dtype)}; cast one to the other")
    if takes_loops("swiglu", backend, [gate, up]):
        from .numba_swiglu import swiglu_numba

        return swiglu_numba(gate, up)
    chosen = choose_backend("swiglu", backend, [gate, up])
    if chosen == "reference":
        return swiglu_reference(gate, up)
    if chosen == "torch":
        return swiglu_torch(gate, up)
    from .triton_swiglu import swiglu_triton

    return swiglu_triton(gate, up)
