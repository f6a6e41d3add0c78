"""Rotary position embedding of queries and keys."""

import torch
from torch import Tensor

from ..checks import check_floats
from ..cpu_loops import takes_loops
from ..dispatch import Backend, choose_backend
from .reference import rope_reference
from .torch_rope import rope_torch


def rope(
    q: Tensor,  # (B, H, T, Dh)
    k: Tensor,  # (B, K, T, Dh)
    cos: Tensor,  # (B or 1, T, Dh / 2) float32: the angles' cosines, one row per position
    sin: Tensor,  # (B or 1, T, Dh / 2) float32
    *,
    inplace: bool = False,  # write into q and k and return them; for inference, where no gradient is recorded
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Turns (x_i, x_{i + Dh/2}) of q and k by their position's angle (Su et al. 2021, arXiv:2104.09864, eq. 34).

    The pairs are Hugging Face's half-split ("rotate_half") ones, not neighbours. Computed in float32; each result has its
    input's dtype. Differentiable in q and k; cos and sin are constants. Raises ValueError for shapes and dtypes that don't
    fit, and for inplace=True while gradients of q or k are recorded.
    """
    check_floats("rope", q=q, k=k, cos=cos, sin=sin)
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"rope: q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}; it takes (B, H, T, Dh) and (B, K, T, Dh)"
        )
    B, _, T, Dh = q.shape
    if Dh % 2:
        raise ValueError(f"rope: the head size {Dh} is odd; it must be even, pairs are turned")
    if (k.shape[0], k.shape[2], k.shape[3]) != (B, T, Dh):
        raise ValueError(f"rope: k {tuple(k.shape)} and q {tuple(q.shape)} differ in more than the number of heads")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.ndim != 3 or table.shape[0] not in (1, B) or tuple(table.shape[1:]) != (T, Dh // 2):
            raise ValueError(
                f"rope: {name} has shape {tuple(table.shape)}; "
                f"it takes ({B}, {T}, {Dh // 2}) or (1, {T}, {Dh // 2}) for q {tuple(q.shape)}"
            )
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"rope: cos {tuple(cos.shape)} {cos.dtype} and sin {tuple(sin.shape)} {sin.dtype} must be of one kind"
        )
    if inplace and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise ValueError("rope: inplace=True, but gradients of q or k are recorded; call it under torch.no_grad()")
    if takes_loops("rope", backend, [q, k, cos, sin]):
        from .numba_rope import rope_numba

        return rope_numba(q, k, cos, sin, inplace=inplace)
    chosen = choose_backend("rope", backend, [q, k, cos, sin])
    if chosen == "reference":
        rotated = rope_reference(q, k, cos, sin)
        return (q.copy_(rotated[0]), k.copy_(rotated[1])) if inplace else rotated
    if chosen == "torch":
        return rope_torch(q, k, cos, sin, inplace=inplace)
    from .triton_rope import rope_triton

    return rope_triton(q, k, cos, sin, inplace=inplace)
