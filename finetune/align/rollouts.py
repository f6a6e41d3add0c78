"""Prompts -> answers sampled by the decoding engine, scored, and kept as training batches for one or several updates.

    prompt (B, group_size answers each)  --Engine-->  ids, mask (B, T)  --rewards-->  (B,)  --algorithm-->  advantages

A rollout depends on the weights, the seed and its index alone, so a resumed run samples the same answers; what is in use
between two updates is part of each checkpoint (`state`).
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...base.generate.engine import evaluating
from ...base.generate.sampling import Sampling
from ...base.training.objective import Batch
from .grpo import groups_without_signal
from .preferences import permutation
from .prompts import Prompt
from .rewards import Sample, Term, score
from .run import StoppedEarly
from .sampler import Answer, Sampler

LOG = "rollouts.jsonl"
SAYS_NO_SIGNAL_AFTER = 5  # rollouts in a row


class Algorithm(Protocol):
    """What GRPO and PPO make of scored answers."""

    def complete(self, batch: dict[str, Tensor], rewards: Tensor) -> dict[str, Tensor]:
        """Tensors (B, ...) that the objective needs beside ids, mask and sampler_logp: advantages, old_logp, ...

        Called with the model in eval mode and no gradients, on the model's device.
        """
        ...


class Rollouts:
    """The loop's batches and its extra state."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        terms: Sequence[Term],
        algorithm: Algorithm,
        *,
        sampling: Sampling,
        batch_size: int,  # answers a rollout and an update
        micro_batch: int,
        group_size: int,
        updates: int,  # of each rollout
        seed: int,
        log: Path,
        stop_without_signal: int = 0,
        n_logged: int = 2,  # answers of each rollout in the log
    ) -> None:
        self.sampler, self.prompts, self.terms, self.algorithm = sampler, prompts, terms, algorithm
        self.sampling, self.batch_size, self.micro_batch, self.group_size = (
            sampling,
            batch_size,
            micro_batch,
            group_size,
        )
        self.updates, self.seed, self.log, self.n_logged = updates, seed, log, n_logged
        self.stop_without_signal = stop_without_signal
        self.index, self.n_without_signal, self._log_bytes = -1, 0, 0
        self.buffer: dict[str, Tensor] = {}
        self.stat_names = ["reward", *(f"reward.{term.name}" for term in terms), "reward_std", "no_signal"]
        self.stat_names += ["answer_tokens", "truncated", "sampler_nll"]
        self.example = ""

    def batch_at(self, step: int) -> list[Batch]:
        """The micro-batches of an update; every `updates` steps new answers are sampled."""
        if step // self.updates != self.index:
            self._roll(step // self.updates, step)
        parts = [self.buffer["ids"].shape[0], self.micro_batch]
        return [self._part(start, start + parts[1]) for start in range(0, parts[0], parts[1])]

    def _part(self, start: int, stop: int) -> Batch:
        """Rows of the buffer without columns that are padding in all of them."""
        rows = {name: t if name == "stats" else t[start:stop] for name, t in self.buffer.items()}
        width = int(rows["lengths"].max())
        return {name: t[:, :width] if t.ndim == 2 else t for name, t in rows.items()}

    def _roll(self, index: int, step: int) -> None:
        """Sample, score, and let the algorithm complete the batch."""
        n = self.batch_size // self.group_size
        at = [divmod(position, len(self.prompts)) for position in range(index * n, (index + 1) * n)]
        chosen = [self.prompts[int(permutation(self.seed, epoch, len(self.prompts))[i])] for epoch, i in at]
        prompts = [prompt for prompt in chosen for _ in range(self.group_size)]
        seed = ((self.seed * 1_000_003 + index) * self.batch_size) % 2**62
        answers = self.sampler.answers(prompts, replace(self.sampling, seed=seed))
        texts = [self.sampler.text(answer) for answer in answers]
        samples = [Sample(p.text, text, p.row, p.where) for p, text in zip(prompts, texts, strict=True)]
        scores = score(self.terms, samples)
        rewards = torch.tensor(scores.totals, dtype=torch.float32)
        batch = collate_rollout(prompts, answers)
        model = self.sampler.model
        device = model.model.embed_tokens.weight.device
        with torch.no_grad(), evaluating(model):
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            batch |= {k: v.cpu() for k, v in self.algorithm.complete(moved, rewards.to(device)).items()}
        groups = rewards.view(-1, self.group_size)
        flat = groups_without_signal(rewards, self.group_size if self.group_size > 1 else self.batch_size)
        lengths = torch.tensor([float(len(answer.ids)) for answer in answers])
        nll = -sum(sum(answer.logp) for answer in answers) / float(lengths.sum())
        parts = [sum(values) / len(values) for values in scores.parts.values()]
        figures = [float(rewards.mean()), *parts, float(groups.std(1, correction=0).mean()), float(flat.float().mean())]
        figures += [float(lengths.mean()), sum(answer.truncated for answer in answers) / len(answers), nll]
        batch["stats"] = torch.tensor(figures)
        self.buffer, self.index = batch, index
        self._write(step, samples, scores.totals)
        self.n_without_signal = self.n_without_signal + 1 if bool(flat.all()) else 0
        self._check_signal()

    def _check_signal(self) -> None:
        n = self.n_without_signal
        said = f"all rewards were equal within their groups in {n} rollouts in a row, so there is nothing to learn from"
        if n == SAYS_NO_SIGNAL_AFTER:
            print(f"warning: {said}; make the prompts easier or harder, or add a reward", file=sys.stderr)
        if self.stop_without_signal and n >= self.stop_without_signal:
            raise StoppedEarly(said)

    def _write(self, step: int, samples: Sequence[Sample], totals: Sequence[float]) -> None:
        """Append examples to rollouts.jsonl, behind what the resumed checkpoint knew of."""
        lines = [
            {"step": step + 1, "where": one.where, "prompt": one.prompt, "completion": one.completion, "reward": total}
            for one, total in list(zip(samples, totals, strict=True))[: self.n_logged]
        ]
        self.example = f"{samples[0].prompt[-60:]!r} -> {samples[0].completion[:100]!r}: reward {totals[0]:g}"
        with self.log.open("r+b" if self.log.exists() else "w+b") as file:
            file.truncate(self._log_bytes)
            file.seek(0, 2)
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            self._log_bytes = file.tell()

    def state(self) -> dict[str, Any]:
        """The rollout in use and the log's length."""
        rest = {"index": self.index, "n_without_signal": self.n_without_signal, "log_bytes": self._log_bytes}
        return rest | {f"rollout.{name}": tensor for name, tensor in self.buffer.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.index, self.n_without_signal = state["index"], state["n_without_signal"]
        self._log_bytes = state["log_bytes"]
        named = {name.removeprefix("rollout."): t for name, t in state.items() if name.startswith("rollout.")}
        self.buffer = named


def collate_rollout(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, Tensor]:
    """ids (B, T) padded on the right, mask (B, T) of the answers' tokens, sampler_logp (B, T), lengths (B,), truncated (B,)."""
    lengths = [len(p.ids) + len(a.ids) for p, a in zip(prompts, answers, strict=True)]
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    mask, logp = torch.zeros(ids.shape, dtype=torch.bool), torch.zeros(ids.shape)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : lengths[i]] = torch.tensor(prompt.ids + answer.ids)
        mask[i, len(prompt.ids) : lengths[i]] = True
        logp[i, len(prompt.ids) : lengths[i]] = torch.tensor(answer.logp)
    truncated = torch.tensor([answer.truncated for answer in answers])
    return {"ids": ids, "mask": mask, "sampler_logp": logp, "lengths": torch.tensor(lengths), "truncated": truncated}
