"""What DPO and the reward model have in common: preference rows as the loop's batches, a held-out evaluation over all pairs."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ...base.model.transformer import Transformer
from ...base.precision import autocast
from ...base.run import Run
from ...base.runlog import RunFolder
from ...base.training.objective import Objective
from ..data.packing import steps_for_epochs
from ..data.preferences import read_preferences
from ..sft import row_limit
from .preference_rows import PreferenceData, encode_labelled, encode_pairs
from .preferences import PreferenceBatches
from .reference import reference_logps
from .run import Source, Training
from .setup import Policy


class PreferenceMethod(Protocol):
    """What makes it DPO or a reward model."""

    def attach(self, model: Transformer, config: Run) -> None:
        """Add the modules that train beside the model's own."""
        ...

    def detach(self, model: Transformer, folder: Path, config: Run) -> dict[str, Any]:
        """Take them off and write them; more metadata."""
        ...

    def objective(self, data: PreferenceData, config: Run) -> Objective:
        """The loss, and its figures a pair."""
        ...

    def needs_reference(self, config: Run) -> bool:
        """Whether batches carry ref_logp."""
        ...

    def see(self, line: Mapping[str, Any]) -> None:
        """A line of metrics."""
        ...

    def figures(self, config: Run) -> dict[str, Any]:
        """Of the summary."""
        ...


def defaults(
    rates: Mapping[str, float], method: str, requested: Mapping[str, Any], n_rows: int, *, epochs: float = 1.0
) -> dict[str, Any]:
    """A stage's own defaults; `rates` are the peak learning rates by method."""
    own: dict[str, Any] = {"batch_size": 16, "weight_decay": 0.0, "learning_rate": rates.get(method, 0.0)}
    batch_size, epochs = requested.get("batch_size", own["batch_size"]), requested.get("epochs", epochs)
    return own | {"steps": steps_for_epochs(n_rows, batch_size, epochs)}


@dataclass(frozen=True, eq=False)
class PreferenceTask:
    """The rows of a run, and its method."""

    rows: PreferenceData
    held_out: PreferenceData | None
    method: PreferenceMethod

    @classmethod
    def read(cls, method: PreferenceMethod, draft: Run, source: Source, *, labelled: bool = False) -> "PreferenceTask":
        """Rows of the files, encoded (labelled: as KTO takes them); prints what was left out."""
        limit = min(row_limit(draft.objective.max_seq_len, source.model), source.model.max_seq_len)
        encode = partial(encode_labelled if labelled else encode_pairs)

        def encoded(path: Path, said: str) -> PreferenceData:
            rows = encode(read_preferences([path]), source.tokenizer, source.template, limit)
            for line in rows.notes(limit):
                print(f"note: {said}{line}", file=sys.stderr)
            return rows

        rows = encoded(source.data, "")
        return cls(rows, encoded(source.eval_data, "eval data: ") if source.eval_data else None, method)

    @property
    def n_rows(self) -> int:
        """Pairs."""
        return len(self.rows.pairs)

    @property
    def longest(self) -> int:
        """Tokens."""
        return self.rows.longest

    @property
    def is_chat(self) -> bool:
        """Whether any row went through the chat template."""
        return self.rows.is_chat

    @property
    def has_evaluation(self) -> bool:
        """Whether there are held-out rows."""
        return self.held_out is not None

    def begin(self, policy: Policy, config: Run, run: RunFolder, device: str, *, progress: bool) -> Training:
        """Batches of pairs; the reference is asked once the run's folder is there."""
        self.method.attach(policy.model, config)
        batches = make_batches(self.rows, config)
        objective = self.method.objective(self.rows, config)
        val = make_batches(self.held_out, config) if self.held_out is not None else None
        val_objective = self.method.objective(self.held_out, config) if self.held_out is not None else None

        def ask_reference() -> None:
            read = {i for step in range(config.train.steps) for i in batches.pairs_at(step)}
            batches.ref_logp = reference_logps(policy, batches, sorted(read), config, run.checkpoints, device)
            if val is not None:
                every = range(len(val.pairs))
                val.ref_logp = reference_logps(policy, val, every, config, run.checkpoints, device)

        def evaluate() -> dict[str, float]:
            assert val is not None
            assert val_objective is not None
            return evaluate_preferences(policy.model, val_objective, val, dtype=config.train.dtype, device=device)

        return Training(
            batches.batch_at,
            objective,
            evaluate=evaluate if val is not None else None,
            on_step=self.method.see,
            after_start=ask_reference if self.method.needs_reference(config) else None,
        )

    def finish(self, model: Transformer, folder: Path, config: Run) -> dict[str, Any]:
        """The method's."""
        return self.method.detach(model, folder, config)

    def figures(self, config: Run) -> dict[str, Any]:
        """The method's, and the rows'."""
        return self.method.figures(config) | self.rows.figures()


def make_batches(rows: PreferenceData, config: Run) -> PreferenceBatches:
    """Micro-batches that hold micro_batch pairs of the longest length."""
    return PreferenceBatches(
        rows.pairs,
        batch_size=config.train.batch_size,
        max_tokens=2 * min(config.train.micro_batch, config.train.batch_size) * rows.longest,
        packed=config.objective.packing,
        seed=config.train.seed,
    )


@torch.no_grad()
def evaluate_preferences(
    model: Transformer, objective: Objective, batches: PreferenceBatches, *, dtype: str, device: str
) -> dict[str, float]:
    """The objective's loss and figures over all pairs, with the prefix val_."""
    totals: dict[str, float] = {}
    for batch in batches.micro_batches(range(len(batches.pairs))):
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        with autocast(dtype, device):
            found = objective.loss(model, moved)
        value, figures = found if isinstance(found, tuple) else (found, {})
        for name, figure in {"loss": value, **figures}.items():
            totals[name] = totals.get(name, 0.0) + float(figure)
    return {f"val_{name}": total / len(batches.pairs) for name, total in totals.items()}
