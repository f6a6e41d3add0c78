"""RMSNorm, alone or fused with the residual add before it."""

from typing import overload

from torch import Tensor

from ..checks import check_floats, check_shape
from ..cpu_loops import takes_loops
from ..dispatch import Backend, choose_backend
from .reference import rms_norm_reference
from .torch_rms_norm import rms_norm_torch

MAX_D = 16384  # the Triton kernels hold a whole row in a program's registers; a longer one spills


@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: None = None, backend: Backend = "auto") -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    *,
    eps: float,  # added to the mean square; the model file's rms_norm_eps
    residual: Tensor | None = None,  # (..., D), the stream that x is added to
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """h / sqrt(mean(h^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).

    h is x, or x + residual; with a residual the result is the pair (normed, x + residual). Computed in float32; normed
    has h's dtype whatever the weight's is. A row of zeros stays zeros. Raises ValueError for shapes and dtypes that don't fit.
    """
    check_floats("rms_norm", x=x, weight=weight, **({} if residual is None else {"residual": residual}))
    if x.ndim == 0:
        raise ValueError("rms_norm: x has shape (), it needs a last axis to normalise over")
    check_shape("rms_norm", "weight", weight, (x.shape[-1],), f"it has one entry per feature of x {tuple(x.shape)}")
    if residual is not None:
        check_shape("rms_norm", "residual", residual, tuple(x.shape), "it is added to x")
    if eps < 0:
        raise ValueError(f"rms_norm: eps must be >= 0, got {eps}; 1e-6 and 1e-5 are usual")
    tensors = [x, weight] if residual is None else [x, weight, residual]
    unsupported = f"its rows are at most {MAX_D} long, got {x.shape[-1]}" if x.shape[-1] > MAX_D else None
    if takes_loops("rms_norm", backend, tensors):
        from .numba_rms_norm import rms_norm_numba

        return rms_norm_numba(x, weight, eps=eps, residual=residual)
    chosen = choose_backend("rms_norm", backend, tensors, unsupported=unsupported)
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps=eps, residual=residual)
    if chosen == "torch":
        return rms_norm_torch(x, weight, eps=eps, residual=residual)
    from .triton_rms_norm import rms_norm_triton

    return rms_norm_triton(x, weight, eps=eps, residual=residual)
