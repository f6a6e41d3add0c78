"""PPO (Schulman et al. 2017, arXiv:1707.06347) on answers: a reward a token, a value a token, advantages by GAE.

The policy's loss is grpo.policy_loss with advantages (B, T) and normalize="token": PPO's equation 7.
"""

import torch
from torch import Tensor


def token_rewards(
    scores: Tensor,  # (B,) the reward of each whole answer
    logp: Tensor,  # (B, T) of the policy at the rollout
    ref_logp: Tensor,  # (B, T) of the reference
    mask: Tensor,  # (B, T) bool: the answers' tokens
    *,
    kl_coef: float,
) -> Tensor:
    """-kl_coef (log pi - log ref) at each token, plus the score at the answer's last one, (B, T), 0 where not mask (Ouyang et
    al. 2022, arXiv:2203.02155, eq. 2). Raises ValueError for an answer without a token: its score has no place."""
    if not mask.any(1).all():
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"answer {row} has no token to carry its score; leave it out of the batch")
    rewards = (-kl_coef * (logp - ref_logp)).where(mask, 0.0).detach()
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)  # (B,)
    return rewards.scatter_add(1, last[:, None], scores.to(rewards.dtype)[:, None])


def advantages_and_returns(
    rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T) V(s_t), what the value head expects from token t on
    mask: Tensor,  # (B, T) bool; tokens between an answer's first and last may be missing (another speaker's)
    *,
    gamma: float = 1.0,  # discount a token; 1: an answer is one episode whose length costs nothing
    lam: float = 0.95,  # 0: one step (little variance, the value's bias); 1: the whole return minus the value
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16), (B, T) and (B, T), no gradient:

        delta_t = reward_t + gamma V_(t+1) - V_t,   A_t = delta_t + gamma lam A_(t+1),   return_t = A_t + V_t

    with V = A = 0 after the last token. All are 0 where not mask.
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must lie in [0, 1]")
    values = values.detach().where(mask, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = advantage.where(mask[:, t], 0.0)
        next_value = values[:, t].where(mask[:, t], next_value)
        next_advantage = advantage.where(mask[:, t], next_advantage)
    return advantages, advantages + values


def whiten(advantages: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Advantages with mean 0 and standard deviation 1 over the batch's tokens, (B, T); 0 where not mask."""
    kept = advantages[mask]
    scaled = (advantages - kept.mean()) / (kept.std(correction=0) + eps)
    return scaled.where(mask, 0.0)


def value_loss(
    values: Tensor,  # (B, T) of the value head in training
    old_values: Tensor,  # (B, T) at the rollout
    returns: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    *,
    clip: float | None = 0.2,  # how far a value may move from its old one and still count; None: no clipping
) -> Tensor:
    """1/2 max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip` of the old value; mean over all tokens, () (PPO's code,
    not its paper). Raises ValueError unless clip > 0."""
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} must be > 0; None switches it off")
    errors = (values - returns).square()
    if clip is not None:
        held = torch.clamp(values, old_values - clip, old_values + clip)
        errors = torch.maximum(errors, (held - returns).square())
    return 0.5 * errors.where(mask, 0.0).sum() / mask.sum().clamp(min=1)
