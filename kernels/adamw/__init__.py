"""The AdamW update of many tensors in one call."""

from collections.abc import Sequence

from torch import Tensor

from ..checks import check_floats, check_shape
from ..dispatch import Backend, choose_backend
from .reference import adamw_reference_
from .steps import read_steps
from .torch_adamw import adamw_torch_

__all__ = ["adamw_update_", "read_steps"]


def adamw_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],  # first moments
    exp_avg_sqs: Sequence[Tensor],  # second moments
    *,
    step: int | Sequence[int],  # updates of each parameter, this one included: 1 at its first
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    backend: Backend = "auto",
) -> None:
    """One AdamW step (Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2), in place on params and both moments.

    weight_decay is decoupled: the parameter shrinks by lr * weight_decay. Moments may be wider than parameters (float32
    beside bfloat16). A parameter whose first gradient comes late has its own count of steps, as in torch.optim.AdamW: the
    bias correction divides by 1 - beta^step. There is no Triton kernel: torch's fused operator already reads and writes
    every tensor once, and no measurement on a GPU shows a gain over it; backend="triton" says so. Raises ValueError for
    lists and shapes that don't fit.
    """
    n = len(params)
    if not n == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        raise ValueError(
            f"adamw: {n} params, {len(grads)} grads, {len(exp_avgs)} exp_avgs, {len(exp_avg_sqs)} exp_avg_sqs; "
            "give one of each for every parameter"
        )
    steps = [step] * n if isinstance(step, int) else list(step)
    if len(steps) != n:
        raise ValueError(f"adamw: {n} params, {len(steps)} steps; give one step for each parameter, or one for all")
    if min(steps, default=1) < 1:
        raise ValueError(
            f"adamw: step={min(steps)}; the first update is step 1, the bias correction divides by 1 - beta^step"
        )
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        check_floats("adamw", **{f"params[{i}]": p, f"grads[{i}]": g, f"exp_avgs[{i}]": m, f"exp_avg_sqs[{i}]": v})
        for name, tensor in (("grads", g), ("exp_avgs", m), ("exp_avg_sqs", v)):
            check_shape("adamw", f"{name}[{i}]", tensor, tuple(p.shape), "it has its parameter's shape")
    unsupported = "it has no kernel: torch's fused update is already one pass; use backend='torch'"
    chosen = choose_backend("adamw", backend, params, unsupported=unsupported)
    run = adamw_reference_ if chosen == "reference" else adamw_torch_
    run(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps=steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
    )
