"""The run that `graft dpo`, `reward`, `grpo` and `ppo` share: inputs, config, model, loop, result folder.

A method is a Stage: its config's parts and defaults, and a function that reads the rows into a Task. The task gives the loop
its batches and its objective; the rest of a run is written here, once.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...base.device import explain_device, peak_bytes, reset_peak, resolve_device
from ...base.follower import open_run
from ...base.model.config import ModelConfig
from ...base.model.huggingface import fingerprint, load_config
from ...base.model.transformer import Transformer
from ...base.parallel.mesh import Mesh
from ...base.parallel.ranks import Ranks, join
from ...base.parallel.same import check_same, facts_of
from ...base.progress import step_progress
from ...base.run import Run, check_same_inputs, resumed_settings
from ...base.runlog import ON_RANKS, RunFolder, read_metrics
from ...base.settings import check_settings
from ...base.tokenizer.tokenizer import Tokenizer
from ...base.train import train
from ...base.training.checkpoints import ExtraState, load_weights
from ...base.training.history import check_evaluation
from ...base.training.objective import Batch, Objective
from ...base.training.result import Result, best_step, resumed_result
from ..adapters.files import read_adapter
from ..data.chat import ChatTemplate
from ..loading import check_token_ids
from ..memory.report import print_prediction
from ..memory.step import Work
from ..optimizers import finetuning_mesh
from ..sft import save_trained, stored_in_4_bits
from . import setup


class StoppedEarly(Exception):
    """The run was asked to end before its steps for this reason; its weights are the result."""


@dataclass(frozen=True, eq=False)
class Source:
    """What a stage reads its rows with."""

    data: Path
    eval_data: Path | None
    base: Path
    model: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate


@dataclass(frozen=True, eq=False)
class Training:
    """What the loop is given."""

    batch_at: Callable[[int], Sequence[Batch]]
    objective: Objective
    evaluate: Callable[[], dict[str, float]] | None = None
    extra: ExtraState | None = None
    on_step: Callable[[Mapping[str, Any]], None] | None = None  # sees each line of metrics
    after_start: Callable[[], None] | None = None  # called when the run's folder is there, before the first step


class Task(Protocol):
    """A stage's rows, read and checked."""

    @property
    def n_rows(self) -> int:
        """What an epoch counts."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest row, its answer included."""
        ...

    @property
    def is_chat(self) -> bool:
        """Whether any row went through the chat template."""
        ...

    @property
    def has_evaluation(self) -> bool:
        """Whether there are held-out rows."""
        ...

    def begin(self, policy: setup.Policy, config: Run, run: RunFolder, device: str, *, progress: bool) -> Training:
        """Make batches and objective; may add modules to the model, which then train. Nothing is written yet."""
        ...

    def finish(self, model: Transformer, folder: Path, config: Run) -> dict[str, Any]:
        """Take off the model what `begin` added, write what the method keeps beside the weights; returns more metadata."""
        ...

    def figures(self, config: Run) -> dict[str, Any]:
        """Of the summary, beside the loop's."""
        ...


@dataclass(frozen=True, eq=False)
class Stage:
    """One method."""

    name: str  # dpo, reward, grpo or ppo
    parts: Mapping[str, type]  # of its config
    defaults: Callable[
        [str, Mapping[str, Any], int], dict[str, Any]
    ]  # (full | lora | qlora, requested, n_rows) -> by key
    read: Callable[[Run, Source], Task]
    work: Callable[[Run], Work]  # a step of such a run on made-up rows, for the memory prediction


def align(
    stage: Stage,
    *,
    base: Path | str,  # model folder in Hugging Face's layout
    data: Path | str,
    out: Path | str,  # an adapter (lora, qlora) or a base (full) is written there
    method: str = "lora",  # what trains: full, lora or qlora
    adapter: Path | str | None = None,  # SFT adapter to go on with; a frozen copy of it is the reference
    eval_data: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: bool = False,
    **settings: Any,  # keys of the stage's parts, as `graft config STAGE` lists them
) -> dict[str, Any]:
    """Run a stage; returns the summary. Raises ValueError or OSError for bad input, Interrupted after a signal."""
    requested_device, device = device, resolve_device(device)
    together, device = join(device) if stage.name in ON_RANKS else (Ranks(), device)
    progress = progress and together.is_first
    base, data, out = Path(base), Path(data), Path(out)
    adapter, eval_data = (Path(path) if path is not None else None for path in (adapter, eval_data))
    if out.resolve() == base.resolve():
        raise ValueError(f"--out {out} is the base itself; choose another folder")
    with open_run(together, out, stage=f"{stage.name} {method}", resume=resume, force=force) as run:
        requested = check_settings(settings, *stage.parts.values())
        if adapter is not None:
            requested = setup.adapter_settings(read_adapter(adapter), requested, method)
        model_config = load_config(base)
        inputs = setup.all_inputs(base, data, eval_data, adapter)
        if run.previous:
            check_same_inputs(run.previous["config"], inputs)
            requested = resumed_settings(requested, run.previous["config"])

        def resolved(n_rows: int) -> Run:
            defaults = stage.defaults(method, requested, n_rows)
            return setup.resolve(requested, stage.parts, method=method, defaults=defaults, inputs=inputs)

        tokenizer = Tokenizer.load(base)
        check_token_ids(tokenizer, model_config, where=base)
        template = ChatTemplate.of(tokenizer)
        draft = resolved(1)  # the rows are counted once they are read
        task = stage.read(draft, Source(data, eval_data, base, model_config, tokenizer, template))
        config = resolved(task.n_rows)
        stored = stored_in_4_bits(config)
        check_evaluation(config.train, has_evaluation=task.has_evaluation)
        if progress:
            print(explain_device(requested_device, device), file=sys.stderr)
        check_same(together, facts_of(config))
        mesh = finetuning_mesh(config.train, together, device, lora=config.lora)
        predicted = None
        if together.is_first:
            predicted = print_prediction(
                model_config,
                config.train,
                device,
                method="qlora" if stored else method,
                seq_len=task.longest,
                lora=config.lora,
                double_quant=stored["double_quant"] if stored else config.quant.double_quant,
                stage=stage.name,
                work=stage.work(config),
            )
        reset_peak(device)
        policy = setup.make_policy(config, device, adapter)
        metadata = {
            "prompt_format": "chat" if task.is_chat else "text",
            "base_fingerprint": fingerprint(policy.model),
            "method": f"{stage.name} {method}",
        }
        result, stopped = _train(stage, task, policy, config, mesh, run, device, progress)
        n_trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
        if together.is_first:
            with run.results() as folder:
                metadata |= task.finish(policy.model, folder, config)
                save_trained(policy.model, config, folder, tokenizer, template, metadata)
        summary = {
            "method": method,
            **result.summary(),
            **task.figures(config),
            "stopped_early": stopped,
            "n_trained_params": n_trained,
            "predicted_peak_bytes": predicted,
            **peak_bytes(device),
            "device": device,
            **({"n_ranks": together.n} if together.n > 1 else {}),
        }
        run.finish(summary)
        return summary


def _train(
    stage: Stage,
    task: Task,
    policy: setup.Policy,
    config: Run,
    mesh: Mesh,
    run: RunFolder,
    device: str,
    progress: bool,
) -> tuple[Result, str | None]:
    """What the loop measured, and why the run ended before its steps, if it did."""
    loop = config.train
    training = task.begin(policy, config, run, device, progress=progress)
    optimizer = setup.policy_optimizer(policy.model, config, mesh)
    # All validation is done: only now may --force touch what a former run left.
    run.start(config.saved(), seed=loop.seed)
    mesh.ranks.wait()  # --force sets a former run's checkpoints aside in there: no rank may take them for its own
    if training.after_start is not None:
        training.after_start()
    with step_progress(f"{stage.name} {config.method}", loop.steps, shown=progress) as observe:

        def on_step(line: dict[str, Any]) -> None:
            observe(line)
            if training.on_step is not None:
                training.on_step(line)

        try:
            result = train(
                policy.model,
                optimizer,
                training.batch_at,
                loop,
                run,
                objective=training.objective,
                evaluate=training.evaluate,
                extra=training.extra,
                on_step=on_step,
                device=device,
            )
        except StoppedEarly as reason:
            policy.model.eval()
            print(f"stopped early: {reason}", file=sys.stderr)
            lines = read_metrics(run.folder / "metrics.jsonl")
            result = resumed_result(len(lines), lines)
            result.best_by, best = loop.best_by, best_step(result.evals, loop.best_by)
            if loop.keeps_best and best is not None:  # as the loop does at its own end
                load_weights(run.checkpoints / f"step-{best:08d}", optimizer)
                result.best_step = best
            return result, str(reason)
    return result, None
