"""`graft dpo`: a base (or an SFT adapter) + preference rows -> a policy that prefers the chosen answers.

The reference is the same base with the adapter off, or with the adapter that training started from; with full fine-tuning
the base before its first step. See reference.py.
"""

import math
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ...base.model.transformer import Transformer
from ...base.run import Run
from ...base.training.objective import Batch, Figures, Objective
from . import preference_task, setup
from .dpo import dpo_loss
from .kto import kto_kl, kto_loss
from .orpo import orpo_loss
from .preference_rows import PreferenceData
from .preference_task import PreferenceTask
from .reference import answer_logps
from .run import Source, Stage, align
from .simpo import simpo_loss
from .step_memory import PairWork, made_up_labels

Loss = Literal["sigmoid", "ipo", "robust", "hinge", "kto", "orpo", "simpo"]
WITHOUT_REFERENCE = ("orpo", "simpo")
DEFAULT_BETA = {"simpo": 2.0}  # of the others: 0.1
LEARNING_RATES = {"full": 5e-6, "lora": 1e-4, "qlora": 1e-4}  # peak; preferences want about a fifth of fine-tuning's
FALL = 0.5  # nats that both answers' log-probabilities must have lost, in the mean of FALL_STEPS steps, for a warning
FALL_STEPS = 10


@dataclass(frozen=True)
class DPOOptions:
    """Which loss, and how rows become batches. Raises ValueError for values that can't work."""

    loss: Loss = "sigmoid"  # sigmoid (DPO), ipo, robust, hinge, kto, orpo or simpo
    beta: float | None = None  # how near the policy stays to the reference; none: 0.1, simpo 2.0
    label_smoothing: float = 0.0  # sigmoid and robust: share of pairs thought to be swapped, in [0, 0.5)
    gamma: float = 1.0  # simpo: the margin that chosen must lead by
    desirable_weight: float = 1.0  # kto: weight of the good answers
    undesirable_weight: float = 1.0  # kto: weight of the bad ones
    epochs: float = 1.0  # passes over the pairs, when `steps` is not given
    max_seq_len: int | None = None  # tokens of prompt and answer, longer ones are cut; none: the model's
    packing: bool = True  # answers end to end in one row, each seeing only itself, instead of one a row, padded

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise ValueError(f"unknown preference loss {self.loss!r}; choose {', '.join(get_args(Loss))}")
        if self.beta is not None and not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta={self.beta} must be > 0 and finite; start from {self.used_beta_default}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} must lie in [0, 0.5), the share of swapped labels"
            )
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} is for the losses sigmoid and robust, got {self.loss}"
            )

    @property
    def used_beta_default(self) -> float:
        return DEFAULT_BETA.get(self.loss, 0.1)

    @property
    def used_beta(self) -> float:
        return self.used_beta_default if self.beta is None else self.beta


# --- the objective --------------------------------------------------------------------------------------------------


class PreferenceObjective:
    """A preference loss as the loop's objective: summed over a micro-batch's pairs (kto: over its answers).

    Figures, means over pairs: margin, in nats, between what the policy gained on chosen and on rejected; accuracy, the share
    of pairs with margin > 0; chosen_logp and rejected_logp of the policy, nats an answer; chosen_gain and rejected_gain, the
    same minus the reference's; kl, (log pi_ref - log pi) a token of both answers, which estimates KL(pi_ref, pi) as far as
    the answers are like the reference's own. Without a reference (orpo, simpo) it counts as 0 and kl is left out; margin and
    accuracy are then of log-probabilities a token.

    kto's z_0 is estimated on each micro-batch, so there, unlike in the other losses, micro_batch changes the result.
    """

    def __init__(self, options: DPOOptions, desirable: Tensor | None = None) -> None:
        self.options, self.desirable = options, desirable  # (n_rows,) bool, kto's labels

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Figures]:
        sums, lengths = answer_logps(cast(Transformer, model), batch)  # (P, 2), (P, 2)
        chosen, rejected = sums.unbind(1)
        n = sums.shape[0]
        if self.options.loss in WITHOUT_REFERENCE:
            gain = sums / lengths
            value = self._without_reference(*gain.unbind(1))
        else:
            ref = batch["ref_logp"]
            gain = sums - ref
            if self.options.loss == "kto":
                return self._kto(sums, ref, batch["index"])
            scale = lengths if self.options.loss == "ipo" else torch.ones_like(lengths)
            value = dpo_loss(
                *(sums / scale).unbind(1),
                *(ref / scale).unbind(1),
                beta=self.options.used_beta,
                kind=self.options.loss,  # pyright: ignore[reportArgumentType]
                label_smoothing=self.options.label_smoothing,
            )
        margin = (gain[:, 0] - gain[:, 1]).detach()
        figures: dict[str, Tensor] = {
            "margin": margin.sum(),
            "accuracy": (margin > 0).float().sum(),
            "chosen_logp": chosen.detach().sum(),
            "rejected_logp": rejected.detach().sum(),
        }
        if self.options.loss not in WITHOUT_REFERENCE:
            figures |= {
                "chosen_gain": gain[:, 0].detach().sum(),
                "rejected_gain": gain[:, 1].detach().sum(),
                "kl": n * -gain.detach().sum() / lengths.sum(),
            }
        return value * n, figures

    def _without_reference(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        if self.options.loss == "orpo":
            return orpo_loss(chosen, rejected, beta=self.options.used_beta)
        return simpo_loss(chosen, rejected, beta=self.options.used_beta, gamma=self.options.gamma)

    def _kto(self, sums: Tensor, ref: Tensor, index: Tensor) -> tuple[Tensor, Figures]:
        """Column 0 is the labelled answer, column 1 another row's answer to the same prompt."""
        assert self.desirable is not None
        desirable = self.desirable.to(index.device)[index]
        kl = kto_kl(sums[:, 1], ref[:, 1])
        value = kto_loss(
            sums[:, 0],
            ref[:, 0],
            desirable,
            kl,
            beta=self.options.used_beta,
            desirable_weight=self.options.desirable_weight,
            undesirable_weight=self.options.undesirable_weight,
        )
        gain = (sums - ref)[:, 0].detach()
        figures = {
            "accuracy": ((gain > kl) == desirable).float().sum(),
            "desirable_gain": gain.where(desirable, 0.0).sum(),
            "undesirable_gain": gain.where(~desirable, 0.0).sum(),
            "kl": kl * len(gain),
        }
        return value * len(gain), figures

    def n_labels(self, batch: Batch) -> int:
        return batch["index"].shape[0]

    def n_tokens(self, batch: Batch) -> int:
        return batch["ids"].numel()


class FallWatch:
    """Warns, once, when both answers have become less probable than under the reference: the policy then learns to avoid
    the rejected answer by moving to other text, not to the chosen one."""

    def __init__(self) -> None:
        self.chosen: deque[float] = deque(maxlen=FALL_STEPS)
        self.rejected: deque[float] = deque(maxlen=FALL_STEPS)
        self.warned_at: int | None = None

    def see(self, line: Mapping[str, Any]) -> None:
        """Take a line of metrics."""
        if "chosen_gain" not in line or self.warned_at is not None:
            return
        self.chosen.append(line["chosen_gain"])
        self.rejected.append(line["rejected_gain"])
        means = [sum(values) / len(values) for values in (self.chosen, self.rejected)]
        if len(self.chosen) == FALL_STEPS and max(means) < -FALL:
            self.warned_at = line["step"]
            print(
                f"warning: step {line['step']}: both answers fell below the reference (chosen by {-means[0]:.2f} nats, "
                f"rejected by {-means[1]:.2f}); lower the learning rate, raise beta, or fine-tune on the chosen answers first",
                file=sys.stderr,
            )


# --- the run -------------------------------------------------------------------------------------------------------


class DPO:
    """A preference loss as the method of a PreferenceTask."""

    def __init__(self) -> None:
        self.watch = FallWatch()
        self.see = self.watch.see

    def attach(self, model: Transformer, config: Run) -> None:
        """Nothing: the policy is the model."""

    def detach(self, model: Transformer, folder: Path, config: Run) -> dict[str, Any]:
        """Nothing."""
        return {}

    def objective(self, data: PreferenceData, config: Run) -> Objective:
        """The config's loss, with the rows' labels for kto."""
        return PreferenceObjective(config.objective, data.desirable)

    def needs_reference(self, config: Run) -> bool:
        """Not orpo and simpo."""
        return config.objective.loss not in WITHOUT_REFERENCE

    def figures(self, config: Run) -> dict[str, Any]:
        """The loss's name, and when both answers were seen to fall."""
        return {"loss": config.objective.loss, "both_fell_at_step": self.watch.warned_at}


def _read(draft: Run, source: Source) -> PreferenceTask:
    return PreferenceTask.read(DPO(), draft, source, labelled=draft.objective.loss == "kto")


def _work(config: Run) -> PairWork:
    objective = PreferenceObjective(config.objective, made_up_labels())
    return PairWork(
        config, objective, attach=lambda model: None, reference=config.objective.loss not in WITHOUT_REFERENCE
    )


STAGE = Stage("dpo", setup.parts(DPOOptions), partial(preference_task.defaults, LEARNING_RATES), _read, _work)


def dpo(*, base: Path | str, data: Path | str, out: Path | str, **options: Any) -> dict[str, Any]:
    """`graft dpo` from Python: trains `base` on the preference rows in `data` into `out`; returns the summary's figures.

    options: `align`'s arguments (method, adapter, eval_data, resume, force, device, progress) and keys of the parts, as `graft
    config dpo` lists them (loss, beta, rank, learning_rate, epochs, ...). Raises as `align`.
    """
    return align(STAGE, base=base, data=data, out=out, **options)
