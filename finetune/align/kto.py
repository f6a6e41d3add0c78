"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306): single answers labelled desirable or not, without pairs."""

import torch
from torch import Tensor


def kto_loss(
    policy_logp: Tensor,  # (B,) log pi(y | x), summed over response tokens, in nats
    ref_logp: Tensor,  # (B,) the same under the frozen reference
    desirable: Tensor,  # (B,) bool, the label of each answer
    kl: Tensor,  # () z_0 from `kto_kl`
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,  # lambda_D; the paper wants weight x count of the two kinds within 1:1 to 4:3
    undesirable_weight: float = 1.0,  # lambda_U
) -> Tensor:
    """Mean over B answers, (), of section 4: with r = policy_logp - ref_logp and s the logistic function,

        lambda_D (1 - s(beta (r - z_0)))   desirable
        lambda_U (1 - s(beta (z_0 - r)))   undesirable

    Is half the weight while policy and reference agree and z_0 = 0. No gradient flows through kl. Raises ValueError unless
    beta > 0 and the weights are >= 0.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be > 0; start from 0.1, the paper's default")
    if desirable_weight < 0 or undesirable_weight < 0:
        raise ValueError(
            f"desirable_weight={desirable_weight} and undesirable_weight={undesirable_weight} must be >= 0"
        )
    gain = beta * (policy_logp - ref_logp - kl.detach())  # (B,)
    losses = 1 - torch.where(desirable, gain, -gain).sigmoid()
    return torch.where(desirable, desirable_weight * losses, undesirable_weight * losses).mean()


def kto_kl(
    policy_mismatched: Tensor,  # (B,) log pi(y' | x), each prompt with the answer of another row of the batch
    ref_mismatched: Tensor,  # (B,)
) -> Tensor:
    """z_0 of section 4: max(0, mean of log pi - log ref over mismatched answers), (), without gradient."""
    return (policy_mismatched - ref_mismatched).detach().mean().clamp(min=0)
