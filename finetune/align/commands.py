"""`graft dpo`, `reward`, `grpo` and `ppo`: the options that all of them take, and each one's own."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Base = Annotated[Path, typer.Option("--base", help="Model folder in Hugging Face's layout.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the result; must be new, or use --resume or --force.")]
Pairs = Annotated[
    Path, typer.Option("--data", help="Rows with prompt, chosen, rejected (or prompt, completion, label).")
]
HeldOutPairs = Annotated[Path | None, typer.Option("--eval-data", help="Held-out preference rows.")]
Prompts = Annotated[Path, typer.Option("--data", help="Rows with prompt or messages, and what the rewards read.")]
HeldOut = Annotated[Path | None, typer.Option("--eval-data", help="Held-out rows, answered greedily for val_reward.")]
Rewards = Annotated[
    str,
    typer.Option(
        "--rewards",
        help='exact, number, label, regex:P, format, length:N, model:DIR, module:function; weighted: "exact + 0.2 * format".',
    ),
]
Loss = Annotated[
    str | None, typer.Option("--loss", help=r"sigmoid, ipo, robust, hinge, kto, orpo, simpo. \[default: sigmoid]")
]
Beta = Annotated[float | None, typer.Option("--beta", help=r"How near the policy stays. \[default: 0.1; simpo 2]")]
Epochs = Annotated[float | None, typer.Option("--epochs", help=r"Without --steps. \[default: 1]")]
Kind = Annotated[str | None, typer.Option("--kind", help=r"grpo, dr_grpo, dapo, gspo or cispo. \[default: grpo]")]
GroupSize = Annotated[int | None, typer.Option("--group-size", help=r"Answers to a prompt. \[default: 8]")]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help=r"Of an answer. \[default: 64]")]
Config = Annotated[Path | None, typer.Argument(help="TOML file with config keys; see graft config.")]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="SFT adapter to go on with; a copy of it is the reference.")
]
Full = Annotated[bool, typer.Option("--full", help="Train every weight instead of an adapter.")]
QLora = Annotated[bool, typer.Option("--qlora", help="Train an adapter on the base in 4 bits.")]
Rank = Annotated[int | None, typer.Option("--rank", help=r"Rank of the adapter. \[default: 16]")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value for any config key; can be repeated.")]
Seed = Annotated[int | None, typer.Option("--seed", help=r"Decides data order, samples and dropout. \[default: 0]")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer updates.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help=r"Pairs or answers an update. \[default: 16; RL 64]")
]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Peak rate.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")]
Force = Annotated[bool, typer.Option("--force", help="Start over in a folder that holds a run.")]

Options = dict[str, tuple[Any, Any]]  # parameter -> its annotation and default; `...`: it must be given
FOR_RUN = (
    "base",
    "data",
    "out",
    "rewards",
    "adapter",
    "eval_data",
    "device",
    "resume",
    "force",
)  # the others: config keys
OF_ALL: Options = {
    "adapter": (Adapter, None), "full": (Full, False), "qlora": (QLora, False), "rank": (Rank, None),
    "settings": (Settings, None), "seed": (Seed, None), "steps": (Steps, None), "batch_size": (BatchSize, None),
    "learning_rate": (LearningRate, None), "device": (Device, "auto"), "resume": (Resume, False), "force": (Force, False),
}  # fmt: skip
PAIRS: Options = {"base": (Base, ...), "data": (Pairs, ...), "out": (Out, ...), "config": (Config, None)}
PROMPTS: Options = {
    "base": (Base, ...), "data": (Prompts, ...), "rewards": (Rewards, ...), "out": (Out, ...), "config": (Config, None),
}  # fmt: skip


def stage_command(stage: str, options: Options, doc: str) -> Callable[..., None]:
    """A command that runs run_<stage>.py's function of that name; `doc` is its help."""

    def command(**given: Any) -> None:
        from importlib import import_module

        from ...base.parallel.ranks import leave, ranks
        from ...base.settings import combine

        method = _method(given.pop("full"), given.pop("qlora"))
        config, assignments = given.pop("config"), given.pop("settings") or []
        of_run = {name: given.pop(name) for name in FOR_RUN if name in given}
        run = getattr(import_module(f".run_{stage}", __package__), stage)
        summary = run(**of_run, method=method, progress=True, **combine(config, assignments, given))
        if ranks().is_first:
            for name, value in summary.items():
                if value is not None:
                    typer.echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
            typer.echo(f"written to {of_run['out']}")
        leave()

    command.__doc__ = doc
    command.__annotations__ = {name: annotation for name, (annotation, _) in options.items()}
    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty if default is ... else default,
            annotation=annotation,
        )
        for name, (annotation, default) in options.items()
    ]  # fmt: skip
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess] (typer reads it)
    return command


dpo = stage_command(
    "dpo",
    PAIRS
    | {"loss": (Loss, None), "beta": (Beta, None), "eval_data": (HeldOutPairs, None), "epochs": (Epochs, None)}
    | OF_ALL,
    """Learn from preferences (DPO, IPO, KTO, ORPO, SimPO): an adapter by default, every weight with --full.

    Example: graft dpo --base runs/demo/base --data pairs.jsonl --out runs/dpo --steps 60
    """,
)
reward = stage_command(
    "reward",
    PAIRS | {"eval_data": (HeldOutPairs, None), "epochs": (Epochs, None)} | OF_ALL,
    """Train a reward model on preferences; use it as --rewards model:DIR in graft grpo and graft ppo.

    Example: graft reward --base runs/sft --data pairs.jsonl --out runs/reward
    """,
)
grpo = stage_command(
    "grpo",
    PROMPTS
    | {"kind": (Kind, None), "group_size": (GroupSize, None)}
    | {"max_new_tokens": (MaxNewTokens, None), "eval_data": (HeldOut, None)}
    | OF_ALL,
    """Learn from rewards by comparing several sampled answers to each prompt (GRPO, DAPO, GSPO, ...).

    Example: graft grpo --base runs/sft --data train.jsonl --rewards exact --out runs/grpo --steps 100
    """,
)
ppo = stage_command(
    "ppo",
    PROMPTS | {"max_new_tokens": (MaxNewTokens, None), "eval_data": (HeldOut, None)} | OF_ALL,
    """Learn from rewards with a value head that says what to expect at each token (PPO, GAE).

    Example: graft ppo --base runs/sft --data train.jsonl --rewards exact --out runs/ppo --steps 100
    """,
)


def parts_of(command: str) -> dict[str, type]:
    """The parts of a command's config, for `graft config`."""
    from importlib import import_module

    return dict(import_module(f".run_{command}", __package__).STAGE.parts)


def _method(full: bool, qlora: bool) -> str:
    if full and qlora:
        raise ValueError("--full and --qlora exclude each other; QLoRA trains an adapter on a base in 4 bits")
    return "full" if full else "qlora" if qlora else "lora"
