"""AdamW, one tensor after the other, in plain PyTorch: the definition."""

from collections.abc import Sequence

from torch import Tensor


def adamw_reference_(
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
    """Loshchilov & Hutter 2017 (arXiv:1711.05101, algorithm 2): decay, the two moments, the bias-corrected step."""
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        g = g.to(m.dtype)
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g.square())
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        p.copy_(p.to(m.dtype) * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + eps))
