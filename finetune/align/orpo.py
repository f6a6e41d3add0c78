"""ORPO (Hong et al. 2024, arXiv:2403.07691): fine-tuning and preference in one loss, without a reference model."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def orpo_loss(
    policy_chosen: Tensor,  # (B,) log pi(y_w | x) / |y_w|: the mean over response tokens, in nats, < 0
    policy_rejected: Tensor,  # (B,) log pi(y_l | x) / |y_l|
    *,
    beta: float = 0.1,  # lambda of the paper: the weight of the odds ratio
    nll: Tensor | None = None,  # () the chosen answers' cross entropy; None: the mean of -policy_chosen over the pairs
) -> Tensor:
    """nll + beta * mean over B pairs of -log s(log odds(y_w) - log odds(y_l)), () (equations 6 and 7).

        odds(y) = p / (1 - p),  p = exp(mean log-probability of y's tokens);   s is the logistic function

    Give `nll` to average over all tokens of the batch (TRL: those of the prompt too) instead of over pairs. Raises
    ValueError unless beta >= 0.
    """
    if not beta >= 0:
        raise ValueError(f"beta={beta} must be >= 0; start from 0.1, the paper's default")
    ratio = log_odds(policy_chosen) - log_odds(policy_rejected)  # (B,)
    return (-policy_chosen.mean() if nll is None else nll) - beta * F.logsigmoid(ratio).mean()


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, without cancellation near p = 0 and p = 1; p counts as 1 - 1e-7 at most, and stays finite."""
    near_one = logp > -math.log(2)
    # Each branch gets a harmless value where the other one is taken: an infinity would make the gradient NaN.
    low, high = logp.where(~near_one, -1.0), logp.where(near_one, -0.5).clamp(max=-1e-7)
    return logp - torch.where(near_one, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low)))
