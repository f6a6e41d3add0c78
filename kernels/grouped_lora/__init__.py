"""LoRA for a batch in which each row has its own adapter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_floats, check_integers, check_shape, readable
from ..dispatch import Backend, choose_backend, name_of
from .reference import grouped_lora_reference
from .torch_grouped_lora import grouped_lora_torch

MAX_RANK = 256  # of the Triton kernels: the widest tile that fits beside the matrices' in registers and shared memory


def grouped_lora(
    x: Tensor,  # (N, in)
    lora_a: Sequence[Tensor],  # n_adapters of (R_i, in)
    lora_b: Sequence[Tensor],  # n_adapters of (out, R_i)
    rows: Tensor,  # (N,) int: each row's adapter, or -1 for none
    scales: Sequence[float] | Tensor,  # n_adapters of alpha_i / R_i
    *,
    backend: Backend = "auto",
) -> Tensor:  # (N, out)
    """What each row's adapter adds to the base linear: scales[i] * (x_n A_i^T) B_i^T with i = rows[n], 0 where rows[n] = -1.

    The result is the delta, not x + delta (in and out differ in general): the caller adds it to the base linear's output.
    Ranks may differ, rows may be in any order (Punica's SGMV, arXiv:2310.18547, section 4; S-LoRA, arXiv:2311.03285, 5).
    Differentiable in x, lora_a and lora_b. Raises ValueError for shapes and dtypes that don't fit and, on the CPU, for rows
    outside [-1, n_adapters); on a GPU, where looking would wait for it, such rows get 0.
    """
    check_floats("grouped_lora", x=x)
    check_integers("grouped_lora", "rows", rows, x.device)
    if x.ndim != 2:
        raise ValueError(f"grouped_lora: x has shape {tuple(x.shape)}; it takes (N, in): flatten batch and time first")
    n, n_scales = len(lora_a), len(scales)
    if n == 0 or len(lora_b) != n or n_scales != n:
        raise ValueError(
            f"grouped_lora: {n} lora_a, {len(lora_b)} lora_b and {n_scales} scales; "
            "give one of each for every adapter, at least one"
        )
    check_shape("grouped_lora", "rows", rows, (x.shape[0],), "one adapter number for each row of x")
    d_out = lora_b[0].shape[0]
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        check_floats("grouped_lora", x=x, **{f"lora_a[{i}]": a, f"lora_b[{i}]": b})
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != x.shape[1] or b.shape != (d_out, a.shape[0]):
            raise ValueError(
                f"grouped_lora: adapter {i} has lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)}; "
                f"it takes (R, {x.shape[1]}) and ({d_out}, R)"
            )
    if readable(rows) and rows.numel() and not (int(rows.min()) >= -1 and int(rows.max()) < n):
        raise ValueError(
            f"grouped_lora: rows span {int(rows.min())}..{int(rows.max())}; each must be in -1..{n - 1}, -1 for no adapter"
        )
    chosen = choose_backend("grouped_lora", backend, [x, *lora_a, *lora_b], unsupported=_unsupported(lora_a, lora_b))
    if chosen == "triton":
        from .triton_grouped_lora import grouped_lora_triton

        return grouped_lora_triton(x, lora_a, lora_b, rows, scales)
    factors = scales if isinstance(scales, Tensor) else torch.tensor(list(scales), dtype=torch.float32)
    run = grouped_lora_reference if chosen == "reference" else grouped_lora_torch
    return run(x, lora_a, lora_b, rows, factors)


def _unsupported(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]) -> str | None:
    """Why the Triton kernels can't take these adapters."""
    rank = max(a.shape[0] for a in lora_a)
    if rank > MAX_RANK:
        return f"its ranks are at most {MAX_RANK}, got {rank}"
    dtypes = {m.dtype for m in (*lora_a, *lora_b)}
    if len(dtypes) > 1:
        return f"all adapters must have one dtype, got {', '.join(sorted(name_of(d) for d in dtypes))}"
    return None
