"""A short causal convolution over time, each channel by itself."""

from torch import Tensor

from ..checks import check_floats, check_integers, check_shape
from ..dispatch import Backend, choose_backend
from .reference import causal_conv_reference
from .torch_causal_conv import causal_conv_torch


def causal_conv(
    x: Tensor,  # (B, T, C)
    weight: Tensor,  # (C, K): the last column meets the token itself
    *,
    before: Tensor | None = None,  # (B, K - 1, C), the tokens before x; None: zeros
    cu_seqlens: Tensor | None = None,  # (n_docs + 1,) with B = 1: no document sees the one before
    backend: Backend = "auto",
) -> Tensor:  # (B, T, C)
    """out[b, t, c] = sum_j weight[c, j] x[b, t - K + 1 + j, c], summed in float32 (the "short convolution" of arXiv:2412.06464,
    section 3.4). Differentiable in x, weight and before. Raises ValueError for shapes that don't fit."""
    check_floats("causal_conv", x=x, weight=weight)
    if x.ndim != 3 or weight.ndim != 2:
        raise ValueError(
            f"causal_conv: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (B, T, C) and (C, K)"
        )
    check_shape("causal_conv", "weight", weight, (x.shape[2], weight.shape[1]), f"x is {tuple(x.shape)}")
    if before is not None:
        check_shape("causal_conv", "before", before, (x.shape[0], weight.shape[1] - 1, x.shape[2]), "it precedes x")
    if cu_seqlens is not None:
        check_integers("causal_conv", "cu_seqlens", cu_seqlens, x.device)
        if x.shape[0] != 1 or before is not None:
            raise ValueError(f"causal_conv: cu_seqlens needs B = 1 and nothing before it, got B = {x.shape[0]}")
    chosen = choose_backend("causal_conv", backend, [x, weight], unsupported="no Triton form is written")
    run = causal_conv_reference if chosen == "reference" else causal_conv_torch
    return run(x, weight, before, cu_seqlens)
