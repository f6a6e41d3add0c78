"""A step of each method on made-up answers, for the memory prediction: the run's own objective on a batch of its shapes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...base.model.config import ModelConfig
from ...base.model.transformer import Transformer
from ...base.run import Run
from ...base.training.objective import Objective
from ..data.chat import Encoded
from . import setup
from .preferences import Pair, PreferenceBatches

N_STATS = 8  # figures of a rollout; their number doesn't matter
MOST_ROWS = 1 << 16  # that labels are made up for


def made_up_labels() -> Tensor:
    """KTO's, (MOST_ROWS,) bool."""
    return torch.ones(1, dtype=torch.bool).expand(MOST_ROWS)


class PairWork:
    """dpo and reward: both answers of each pair in one pass."""

    def __init__(
        self, config: Run, objective: Objective, *, attach: Callable[[Transformer], None], reference: bool
    ) -> None:
        self.config, self.attach, self.reference = config, attach, reference
        self.loss, self.n_labels = objective.loss, objective.n_labels

    def micro_batch(self, config: ModelConfig, rows: int, seq_len: int) -> dict[str, Tensor]:
        """Pairs whose answers have seq_len tokens each, their prompt one of them."""
        one = Encoded(np.zeros(seq_len, np.int32), np.arange(seq_len) > 0)
        batches = PreferenceBatches(
            [Pair(one, one)] * rows,
            batch_size=rows,
            max_tokens=2 * rows * seq_len,
            packed=self.config.objective.packing,
            ref_logp=torch.zeros(rows, 2) if self.reference else None,
        )
        return dict(batches.micro_batch(range(rows)))

    def rollout_rows(self, rows: int) -> int:
        """Nothing is sampled."""
        return 0


class AnswerWork:
    """grpo and ppo: sampled answers, one a row."""

    def __init__(
        self, config: Run, make: Callable[..., Objective], *, per_token: Sequence[str], per_row: Sequence[str]
    ) -> None:
        self.config, self.make, self.per_token, self.per_row = config, make, per_token, per_row
        self.method: Objective | None = None

    def attach(self, model: Transformer) -> None:
        """PPO's value head; with full fine-tuning and a KL term the reference, which is the base a second time."""
        config = self.config
        names = [str(i) for i in range(N_STATS)]
        self.method = self.make(config, setup.Policy(model, None), lambda: (model, nullcontext()), names)
        if config.method == "full" and config.objective.kl_coef:
            model.frozen = Transformer(model.config).requires_grad_(False)  # pyright: ignore[reportArgumentType]

    def micro_batch(self, config: ModelConfig, rows: int, seq_len: int) -> dict[str, Tensor]:
        """As Rollouts cuts them out of its buffer."""
        mask = torch.ones(rows, seq_len, dtype=torch.bool)
        mask[:, 0] = False
        batch = {
            "ids": torch.zeros(rows, seq_len, dtype=torch.int64),
            "mask": mask,
            "sampler_logp": torch.zeros(rows, seq_len),
            "lengths": torch.full((rows,), seq_len),
            "truncated": torch.zeros(rows, dtype=torch.bool),
            "stats": torch.zeros(N_STATS),
        }
        batch |= {name: torch.zeros(rows, seq_len) for name in self.per_token}
        return batch | {name: torch.zeros(rows) for name in self.per_row}

    def rollout_rows(self, rows: int) -> int:
        """All answers of an update."""
        return rows

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """The method's."""
        assert self.method is not None
        return self.method.loss(model, batch)

    def n_labels(self, batch: Mapping[str, Tensor]) -> int:
        """The method's."""
        assert self.method is not None
        return self.method.n_labels(batch)
