"""`graft ppo`: prompts and rewards -> a policy that earns more, with a value head that says what to expect at each token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...base.model.transformer import Transformer
from ...base.run import Run
from ...base.training.objective import Batch, Figures
from . import setup
from .grpo import policy_loss
from .logprobs import head_logprobs, hidden_and_head, scored_rows, spread
from .ppo import advantages_and_returns, token_rewards, value_loss, whiten
from .reward_model import ScalarHead
from .rollout_task import Reference, RolloutOptions, spec_text, stage
from .run import align
from .step_memory import AnswerWork


@dataclass(frozen=True)
class PPOOptions:
    """The surrogate, the advantages and the value head. Raises ValueError for values that can't work."""

    clip: float = 0.2  # how far a token's probability ratio may move from 1 and still count
    kl_coef: float = 0.05  # per nat a token that the policy is away from the reference, off the reward
    gamma: float = 1.0  # discount a token
    lam: float = 0.95  # of generalized advantage estimation
    value_coef: float = 0.1  # weight of the value head's loss, which shares the policy's layers
    value_clip: float = 0.2  # how far a value may move from its old one and still count

    @property
    def min_group(self) -> int:
        """Answers that a prompt needs at least."""
        return 1

    def __post_init__(self) -> None:
        for name in ("clip", "value_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0; start from 0.2")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("kl_coef", "value_coef"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be >= 0 and finite")


class PPO:
    """Algorithm of the rollouts and objective of the loop; gives the model a value head, which trains with it.

    The value of token t is read at the token before it, where the policy decides on t. Figures beside policy_loss's:
    value_loss, and explained, the share of the returns' variance that the old values foresaw.
    """

    def __init__(self, config: Run, policy: setup.Policy, reference: Reference, stat_names: list[str]) -> None:
        self.options, self.rollouts, self.stat_names = config.objective, config.data, stat_names
        self.model, self.reference, self.micro_batch = policy.model, reference, config.train.micro_batch
        device = policy.model.model.embed_tokens.weight.device
        head = ScalarHead(policy.model.config.d_model, seed=config.train.seed).to(device)
        policy.model.value_head = head  # pyright: ignore[reportArgumentType] (a module: its weights train and are in checkpoints)

    def complete(self, batch: dict[str, Tensor], rewards: Tensor) -> dict[str, Tensor]:
        """old_logp, old_values, advantages (whitened over the rollout's tokens) and returns, (B, T) each."""
        options, mask = self.options, batch["mask"]
        old_logp, old_values = self._over_micro_batches(self.model, batch)
        ref_logp = old_logp
        if options.kl_coef:
            model, block = self.reference()
            with block:
                ref_logp, _ = self._over_micro_batches(model, batch)
        earned = token_rewards(rewards, old_logp, ref_logp, mask, kl_coef=options.kl_coef)
        advantages, returns = advantages_and_returns(earned, old_values, mask, gamma=options.gamma, lam=options.lam)
        return {
            "old_logp": old_logp,
            "old_values": old_values,
            "advantages": whiten(advantages, mask),
            "returns": returns.where(mask, 0.0),
        }

    def _over_micro_batches(self, model: Transformer, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        parts = zip(batch["ids"].split(self.micro_batch), batch["mask"].split(self.micro_batch), strict=True)
        found = [self.logps_and_values(model, ids, mask) for ids, mask in parts]
        logp, values = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        return logp, values

    def logps_and_values(self, model: Transformer, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(token) and V before it, (B, T) each, 0 where not mask, from one pass; a model without a value head gives 0."""
        hidden, head = hidden_and_head(model, ids, None, None)
        before, labels, at = scored_rows(hidden, ids, mask)
        temperature = self.rollouts.temperature
        logp, _ = head_logprobs(head, before, labels, temperature=temperature, n_vocab=model.config.vocab_size)
        value_head = getattr(model, "value_head", None)
        values = torch.zeros_like(logp) if value_head is None else value_head(before)
        return spread(logp, at, mask), spread(values, at, mask)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Figures]:
        """(policy loss + value_coef * value loss) times the tokens that both are means over."""
        options, mask = self.options, batch["mask"]
        logp, values = self.logps_and_values(cast(Transformer, model), batch["ids"], mask)
        clip = {"clip_low": options.clip, "clip_high": options.clip}
        value, figures = policy_loss(logp, batch["old_logp"], batch["advantages"], mask, normalize="token", **clip)
        of_values = value_loss(values, batch["old_values"], batch["returns"], mask, clip=options.value_clip)
        returns, old = batch["returns"][mask], batch["old_values"][mask]
        explained = 1 - (returns - old).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
        stats = dict(zip(self.stat_names, batch["stats"], strict=True))
        figures = {**figures, "value_loss": of_values.detach(), "explained": explained, **stats}
        n = self.n_labels(batch)
        return (value + options.value_coef * of_values) * n, {name: figure * n for name, figure in figures.items()}

    def detach(self, model: Transformer) -> None:
        """Without the value head."""
        del model.value_head

    def n_labels(self, batch: Batch) -> int:
        return int(batch["mask"].sum())

    def n_tokens(self, batch: Batch) -> int:
        return batch["ids"].numel()


def _work(config: Run) -> AnswerWork:
    return AnswerWork(config, PPO, per_token=["advantages", "old_logp", "old_values", "returns"], per_row=[])


STAGE = stage("ppo", setup.parts(PPOOptions, RolloutOptions), PPO, _work, {"group_size": 1, "updates_per_rollout": 4})


def ppo(
    *, base: Path | str, data: Path | str, rewards: str | Mapping[str, float], out: Path | str, **options: Any
) -> dict[str, Any]:
    """`graft ppo` from Python; arguments and errors as of `grpo`. Defaults: one answer a prompt, 4 updates a rollout."""
    return align(STAGE, base=base, data=data, out=out, rewards=spec_text(rewards), **options)
