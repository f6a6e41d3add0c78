"""Reward models: a scalar head on the hidden states, trained on pairs, or a verifier that judges every token."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.model.init import Role


class ScalarHead(nn.Module):
    """One number a position: a reward model's score, PPO's value, or a verifier's logit. Weight N(0, 1 / (D + 1)), bias 0."""

    ROLES: ClassVar[dict[str, Role]] = {"score.weight": "head", "score.bias": "bias"}

    def __init__(self, d_model: int, *, seed: int = 0) -> None:
        super().__init__()
        self.score = nn.Linear(d_model, 1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.score.weight.normal_(
                0.0, (d_model + 1) ** -0.5, generator=generator
            )  # Stiennon et al. 2020, appendix B
            self.score.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (...) float32."""
        return self.score(hidden).squeeze(-1).float()


def last_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """The score at each row's last true place of mask (B, T), (B,): the whole answer has been read there.

    Raises ValueError for a row without one.
    """
    if not mask.any(1).all():
        raise ValueError(f"row {int((~mask.any(1)).nonzero()[0])} has no token to read a score at")
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)  # (B,)
    return scores.gather(1, last[:, None]).squeeze(1)


def bradley_terry_loss(
    chosen: Tensor,  # (B,) scores of the preferred answers
    rejected: Tensor,  # (B,)
    *,
    margin: Tensor | None = None,  # (B,) how much better chosen is said to be (Llama 2, arXiv:2307.09288, eq. 2)
    center: float = 0.0,  # weight of (chosen + rejected)^2, which keeps scores around 0 (arXiv:2312.09244)
) -> Tensor:
    """Mean over B pairs, (), of -log s(chosen - rejected - margin) + center (chosen + rejected)^2, s the logistic function
    (Ouyang et al. 2022, arXiv:2203.02155, eq. 1, for pairs). log 2 while both score the same."""
    gap = chosen - rejected if margin is None else chosen - rejected - margin
    return -F.logsigmoid(gap).mean() + center * (chosen + rejected).square().mean()


def verifier_loss(
    scores: Tensor,  # (B, T) logits of "this answer will turn out right", from a ScalarHead
    correct: Tensor,  # (B,) bool: whether the whole answer is right
    mask: Tensor,  # (B, T) bool: the answers' tokens
) -> Tensor:
    """Binary cross entropy at every token of an answer against the whole answer's correctness; mean over tokens, ().

    The token-level verifier of Cobbe et al. 2021 (arXiv:2110.14168, section 4.2), which learns a value at each token; they
    use a squared error, here it is the logistic one, so that scores are log-odds.
    """
    target = correct[:, None].expand(mask.shape).to(scores.dtype)
    losses = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    return losses.where(mask, 0.0).sum() / mask.sum().clamp(min=1)
