"""`graft grpo`: prompts and rewards -> a policy that earns more, by comparing several answers to each prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ...base.model.transformer import Transformer
from ...base.run import Run
from ...base.training.objective import Batch, Figures
from . import setup
from .grpo import (
    OWN_MEAN,
    Kind,
    group_advantages,
    importance_weights,
    mask_truncated,
    n_averaged,
    policy_loss,
)
from .logprobs import response_logprobs
from .rollout_task import Reference, RolloutOptions, spec_text, stage
from .run import align
from .step_memory import AnswerWork


@dataclass(frozen=True)
class GRPOOptions:
    """The surrogate, and what else is in the loss. Raises ValueError for values that can't work."""

    kind: Kind = "grpo"  # grpo, dr_grpo, dapo, gspo or cispo
    clip_low: float = 0.2  # a token's probability ratio counts from 1 - clip_low ...
    clip_high: float = 0.2  # ... to 1 + clip_high; dapo's paper has 0.28
    kl_coef: float = 0.0  # weight of the distance from the reference; with full fine-tuning > 0 holds the base twice
    kl: Literal["k1", "k3", "k3_corrected"] = "k3"  # its estimator
    normalize: str | None = None  # sequence, token or constant:N; none: the kind's own (dr_grpo: N = max_new_tokens)
    normalize_std: bool | None = None  # divide by the group's standard deviation; none: yes, but in dr_grpo
    mask_truncated: bool = False  # answers that were cut off carry no loss
    importance_cap: float = 2.0  # of the weight pi / pi_sampler of a token, in [1, inf); 0: no correction

    @property
    def min_group(self) -> int:
        """Answers that a prompt needs at least."""
        return 2

    def __post_init__(self) -> None:
        if self.kl not in ("k1", "k3", "k3_corrected"):
            raise ValueError(f"unknown kl estimator {self.kl!r}; choose k1, k3 or k3_corrected")
        one = torch.ones(1, 1)  # the loss itself and the weights check the rest
        rest = {"clip_low": self.clip_low, "clip_high": self.clip_high, "kl_coef": self.kl_coef, "ref_logp": one}
        policy_loss(one, one, one[0], one > 0, kind=self.kind, normalize=self.normalize, **rest)
        if self.importance_cap:
            importance_weights(one, one, one > 0, cap=self.importance_cap)

    def averaged(self, max_new_tokens: int) -> str:
        """What the loss is a mean over."""
        return self.normalize or OWN_MEAN.get(self.kind, f"constant:{max_new_tokens}")


class GRPO:
    """Algorithm of the rollouts and objective of the loop."""

    def __init__(self, config: Run, policy: setup.Policy, reference: Reference, stat_names: list[str]) -> None:
        self.options, self.model, self.reference = config.objective, policy.model, reference
        self.rollouts, self.micro_batch, self.stat_names = config.data, config.train.micro_batch, stat_names
        self.normalize = self.options.averaged(config.data.max_new_tokens)

    def complete(self, batch: dict[str, Tensor], rewards: Tensor) -> dict[str, Tensor]:
        """Advantages (B,); where they are needed old_logp and ref_logp (B, T)."""
        options = self.options
        by_std = options.kind != "dr_grpo" if options.normalize_std is None else options.normalize_std
        more = {"advantages": group_advantages(rewards, self.rollouts.group_size, normalize_std=by_std)}
        if options.mask_truncated:
            more["mask"] = mask_truncated(batch["mask"], batch["truncated"])
        if self.rollouts.updates_per_rollout > 1:
            more["old_logp"] = self.logps(self.model, batch)
        if options.kl_coef:
            model, block = self.reference()
            with block:
                more["ref_logp"] = self.logps(model, batch)
        return more

    def logps(self, model: Transformer, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, T), in micro-batches."""
        parts = zip(batch["ids"].split(self.micro_batch), batch["mask"].split(self.micro_batch), strict=True)
        found = [response_logprobs(model, ids, mask, temperature=self.rollouts.temperature) for ids, mask in parts]
        return torch.cat(cast(list[Tensor], found))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Figures]:
        """policy_loss times what it is a mean over, with the rollout's figures."""
        options, mask = self.options, batch["mask"]
        logp = response_logprobs(cast(Transformer, model), batch["ids"], mask, temperature=self.rollouts.temperature)
        assert isinstance(logp, Tensor)
        old_logp = batch.get("old_logp", logp.detach())
        weights = None
        if options.importance_cap:
            weights = importance_weights(old_logp, batch["sampler_logp"], mask, cap=options.importance_cap)
        value, figures = policy_loss(
            logp,
            old_logp,
            batch["advantages"],
            mask,
            kind=options.kind,
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            kl_coef=options.kl_coef,
            ref_logp=batch.get("ref_logp"),
            kl=options.kl,
            normalize=self.normalize,
            weights=weights,
        )
        stats = dict(zip(self.stat_names, batch["stats"], strict=True))
        n = self.n_labels(batch)
        return value * n, {name: figure * n for name, figure in {**figures, **stats}.items()}

    def detach(self, model: Transformer) -> None:
        """Nothing was added."""

    def n_labels(self, batch: Batch) -> int:
        # At least 1: a batch in which every answer is masked makes an update of 0, not an error.
        return max(1, n_averaged(batch["mask"], self.normalize))

    def n_tokens(self, batch: Batch) -> int:
        return batch["ids"].numel()


def _work(config: Run) -> AnswerWork:
    per_token = [("old_logp", config.data.updates_per_rollout > 1), ("ref_logp", config.objective.kl_coef > 0)]
    return AnswerWork(config, GRPO, per_token=[name for name, used in per_token if used], per_row=["advantages"])


STAGE = stage("grpo", setup.parts(GRPOOptions, RolloutOptions), GRPO, _work)


def grpo(
    *, base: Path | str, data: Path | str, rewards: str | Mapping[str, float], out: Path | str, **options: Any
) -> dict[str, Any]:
    """`graft grpo` from Python: trains `base` on answers that it samples to the prompts in `data`, scored by `rewards` (see
    rewards.py for the spec), into `out`; returns the summary's figures.

    options: `align`'s arguments (method, adapter, eval_data, resume, force, device, progress) and keys of the parts, as `graft
    config grpo` lists them (group_size, kind, max_new_tokens, ...). Raises as `align`.
    """
    return align(STAGE, base=base, data=data, out=out, rewards=spec_text(rewards), **options)
