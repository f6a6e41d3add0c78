"""What GRPO and PPO have in common: prompts, rewards and rollouts as the loop's batches, evaluation on held-out prompts."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...base.generate.sampling import Sampling
from ...base.model.transformer import Transformer
from ...base.run import Run
from ...base.runlog import RunFolder, read_metrics
from ...base.tokenizer.tokenizer import Tokenizer
from ...base.training.history import way_back_from
from ...base.training.objective import Batch, Objective
from ..data.chat import ChatTemplate
from ..loading import load_model
from ..memory.step import Work
from . import setup
from .prompts import Prompt, read_prompts
from .rewards import Sample, Term, parse_rewards, score
from .rollouts import LOG, Algorithm, Rollouts
from .run import Source, Stage, Training
from .sampler import Sampler

LEARNING_RATES = {"full": 1e-5, "lora": 1e-4, "qlora": 1e-4}  # peak
DEFAULTS: dict[str, Any] = {
    "batch_size": 64, "weight_decay": 0.0, "steps": 100, "checkpoint_every": 20, "eval_every": 20, "schedule": "constant",
}  # fmt: skip
Reference = Callable[[], tuple[Transformer, AbstractContextManager[object]]]  # the model, and the block to call it in


@dataclass(frozen=True)
class RolloutOptions:
    """How prompts become scored answers. Raises ValueError for values that can't work."""

    rewards: str = ""  # the spec, such as "exact + 0.2 * format"; JSON text for a mapping of rewards to weights
    group_size: int = 8  # answers to each prompt (ppo: 1); batch_size / group_size prompts a rollout
    max_new_tokens: int = 64  # of an answer
    temperature: float = 1.0  # of the samples, and of the probabilities in the loss
    eval_temperature: float = 0.0  # of the held-out answers; 0: greedy. At 1 a 0-or-1 reward's mean is pass@1
    updates_per_rollout: int = 1  # steps on each rollout's answers
    reward_timeout_s: float | None = None  # for each call of a module:function, which then runs in a child process
    stop_without_signal: int = 0  # rollouts in a row with equal rewards in all groups that end the run; 0: never

    def __post_init__(self) -> None:
        for name in ("group_size", "max_new_tokens", "updates_per_rollout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if self.stop_without_signal < 0:
            raise ValueError(f"stop_without_signal={self.stop_without_signal} must be >= 0; 0 never stops")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature={self.temperature} must be > 0 and finite; greedy answers would all be the same"
            )

    def terms(self) -> list[Term]:
        """The rewards by name. Raises ValueError for a spec that can't be used."""
        spec: Any = self.rewards
        if self.rewards.startswith("{"):
            try:
                spec = json.loads(self.rewards)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"rewards={self.rewards!r:.80} begins as JSON and is none ({error})") from None
        return parse_rewards(spec, timeout_s=self.reward_timeout_s)


class Method(Algorithm, Objective, Protocol):
    """GRPO or PPO: completes rollouts, and is the loop's objective."""

    def detach(self, model: Transformer) -> None:
        """Take off the model what the method added."""
        ...


MakeMethod = Callable[[Run, setup.Policy, Reference, list[str]], Method]


def stage(
    name: str,
    parts: Mapping[str, type],
    make: MakeMethod,
    work: Callable[[Run], Work],
    defaults: Mapping[str, Any] | None = None,
) -> Stage:
    """A method on rewards as a stage; `defaults` of its own beside those above."""

    def own(method: str, requested: Mapping[str, Any], n_rows: int) -> dict[str, Any]:
        return DEFAULTS | {"learning_rate": LEARNING_RATES.get(method, 0.0)} | dict(defaults or {})

    return Stage(name, parts, own, lambda draft, source: RolloutTask.read(make, draft, source), work)


def spec_text(rewards: str | Mapping[str, float]) -> str:
    """A reward spec as a config keeps it."""
    return rewards if isinstance(rewards, str) else json.dumps(dict(rewards))


class RolloutTask:
    """The prompts of a run, its rewards and its method."""

    def __init__(
        self,
        make: MakeMethod,
        prompts: Sequence[Prompt],
        held_out: Sequence[Prompt],
        terms: Sequence[Term],
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_new_tokens: int,
    ) -> None:
        self.make, self.prompts, self.held_out, self.terms = make, prompts, held_out, terms
        self.tokenizer, self.template = tokenizer, template
        self.n_rows, self.has_evaluation = len(prompts), bool(held_out)
        self.longest = max(len(prompt.ids) for prompt in prompts) + max_new_tokens
        self.is_chat = any(prompt.is_chat for prompt in prompts)
        self.rollouts: Rollouts | None = None
        self.method: Method | None = None
        self.folder: Path | None = None  # the run's

    @classmethod
    def read(cls, make: MakeMethod, draft: Run, source: Source) -> "RolloutTask":
        """Read the prompts and find the rewards. Raises ValueError for groups that can't be compared, naming the limit."""
        options: RolloutOptions = draft.data
        n, size = draft.train.batch_size, options.group_size
        if n % size:
            raise ValueError(
                f"batch_size={n} answers are not whole groups of group_size={size}; use batch_size {max(1, n // size) * size}"
            )
        if size < draft.objective.min_group:
            raise ValueError(
                f"group_size={size} must be >= {draft.objective.min_group}: an answer is compared with others to the same prompt"
            )
        terms = options.terms()
        for term in terms:
            if check := getattr(term.function, "check_tokenizer", None):  # a reward model
                check(source.base)

        def prompts_of(path: Path | None) -> list[Prompt]:
            limits = (source.model.max_seq_len, options.max_new_tokens)
            return read_prompts(path, source.tokenizer, source.template, *limits) if path else []

        prompts, held_out = prompts_of(source.data), prompts_of(source.eval_data)
        return cls(make, prompts, held_out, terms, source.tokenizer, source.template, options.max_new_tokens)

    def begin(self, policy: setup.Policy, config: Run, run: RunFolder, device: str, *, progress: bool) -> Training:
        """The rollouts are the loop's batches and its extra state."""
        loop, options = config.train, config.data
        stat_names: list[str] = []
        method = self.make(config, policy, _reference(policy, config, device), stat_names)
        sampler = Sampler(policy.model, self.tokenizer, self.template, max_batch=loop.batch_size)
        rollouts = Rollouts(
            sampler,
            self.prompts,
            self.terms,
            method,
            sampling=Sampling(options.temperature, max_new_tokens=options.max_new_tokens),
            batch_size=loop.batch_size,
            micro_batch=min(loop.micro_batch, loop.batch_size),
            group_size=options.group_size,
            updates=options.updates_per_rollout,
            seed=loop.seed,
            log=run.folder / LOG,
            stop_without_signal=options.stop_without_signal,
        )
        stat_names += rollouts.stat_names
        self.rollouts, self.method, self.folder = rollouts, method, run.folder

        def batch_at(step: int) -> Sequence[Batch]:
            try:
                return rollouts.batch_at(step)
            except ValueError as error:
                way_back = way_back_from(run.checkpoints, "fix it and run the same command with --resume")
                raise ValueError(f"step {step + 1}: {error}; {way_back}") from error

        def say(line: Mapping[str, Any]) -> None:
            if progress and (line["step"] % 10 == 1 or "val_reward" in line):
                said = f"step {line['step']}: reward {line['reward']:.3f}, {line['no_signal']:.0%} of groups without signal"
                held_out = f", held out {line['val_reward']:.3f}" if "val_reward" in line else ""
                print(f"{said}{held_out}; {rollouts.example}", file=sys.stderr)

        greedy = Sampling(options.eval_temperature, max_new_tokens=options.max_new_tokens)
        return Training(
            batch_at,
            method,
            evaluate=(lambda: evaluate_rewards(sampler, self.held_out, self.terms, greedy)) if self.held_out else None,
            extra=rollouts,
            on_step=say,
        )

    def finish(self, model: Transformer, folder: Path, config: Run) -> dict[str, Any]:
        """PPO's value head is of no use to anybody else."""
        assert self.method is not None
        self.method.detach(model)
        return {}

    def figures(self, config: Run) -> dict[str, Any]:
        """First and last reward, and how much was sampled."""
        assert self.rollouts is not None
        assert self.folder is not None
        lines = read_metrics(self.folder / "metrics.jsonl")
        n_cut = sum(
            getattr(term.function, "n_cut", 0) for term in self.terms
        )  # answers of which a reward model read a part
        return {
            "rewards": config.data.rewards,
            "first_reward": lines[0]["reward"] if lines else None,
            "last_reward": lines[-1]["reward"] if lines else None,
            "n_prompts": len(self.prompts),
            "n_rollouts": self.rollouts.index + 1,
            **({"n_cut_for_the_reward": n_cut} if n_cut else {}),
        }


def _reference(policy: setup.Policy, config: Run, device: str) -> Reference:
    """The frozen model: the same one with another adapter, or with full fine-tuning the base a second time."""
    if policy.reference is not None:
        block = policy.reference
        return lambda: (policy.model, block())
    if not config.objective.kl_coef:
        return lambda: (policy.model, nullcontext())  # never asked
    frozen = load_model(config.inputs["base"].path, dtype=config.train.dtype, device=device)
    frozen.requires_grad_(False)
    return lambda: (frozen, nullcontext())


def evaluate_rewards(
    sampler: Sampler, prompts: Sequence[Prompt], terms: Sequence[Term], sampling: Sampling
) -> dict[str, float]:
    """The answers' mean reward and each reward's own mean; val_loss is minus the reward, so that keep=best and patience work
    as for a loss. The same seeds each time."""
    answers = sampler.answers(prompts, sampling)
    samples = [Sample(p.text, sampler.text(a), p.row, p.where) for p, a in zip(prompts, answers, strict=True)]
    scores = score(terms, samples)
    reward = sum(scores.totals) / len(samples)
    parts = {f"val_reward.{name}": sum(values) / len(values) for name, values in scores.parts.items()}
    return {"val_loss": -reward, "val_reward": reward, **parts}
