"""DPO and its relatives: losses on pairs of answers, from the log-probabilities of a policy and a frozen reference."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Kind = Literal["sigmoid", "ipo", "robust", "hinge"]
KINDS = ("sigmoid", "ipo", "robust", "hinge")


def dpo_loss(
    policy_chosen: Tensor,  # (B,) log pi(y_w | x), summed over response tokens, in nats (ipo: their mean per token)
    policy_rejected: Tensor,  # (B,) log pi(y_l | x)
    ref_chosen: Tensor,  # (B,) the same two under the frozen reference model
    ref_rejected: Tensor,  # (B,)
    *,
    beta: float = 0.1,  # per nat; larger keeps the policy nearer the reference
    kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,  # how often the labels are thought to be swapped, in [0, 0.5)
) -> Tensor:
    """Mean loss over B preference pairs, (). With h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected), e the
    label smoothing and s the logistic function:

        sigmoid  -(1 - e) log s(beta h) - e log s(-beta h)                 e = 0: DPO, arXiv:2305.18290, eq. 7;
                                                                           e > 0: conservative DPO (Mitchell 2023)
        robust   [-(1 - e) log s(beta h) + e log s(-beta h)] / (1 - 2 e)   arXiv:2403.00409: unbiased under swapped labels
        ipo      (h - 1 / (2 beta))^2                                      arXiv:2310.12036, eq. 17; beta is its tau
        hinge    max(0, 1 - beta h)                                        SLiC's loss (arXiv:2305.10425) on DPO's rewards

    For ipo give log-probabilities divided by the number of response tokens: its authors confirmed that to TRL, and beta then
    means the same for answers of every length. sigmoid and robust are log 2 while policy and reference agree. Raises
    ValueError for an unknown kind, beta <= 0, or a label_smoothing outside [0, 0.5) or beside a kind that has none.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown DPO loss {kind!r}; choose {', '.join(KINDS)}")
    if not beta > 0:
        raise ValueError(f"beta={beta} must be > 0; start from 0.1, the paper's default")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 0.5), the share of swapped labels")
    if label_smoothing and kind not in ("sigmoid", "robust"):
        raise ValueError(
            f"label_smoothing={label_smoothing} is for sigmoid and robust; the {kind} loss has none: leave it out"
        )
    h = preference_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square().mean()
    if kind == "hinge":
        return (1 - beta * h).relu().mean()
    right, swapped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)  # (B,)
    if kind == "robust":
        return (((1 - label_smoothing) * right - label_smoothing * swapped) / (1 - 2 * label_smoothing)).mean()
    return ((1 - label_smoothing) * right + label_smoothing * swapped).mean()


def preference_margin(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    """How much more the policy moved towards the chosen answer than towards the rejected one, (B,) nats; > 0 is right."""
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
