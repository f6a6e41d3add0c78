"""GRPO and its successors: advantages within a group of answers to one prompt, and the clipped surrogate.

With r = pi(o_t) / pi_old(o_t), the ratio of a token's probabilities now and at the rollout, and A its answer's advantage:

    grpo     -min(r A, clip(r, 1 - low, 1 + high) A)      mean over each answer's tokens, then over answers
                                                          (DeepSeekMath, arXiv:2402.03300, eq. 3)
    dr_grpo  the same                                     sum of tokens / (answers x N), N a constant: no answer's length
                                                          weighs its tokens (arXiv:2503.20783, section 3.2; its advantages
                                                          are not divided by the standard deviation)
    dapo     the same, with high > low                    mean over all tokens (arXiv:2503.14476, eq. 8)
    gspo     the same with r of the whole answer,         mean over answers
             r = exp(mean over tokens of log r)           (arXiv:2507.18071, eq. 5 and 7)
    cispo    -stop_gradient(min(r, 1 + high)) A log pi    mean over all tokens; every token keeps its gradient
                                                          (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5)
"""

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
KINDS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
OWN_MEAN = {"grpo": "sequence", "gspo": "sequence", "dapo": "token", "cispo": "token"}  # dr_grpo: constant:T


def group_advantages(
    rewards: Tensor,  # (B,) the answers to one prompt stand together, group_size of them
    group_size: int,
    *,
    normalize_std: bool = True,  # divide by the group's standard deviation (n - 1 in its denominator)
    eps: float = 1e-6,  # added to it; TRL's is 1e-4
) -> Tensor:
    """(reward - its group's mean) / (its group's standard deviation + eps), (B,) (DeepSeekMath, section 4.1.2).

    Exactly 0 in a group of equal rewards, which has no signal. Rewards [1, 0, 0, 1] give +-0.866, without normalize_std
    +-0.5. Raises ValueError unless group_size >= 2 divides B and all rewards are finite.
    """
    groups = _groups(rewards, group_size)  # (G, group_size) float64
    advantages = groups - groups.mean(1, keepdim=True)
    if normalize_std:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    flat = groups_without_signal(rewards, group_size)[:, None]
    return advantages.masked_fill(flat, 0.0).flatten().to(torch.promote_types(rewards.dtype, torch.float32))


def groups_without_signal(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups have equal rewards throughout, (G,) bool: all their advantages are 0."""
    groups = _groups(rewards, group_size)
    return groups.amax(1) == groups.amin(1)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(f"group_size={group_size} must be >= 2: an answer is compared with others to the same prompt")
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(f"rewards {tuple(rewards.shape)} are not whole groups of group_size={group_size}; give (B,)")
    if not rewards.isfinite().all():
        at = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"reward {at} is {float(rewards[at])}; rewards must be finite")
    return rewards.double().view(-1, group_size)


def mask_truncated(mask: Tensor, truncated: Tensor) -> Tensor:
    """mask (B, T) without the answers that were cut off, truncated (B,) bool: their reward says nothing about their text.

    They stay among the answers that a "sequence" or "constant" mean divides by, as in TRL.
    """
    return mask & ~truncated[:, None]


def policy_loss(
    logp: Tensor,  # (B, T) log pi(o_t | before) of the policy in training, nats
    old_logp: Tensor,  # (B, T) the same at the rollout, without gradient; logp.detach() when each rollout is used once
    advantages: Tensor,  # (B,), or (B, T) where each token has its own (PPO)
    mask: Tensor,  # (B, T) bool: the tokens of the answers
    *,
    kind: Kind = "grpo",
    clip_low: float = 0.2,  # the ratio counts from 1 - clip_low (not in cispo) ...
    clip_high: float = 0.2,  # ... to 1 + clip_high; DAPO's is 0.28. TRL's epsilon_high for cispo is 1 + clip_high
    kl_coef: float = 0.0,
    ref_logp: Tensor | None = None,  # (B, T) of the reference model; needed with kl_coef
    kl: Literal["k1", "k3", "k3_corrected"] = "k3",  # see `kl_estimate`
    normalize: str | None = None,  # sequence | token | constant:N; None: the kind's own (dr_grpo: N = T)
    weights: Tensor | None = None,  # (B, T) or (B, 1) from `importance_weights`: the sampler was not the policy
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, (), and figures, each () without gradient. Equations above; what is averaged over what:

        sequence    mean over each answer's tokens, then over all B answers, those without a token too
        token       mean over all tokens of the batch
        constant:N  sum of tokens / (B x N); N the longest answer that may come

    The value weighs little: at the first update of a rollout r = 1, and it is minus the mean advantage. Figures, over tokens
    (over answers in gspo): ratio, clipped_low and clipped_high (shares whose gradient the clip removed; cispo: whose weight it
    cut), old_kl (k3 of pi_old from pi), and kl where ref_logp is given. Raises ValueError for shapes that don't fit and
    settings that can't work.
    """
    normalize = _check(logp, old_logp, advantages, mask, kind, clip_low, clip_high, kl_coef, ref_logp, normalize)
    per_answer = advantages[:, None] if advantages.ndim == 1 else advantages  # (B, 1) or (B, T)
    log_ratio = (logp - old_logp.detach()).where(mask, 0.0)  # (B, T)
    if kind == "gspo":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    ratio = log_ratio.exp()
    too_low, too_high = ratio < 1 - clip_low, ratio > 1 + clip_high
    if kind == "cispo":
        terms = -ratio.clamp(max=1 + clip_high).detach() * per_answer * logp.where(mask, 0.0)
        low, high = torch.zeros_like(too_low), too_high
    else:
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        terms = -torch.minimum(ratio * per_answer, clipped * per_answer)
        low, high = too_low & (per_answer < 0), too_high & (per_answer > 0)
    if weights is not None:
        terms = terms * weights
    counted = mask.any(1, keepdim=True) if kind == "gspo" else mask
    figures = {
        "ratio": mean_over(ratio, counted, "token"),
        "clipped_low": mean_over(low.float(), counted, "token"),
        "clipped_high": mean_over(high.float(), counted, "token"),
        "old_kl": mean_over(ratio - 1 - log_ratio, counted, "token"),
    }
    if ref_logp is not None:
        distance = kl_estimate(logp.where(mask, 0.0), ref_logp.where(mask, 0.0), ratio, kl)  # (B, T)
        figures["kl"] = mean_over(distance, mask, "token")
        if kl_coef:
            terms = terms + kl_coef * distance
    return mean_over(terms.expand(mask.shape), mask, normalize), {name: v.detach() for name, v in figures.items()}


def kl_estimate(logp: Tensor, ref_logp: Tensor, ratio: Tensor, kind: str) -> Tensor:
    """Estimates of KL(pi, ref) a token from one sample of it, >= 0 but for k1 (Schulman 2020, "Approximating KL divergence").

    k1            ratio (log pi - log ref)              unbiased, the largest variance; without the ratio its gradient
                                                        would be 0 in the mean
    k3            ref/pi - 1 - log(ref/pi)              small variance, DeepSeekMath's eq. 4; its gradient is biased
    k3_corrected  ratio k3                              gradient unbiased too (DeepSeek-V3.2, arXiv:2512.02556)
    """
    gap = ref_logp - logp
    if kind == "k1":
        return -ratio * gap
    k3 = gap.exp() - 1 - gap
    return ratio * k3 if kind == "k3_corrected" else k3


def importance_weights(
    old_logp: Tensor,  # (B, T) log-probabilities of the rollout's weights, computed as training computes them
    sampler_logp: Tensor,  # (B, T) what the sampler itself reported: another dtype, kernel or stale weights
    mask: Tensor,  # (B, T) bool
    *,
    level: Literal["token", "sequence"] = "token",
    cap: float = 2.0,
    drop: bool = False,  # weights over the cap become 0 instead of the cap
) -> Tensor:
    """pi_old / pi_sampler, at most `cap`, (B, T), or of whole answers (B, 1), without gradient: truncated importance
    sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training")."""
    if not cap >= 1:
        raise ValueError(f"cap={cap} must be >= 1, the weight where sampler and policy agree")
    log_ratio = (old_logp - sampler_logp).detach().where(mask, 0.0)
    weights = (log_ratio.sum(1, keepdim=True) if level == "sequence" else log_ratio).exp()
    return weights.masked_fill(weights > cap, 0.0) if drop else weights.clamp(max=cap)


def mean_over(terms: Tensor, mask: Tensor, normalize: str) -> Tensor:
    """terms (B, T) where mask, as `policy_loss` averages them: (). 0 where there is no token."""
    terms = terms.where(mask, 0.0)
    if normalize == "sequence":
        return (terms.sum(1) / mask.sum(1).clamp(min=1)).mean()
    if normalize == "token":
        return terms.sum() / mask.sum().clamp(min=1)
    return terms.sum() / (mask.shape[0] * _constant(normalize))


def n_averaged(mask: Tensor, normalize: str) -> int:
    """How many things the mean is over: times this, the losses of micro-batches add up to that of the whole batch."""
    return int(mask.sum()) if normalize == "token" else mask.shape[0]


def _constant(normalize: str) -> int:
    """N of "constant:N"."""
    name, _, number = normalize.partition(":")
    if name != "constant" or not number.isdecimal() or int(number) < 1:
        raise ValueError(
            f"normalize={normalize!r}; choose sequence, token, or constant:N with N >= 1, such as constant:256"
        )
    return int(number)


def _check(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    kind: str,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    ref_logp: Tensor | None,
    normalize: str | None,
) -> str:
    """Refuse what can't work; returns what to average over."""
    if kind not in KINDS:
        raise ValueError(f"unknown policy loss {kind!r}; choose {', '.join(KINDS)}")
    for name, tensor in (("old_logp", old_logp), ("mask", mask), ("ref_logp", ref_logp)):
        if tensor is not None and tensor.shape != logp.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, logp {tuple(logp.shape)}; both are (B, T)")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; give torch.bool")
    if advantages.shape not in (logp.shape, logp.shape[:1]):
        raise ValueError(
            f"advantages have shape {tuple(advantages.shape)}; logp {tuple(logp.shape)} takes (B,) or (B, T)"
        )
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low={clip_low} and clip_high={clip_high} must be >= 0; start from 0.2")
    if kl_coef < 0:
        raise ValueError(f"kl_coef={kl_coef} must be >= 0; 0 leaves the reference out")
    if kl_coef and ref_logp is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logp, the reference model's log-probabilities; give them, or 0")
    if normalize is None:
        return OWN_MEAN.get(kind, f"constant:{logp.shape[1]}")
    if normalize not in ("sequence", "token"):
        _constant(normalize)
    return normalize
