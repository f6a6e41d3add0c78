"""What GRPO and PPO share: the run itself, from prompts and a reward spec to a folder; evaluation on held-out prompts."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...base.device import explain_device, peak_bytes, reset_peak, resolve_device
from ...base.generate.sampling import Sampling
from ...base.model.huggingface import fingerprint, load_config
from ...base.model.transformer import Transformer
from ...base.progress import step_progress
from ...base.run import Run, check_same_inputs, resumed_settings
from ...base.runlog import RunFolder, read_metrics
from ...base.settings import check_settings
from ...base.tokenizer.tokenizer import Tokenizer
from ...base.train import Objective, check_evaluation, resumed_result, train
from ..adapters.files import read_adapter
from ..data.chat import ChatTemplate
from ..loading import load_model
from ..memory.report import print_prediction
from ..sft import save_trained, stored_in_4_bits
from . import setup
from .rewards import Sample, Term, parse_rewards, score
from .rollouts import LOG, Algorithm, NoSignal, Prompt, Rollouts, Sampler, read_prompts

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
        spec = json.loads(self.rewards) if self.rewards.startswith("{") else self.rewards
        return parse_rewards(spec, timeout_s=self.reward_timeout_s)


class Method(Algorithm, Objective, Protocol):
    """GRPO or PPO: completes rollouts, and is the loop's objective."""


MakeMethod = Callable[[Run, setup.Policy, Reference, list[str]], Method]


def run_rewards(
    stage: str,
    kinds: Mapping[str, type],
    make: MakeMethod,
    *,
    base: Path,
    data: Path,
    rewards: str | Mapping[str, float],
    out: Path,
    method: str,
    adapter: Path | None,
    eval_data: Path | None,
    resume: bool,
    force: bool,
    device: str,
    progress: bool,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on rewards and leave a base folder (full) or an adapter (lora, qlora) in `out`; returns the summary."""
    requested_device, device = device, resolve_device(device)
    if out.resolve() == base.resolve():
        raise ValueError(f"--out {out} is the base itself; choose another folder")
    with RunFolder(out, stage=f"{stage} {method}", resume=resume, force=force) as run:
        spec = rewards if isinstance(rewards, str) else json.dumps(dict(rewards))
        requested = check_settings({**settings, "rewards": spec}, *kinds.values())
        if adapter is not None:
            requested = setup.adapter_settings(read_adapter(adapter), requested, method)
        model_config = load_config(base)
        inputs = setup.all_inputs(base, data, eval_data, adapter)
        if run.previous:
            check_same_inputs(run.previous["config"], inputs)
            requested = resumed_settings(requested, run.previous["config"])
        own = DEFAULTS | {"learning_rate": LEARNING_RATES.get(method, 0.0)} | dict(defaults or {})
        config = setup.resolve(requested, kinds, method=method, defaults=own, inputs=inputs)
        options: RolloutOptions = config.data
        loop = config.train
        if loop.batch_size % options.group_size:
            raise ValueError(
                f"batch_size={loop.batch_size} answers are not whole groups of group_size={options.group_size}; use "
                f"batch_size {max(1, loop.batch_size // options.group_size) * options.group_size}"
            )
        if options.group_size < config.objective.min_group:
            raise ValueError(
                f"group_size={options.group_size} must be >= {config.objective.min_group}: an answer is compared with others "
                "to the same prompt"
            )
        terms = options.terms()
        for term in terms:
            if check := getattr(term.function, "check_tokenizer", None):  # a reward model
                check(base)
        stored = stored_in_4_bits(config)
        check_evaluation(loop, has_evaluation=eval_data is not None)
        tokenizer = Tokenizer.load(base)
        template = ChatTemplate.of(tokenizer)
        limits = (model_config.max_seq_len, options.max_new_tokens)
        prompts = read_prompts(data, tokenizer, template, *limits)
        held_out = read_prompts(eval_data, tokenizer, template, *limits) if eval_data else []
        if progress:
            print(explain_device(requested_device, device), file=sys.stderr)
        predicted = print_prediction(
            model_config,
            loop,
            device,
            method="qlora" if stored else method,
            seq_len=max(len(prompt.ids) for prompt in prompts) + options.max_new_tokens,
            lora=config.lora,
            double_quant=stored["double_quant"] if stored else config.quant.double_quant,
        )
        reset_peak(device)
        policy = setup.make_policy(config, device, adapter)
        metadata = {
            "prompt_format": "chat" if any(prompt.is_chat for prompt in prompts) else "text",
            "base_fingerprint": fingerprint(policy.model),
            "method": f"{stage} {method}",
        }
        sampler = Sampler(policy.model, tokenizer, template, max_batch=loop.batch_size)
        rollouts, stopped = _train(policy, config, make, sampler, prompts, held_out, terms, run, device, progress)
        lines = read_metrics(run.folder / "metrics.jsonl")
        result = resumed_result(len(lines), lines)
        with run.results() as folder:
            if hasattr(policy.model, "value_head"):
                del policy.model.value_head  # PPO's, of no use to anybody else
            save_trained(policy.model, config, folder, tokenizer, template, metadata)
        summary = {
            "method": method,
            "rewards": options.rewards,
            **{name: value for name, value in result.summary().items() if name not in ("seconds", "tokens_per_s")},
            "first_reward": lines[0]["reward"] if lines else None,
            "last_reward": lines[-1]["reward"] if lines else None,
            "stopped_early": stopped,
            "n_prompts": len(prompts),
            "n_rollouts": rollouts.index + 1,
            "n_trained_params": sum(p.numel() for p in policy.model.parameters() if p.requires_grad),
            "predicted_peak_bytes": predicted,
            **peak_bytes(device),
            "device": device,
        }
        run.finish(summary)
        return summary


def _train(
    policy: setup.Policy,
    config: Run,
    make: MakeMethod,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    terms: Sequence[Term],
    run: RunFolder,
    device: str,
    progress: bool,
) -> tuple[Rollouts, str | None]:
    """The rollouts, and why the run ended before its steps, if it did."""
    loop, options = config.train, config.data
    stat_names: list[str] = []
    algorithm = make(config, policy, _reference(policy, config, device), stat_names)
    rollouts = Rollouts(
        sampler,
        prompts,
        terms,
        algorithm,
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
    optimizer = setup.policy_optimizer(policy.model, config)
    val = Sampling(options.eval_temperature, max_new_tokens=options.max_new_tokens)
    # All validation is done: only now may --force touch what a former run left.
    run.start(config.saved(), seed=loop.seed)
    with step_progress(config.method, loop.steps, shown=progress) as observe:

        def on_step(line: dict[str, Any]) -> None:
            observe(line)
            if progress and (line["step"] % 10 == 1 or "val_reward" in line):
                said = f"step {line['step']}: reward {line['reward']:.3f}, {line['no_signal']:.0%} of groups without signal"
                val = f", held out {line['val_reward']:.3f}" if "val_reward" in line else ""
                print(f"{said}{val}; {rollouts.example}", file=sys.stderr)

        def batch_at(step: int) -> Sequence[Mapping[str, Any]]:
            try:
                return rollouts.batch_at(step)
            except ValueError as error:
                raise ValueError(
                    f"step {step + 1}: {error}; checkpoints are in {run.checkpoints}: fix it and go on with --resume"
                ) from error

        try:
            train(
                policy.model,
                optimizer,
                batch_at,
                loop,
                run,
                objective=algorithm,
                evaluate=(lambda: evaluate_rewards(sampler, held_out, terms, val)) if held_out else None,
                extra=rollouts,
                on_step=on_step,
                device=device,
            )
        except NoSignal as reason:
            policy.model.eval()
            print(f"stopped early: {reason}", file=sys.stderr)
            return rollouts, str(reason)
    return rollouts, None


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
