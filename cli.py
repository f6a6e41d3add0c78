"""The command line: parse, build one config, call one function, turn an error into one line.

No module of ours but the commands' own is imported before a command runs, so that `graft --help` never imports torch.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from .base.data.commands import app as data_app
from .base.tokenizer.tools.commands import app as tokenizer_app
from .finetune.adapters.commands import app as adapter_app
from .finetune.align import commands as align
from .finetune.data.commands import inspect as inspect_records
from .finetune.memory.commands import plan, vram_app

# The pipeline's order; --help lists the commands so, in panels.
ORDER = {
    "1. Try it": ("demo",),
    "2. Text to tokens": ("tokenizer", "data"),
    "3. Train": ("plan", "config", "pretrain", "sft", "quantize"),
    "4. Align": ("dpo", "reward", "grpo", "ppo"),
    "5. Use": ("generate", "chat", "adapter", "eval"),
    "6. Look": ("vram", "plot", "doctor"),
}
PANEL = {name: panel for panel, names in ORDER.items() for name in names}


class InOrder(typer.core.TyperGroup):
    """Lists the commands in the pipeline's order."""

    def list_commands(self, ctx: object) -> list[str]:
        del ctx
        return [name for name in PANEL if name in self.commands]


app = typer.Typer(
    cls=InOrder,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="The whole life of a small language model: tokenizer, pretraining, fine-tuning, LoRA, QLoRA, swapped adapters.",
)
app.add_typer(tokenizer_app, name="tokenizer", rich_help_panel=PANEL["tokenizer"])
data_app.command("inspect")(inspect_records)
app.add_typer(data_app, name="data", rich_help_panel=PANEL["data"])
app.add_typer(adapter_app, name="adapter", rich_help_panel=PANEL["adapter"])
app.add_typer(vram_app, name="vram", rich_help_panel=PANEL["vram"])
app.command("plan", rich_help_panel=PANEL["plan"])(plan)
app.command("dpo", rich_help_panel=PANEL["dpo"])(align.dpo)
app.command("grpo", rich_help_panel=PANEL["grpo"])(align.grpo)
app.command("ppo", rich_help_panel=PANEL["ppo"])(align.ppo)
app.command("reward", rich_help_panel=PANEL["reward"])(align.reward)

Out = Annotated[Path, typer.Option("--out", help="Folder for the result; must be new, or use --resume or --force.")]
Base = Annotated[Path, typer.Option("--base", help="Model folder in Hugging Face's layout.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value for any config key; can be repeated.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")]
Force = Annotated[bool, typer.Option("--force", help="Start over in a folder that holds a run.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Seed = Annotated[int | None, typer.Option("--seed", help=r"Decides weights, data order and dropout. \[default: 0]")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer updates.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help=r"Sequences an update. \[default: 32 pretraining, 16 fine-tuning]")
]
LearningRate = Annotated[
    float | None, typer.Option("--learning-rate", "--lr", help=r"Peak rate. \[default: 1e-3; sft 5e-5, adapters 5e-4]")
]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="Adapter folder in PEFT's layout.")]


def _settings(config: Path | None, assignments: list[str] | None, **flags: object) -> dict[str, Any]:
    """TOML, overridden by --set and by the flags that were given."""
    from .base.settings import combine

    return combine(config, assignments or [], flags)


@app.command(rich_help_panel=PANEL["demo"])
def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", help="Decides every number of the demo.")] = 0,
    force: Force = False,
    device: Device = "auto",
) -> None:
    """The whole chain in five minutes: tokenizer, base, three adapters swapped in one process, memory table.

    Example: graft demo --out runs/demo
    """
    from .finetune.demo import run_demo

    run_demo(out, seed=seed, force=force, device=device)


@app.command("config", rich_help_panel=PANEL["config"])
def show_config(
    stage: Annotated[
        str | None, typer.Argument(help="pretrain, sft, dpo, reward, grpo or ppo; all if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List every config key of a training command: type, default, meaning.

    Each is given by --set key=value or in a TOML file, and the commonest by flags.

    Example: graft config sft
    """
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .base.settings import describe

    stages = ("pretrain", "sft", *ORDER["4. Align"])
    if stage not in (None, *stages):
        raise ValueError(f"unknown stage {stage!r}; choose {', '.join(stages[:-1])} or {stages[-1]}")
    tables = {}
    for name in [stage] if stage else stages:
        defaults: dict[str, object] = {}
        if name == "pretrain":
            from .base.pretrain import PARTS as parts

            defaults = {"vocab_size": "the tokenizer's"}
        elif name == "sft":
            from .finetune.sft import PARTS as parts
            from .finetune.sft import default_texts

            defaults = default_texts()
        else:
            parts = align.parts_of(name)
        keys = {part: [asdict(key) for key in describe(kind)] for part, kind in parts.items()}
        for key in (key for part in keys.values() for key in part):
            key["default"] = str(defaults.get(key["name"], key["default"]))
        tables[name] = keys
    if as_json:
        typer.echo(json.dumps(tables))
        return
    for name, keys in tables.items():
        for part, described in keys.items():
            table = Table(
                "key", "type", "default", "meaning", title=escape(f"graft {name}: [{part}]"), title_justify="left"
            )
            for key in described:
                table.add_row(*(escape(key[column]) for column in ("name", "type", "default", "meaning")))
            Console().print(table)


Config = Annotated[Path | None, typer.Argument(help="TOML file with config keys; see graft config.")]


@app.command(rich_help_panel=PANEL["pretrain"])
def pretrain(
    data: Annotated[Path, typer.Option("--data", help="Folder of token shards, from graft data prepare.")],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="Folder of the tokenizer.")],
    out: Out,
    config: Config = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help=r"nano, micro, mini, small or medium. \[default: micro]")
    ] = None,
    settings: Settings = None,
    seed: Seed = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    device: Device = "auto",
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Train a base from scratch on token shards; the folder opens in transformers.

    Example: graft pretrain --data runs/tokens --tokenizer runs/tokenizer --out runs/base --preset micro --steps 500
    """
    from .base.pretrain import run_pretrain
    from .finetune.memory.report import print_prediction

    flags = {"seed": seed, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    summary = run_pretrain(
        data=data,
        tokenizer=tokenizer,
        out=out,
        preset_name=preset,
        settings=_settings(config, settings, **flags),
        resume=resume,
        force=force,
        device=device,
        predict=print_prediction,
    )
    _say_summary(out, summary)


@app.command(rich_help_panel=PANEL["sft"])
def sft(
    base: Base,
    data: Annotated[Path, typer.Option("--data", help="Records: JSON, JSONL, CSV or Parquet (TRL, Alpaca, ShareGPT).")],
    out: Out,
    config: Config = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train an adapter on the frozen base.")] = False,
    qlora: Annotated[bool, typer.Option("--qlora", help="Train an adapter on the base in 4 bits.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help=r"Rank of the adapter. \[default: 16]")] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help=r"The update is scaled by alpha / rank. \[default: 32]")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option("--dropout", help=r"On the adapter's input, while training. \[default: 0]")
    ] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", help=r"Linears to adapt, such as q_proj,v_proj. \[default: all-linear]")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", help="Held-out records for a validation loss.")
    ] = None,
    quant_backend: Annotated[
        str | None, typer.Option("--quant-backend", help="With --qlora: graft or bitsandbytes, to compare.")
    ] = None,
    settings: Settings = None,
    seed: Seed = None,
    steps: Steps = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help=r"Passes over the records, without --steps. \[default: 3]")
    ] = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    device: Device = "auto",
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Fine-tune a base on records: every weight by default, or an adapter with --lora or --qlora.

    Example: graft sft --base runs/demo/base --data runs/demo/data/spam/train.jsonl --out runs/spam --lora --steps 60
    """
    from .finetune.sft import run_sft

    if lora and qlora:
        raise ValueError("--lora and --qlora exclude each other; QLoRA is LoRA on a base in 4 bits")
    names = [t.strip() for t in targets.split(",") if t.strip()] if targets else None
    adapter = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": names}
    loop = {"seed": seed, "steps": steps, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    given = _settings(config, settings, **adapter, **loop, quant_backend=quant_backend)
    flag = "lora" if lora else "qlora" if qlora else None
    method = given.pop("method", None)
    if flag is not None and method not in (None, flag):
        raise ValueError(f"--{flag} and method={method!r} contradict each other; give one")
    method = str(flag or method or "full")
    if method == "full":
        for name, value in adapter.items():
            if value is not None:
                raise ValueError(f"--{name} is about an adapter; add --lora or --qlora, or leave it out")
    summary = run_sft(
        base=base,
        data=data,
        out=out,
        method=method,
        settings=given,
        eval_data=eval_data,
        resume=resume,
        force=force,
        device=device,
    )
    _say_summary(out, summary)


@app.command(rich_help_panel=PANEL["quantize"])
def quantize(
    base: Base,
    out: Out,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Text file: choose the codes so that outputs on it change least (GPTQ); same format and size."
        ),
    ] = None,
    double_quant: Annotated[bool, typer.Option(help="Quantize the constants too: 4.13 instead of 4.5 bits.")] = True,
    force: Force = False,
) -> None:
    """Write a base in NF4, as bitsandbytes and transformers read it.

    Example: graft quantize --base runs/demo/base --out runs/base-nf4
    """
    from .finetune.quantize import run_quantize

    _say_summary(out, run_quantize(base, out, calibrate=calibrate, double_quant=double_quant, force=force))


@app.command(rich_help_panel=PANEL["generate"])
def generate(
    base: Base,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on from.")],
    adapter: Adapter = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help=r"As a turn of a chat, or not. \[default: as trained]"),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "auto",
) -> None:
    """Continue a prompt, with or without an adapter.

    Example: graft generate --base runs/demo/base --prompt "def main" --max-new-tokens 40
    """
    from .base.generate.sampling import Sampling
    from .finetune.session import Session

    sampling = Sampling(temperature, top_k, top_p, min_p, max_new_tokens, seed=seed)
    session = Session(base, dtype=dtype, device=device, chat=chat)
    if adapter is not None:
        session.load(adapter.name or "adapter", adapter)
    session.answer([{"role": "user", "content": prompt}], sampling=sampling, on_text=_write)
    _write("\n")


@app.command(rich_help_panel=PANEL["chat"])
def chat(
    base: Base,
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help="NAME=DIR; can be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 128,
    temperature: Annotated[float, typer.Option("--temperature")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p")] = 0.95,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    dtype: Annotated[str, typer.Option("--dtype")] = "float32",
    device: Device = "auto",
) -> None:
    """Talk to a base; /adapter NAME swaps, /adapters lists, /base turns them off, /quit ends.

    Example: graft chat --base runs/demo/base --adapter spam=runs/demo/adapters/spam
    """
    from .base.generate.sampling import Sampling
    from .finetune.session import Session, named_folders, talk

    sampling = Sampling(temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
    session = Session(base, dtype=dtype, device=device, chat=None)
    for name, folder in named_folders(adapter or []).items():
        session.load(name, folder)
    session.use(None)
    talk(session, sampling)


@app.command("eval", rich_help_panel=PANEL["eval"])
def evaluate(
    base: Base,
    data: Annotated[Path, typer.Option("--data", help="Records with answers, or a text file.")],
    adapter: Adapter = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N records.")] = None,
    dtype: Annotated[str, typer.Option("--dtype")] = "float32",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a base or an adapter: loss, bits per byte, exact match, F1 for labels.

    Example: graft eval --base runs/demo/base --adapter runs/demo/adapters/spam --data runs/demo/data/spam/eval.jsonl
    """
    from .finetune.evaluate import run_evaluate

    _say_figures(run_evaluate(base, data, adapter=adapter, limit=limit, dtype=dtype, device=device), as_json)


@app.command(rich_help_panel=PANEL["plot"])
def plot(run: Annotated[Path, typer.Argument(help="Folder of a training run.")]) -> None:
    """Draw a run's loss curve to RUN/loss.png.

    Example: graft plot runs/demo/base
    """
    from .base.plots import plot_run

    typer.echo(plot_run(run))


@app.command(rich_help_panel=PANEL["doctor"])
def doctor() -> None:
    """Show for each kernel what runs on this machine, and why.

    Example: graft doctor
    """
    from rich.console import Console
    from rich.table import Table

    from .base.runlog import versions
    from .kernels.doctor import report

    table = Table(title=" ".join(f"{name} {version}" for name, version in versions().items()))
    for column in ("kernel", "runs here", "why"):
        table.add_column(column)
    for row in report():
        table.add_row(*map(str, row))
    Console().print(table)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say_figures(figures: dict[str, object], as_json: bool) -> None:
    import json

    if as_json:
        typer.echo(json.dumps(figures))
        return
    for name, value in figures.items():
        typer.echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def _say_summary(out: Path, summary: dict[str, object]) -> None:
    shown = {name: value for name, value in summary.items() if value is not None}
    _say_figures(shown, as_json=False)
    typer.echo(f"written to {out}")


def main() -> None:
    """Run the app; a ValueError or OSError becomes one line on standard error and exit code 1."""
    try:
        app()
    except BrokenPipeError:
        sys.exit(141)
    except (ValueError, OSError) as error:
        message = str(error).replace("\n", " ") or type(error).__name__
        typer.echo(f"graft: {message}", err=True)
        sys.exit(1)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            typer.echo(f"graft: out of memory: {str(error).splitlines()[0]}; see graft vram estimate --fit", err=True)
            sys.exit(1)
        if type(error).__name__ != "Interrupted":  # base.train's; its module would import torch
            raise
        typer.echo(f"graft: {error}", err=True)
        sys.exit(getattr(error, "exit_code", 1))
