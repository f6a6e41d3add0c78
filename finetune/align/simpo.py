"""SimPO (Meng et al. 2024, arXiv:2405.14734): the mean log-probability is the reward, so there is no reference model."""

import torch.nn.functional as F
from torch import Tensor


def simpo_loss(
    policy_chosen: Tensor,  # (B,) log pi(y_w | x) / |y_w|: the mean over response tokens, in nats
    policy_rejected: Tensor,  # (B,) log pi(y_l | x) / |y_l|
    *,
    beta: float = 2.0,  # per nat a token; the paper's range is 2.0 to 10
    gamma: float = 1.0,  # the margin that chosen must lead by; the paper tunes gamma / beta in [0, 1]
) -> Tensor:
    """Mean over B pairs, (), of -log s(beta policy_chosen - beta policy_rejected - gamma), s the logistic function (eq. 6).

    Raises ValueError unless beta > 0 and gamma >= 0.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be > 0; start from 2.0")
    if not gamma >= 0:
        raise ValueError(f"gamma={gamma} must be >= 0; start from beta / 2")
    return -F.logsigmoid(beta * (policy_chosen - policy_rejected) - gamma).mean()
