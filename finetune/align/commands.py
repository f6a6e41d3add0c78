"""`graft dpo`, `graft reward`, `graft grpo` and `graft ppo`: the options of each command, and nothing else."""

from pathlib import Path
from typing import Annotated, Any

import typer

Base = Annotated[Path, typer.Option("--base", help="Model folder in Hugging Face's layout.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the result; must be new, or use --resume or --force.")]
Config = Annotated[Path | None, typer.Argument(help="TOML file with config keys; see graft config.")]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="SFT adapter to go on with; a copy of it is the reference.")
]
Full = Annotated[bool, typer.Option("--full", help="Train every weight instead of an adapter.")]
QLora = Annotated[bool, typer.Option("--qlora", help="Train an adapter on the base in 4 bits.")]
Rank = Annotated[int | None, typer.Option("--rank", help=r"Rank of the adapter. \[default: 16]")]
Beta = Annotated[float | None, typer.Option("--beta", help=r"How near the policy stays. \[default: 0.1; simpo 2]")]
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


def parts_of(command: str) -> dict[str, type]:
    """The parts of a command's config, for `graft config`."""
    from importlib import import_module

    return import_module(f".run_{command}", __package__).PARTS


def dpo(
    base: Base,
    data: Annotated[
        Path, typer.Option("--data", help="Rows with prompt, chosen, rejected (or prompt, completion, label).")
    ],
    out: Out,
    config: Config = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help=r"sigmoid, ipo, robust, hinge, kto, orpo, simpo. \[default: sigmoid]")
    ] = None,
    beta: Beta = None,
    adapter: Adapter = None,
    eval_data: Annotated[Path | None, typer.Option("--eval-data", help="Held-out preference rows.")] = None,
    full: Full = False,
    qlora: QLora = False,
    rank: Rank = None,
    settings: Settings = None,
    seed: Seed = None,
    steps: Steps = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help=r"Without --steps. \[default: 1]")] = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    device: Device = "auto",
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Learn from preferences (DPO, IPO, KTO, ORPO, SimPO): an adapter by default, every weight with --full.

    Example: graft dpo --base runs/demo/base --data pairs.jsonl --out runs/dpo --steps 60
    """
    from .run_dpo import dpo as run

    flags = {"loss": loss, "beta": beta, "rank": rank, "seed": seed, "steps": steps, "epochs": epochs}
    given = _combined(config, settings, **flags, batch_size=batch_size, learning_rate=learning_rate)
    summary = run(
        base=base,
        data=data,
        out=out,
        method=_method(full, qlora),
        adapter=adapter,
        eval_data=eval_data,
        resume=resume,
        force=force,
        device=device,
        progress=True,
        **given,
    )
    _say(out, summary)


Rewards = Annotated[
    str,
    typer.Option(
        "--rewards",
        help='exact, number, label, regex:P, format, length:N, module:function; weighted: "exact + 0.2 * format".',
    ),
]
Prompts = Annotated[Path, typer.Option("--data", help="Rows with prompt or messages, and what the rewards read.")]
HeldOut = Annotated[Path | None, typer.Option("--eval-data", help="Held-out rows, answered greedily for val_reward.")]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help=r"Of an answer. \[default: 64]")]


def grpo(
    base: Base,
    data: Prompts,
    rewards: Rewards,
    out: Out,
    config: Config = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help=r"grpo, dr_grpo, dapo, gspo or cispo. \[default: grpo]")
    ] = None,
    group_size: Annotated[int | None, typer.Option("--group-size", help=r"Answers to a prompt. \[default: 8]")] = None,
    max_new_tokens: MaxNewTokens = None,
    adapter: Adapter = None,
    eval_data: HeldOut = None,
    full: Full = False,
    qlora: QLora = False,
    rank: Rank = None,
    settings: Settings = None,
    seed: Seed = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    device: Device = "auto",
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Learn from rewards by comparing several sampled answers to each prompt (GRPO, DAPO, GSPO, ...).

    Example: graft grpo --base runs/sft --data train.jsonl --rewards exact --out runs/grpo --steps 100
    """
    from .run_grpo import grpo as run

    flags = {"kind": kind, "group_size": group_size, "max_new_tokens": max_new_tokens, "rank": rank, "seed": seed}
    given = _combined(config, settings, **flags, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    summary = run(
        base=base,
        data=data,
        rewards=rewards,
        out=out,
        method=_method(full, qlora),
        adapter=adapter,
        eval_data=eval_data,
        resume=resume,
        force=force,
        device=device,
        progress=True,
        **given,
    )
    _say(out, summary)


def ppo(
    base: Base,
    data: Prompts,
    rewards: Rewards,
    out: Out,
    config: Config = None,
    max_new_tokens: MaxNewTokens = None,
    adapter: Adapter = None,
    eval_data: HeldOut = None,
    full: Full = False,
    qlora: QLora = False,
    rank: Rank = None,
    settings: Settings = None,
    seed: Seed = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    device: Device = "auto",
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Learn from rewards with a value head that says what to expect at each token (PPO, GAE).

    Example: graft ppo --base runs/sft --data train.jsonl --rewards exact --out runs/ppo --steps 100
    """
    from .run_ppo import ppo as run

    flags = {"max_new_tokens": max_new_tokens, "rank": rank, "seed": seed}
    given = _combined(config, settings, **flags, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    summary = run(
        base=base,
        data=data,
        rewards=rewards,
        out=out,
        method=_method(full, qlora),
        adapter=adapter,
        eval_data=eval_data,
        resume=resume,
        force=force,
        device=device,
        progress=True,
        **given,
    )
    _say(out, summary)


def reward(
    base: Base,
    data: Annotated[Path, typer.Option("--data", help="Rows with prompt, chosen, rejected.")],
    out: Out,
    config: Config = None,
    eval_data: Annotated[Path | None, typer.Option("--eval-data", help="Held-out preference rows.")] = None,
    full: Full = False,
    qlora: QLora = False,
    rank: Rank = None,
    settings: Settings = None,
    seed: Seed = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    device: Device = "auto",
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Train a reward model on preferences; use it as --rewards model:DIR in graft grpo and graft ppo.

    Example: graft reward --base runs/sft --data pairs.jsonl --out runs/reward
    """
    from .run_reward import reward as run

    given = _combined(
        config, settings, rank=rank, seed=seed, steps=steps, batch_size=batch_size, learning_rate=learning_rate
    )
    summary = run(
        base=base,
        data=data,
        out=out,
        method=_method(full, qlora),
        eval_data=eval_data,
        resume=resume,
        force=force,
        device=device,
        progress=True,
        **given,
    )
    _say(out, summary)


def _method(full: bool, qlora: bool) -> str:
    if full and qlora:
        raise ValueError("--full and --qlora exclude each other; QLoRA trains an adapter on a base in 4 bits")
    return "full" if full else "qlora" if qlora else "lora"


def _combined(config: Path | None, assignments: list[str] | None, **flags: object) -> dict[str, Any]:
    """TOML, overridden by --set and by the flags that were given."""
    from ...base.settings import combine

    return combine(config, assignments or [], flags)


def _say(out: Path, summary: dict[str, Any]) -> None:
    for name, value in summary.items():
        if value is not None:
            typer.echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    typer.echo(f"written to {out}")
