"""The command line: parse, build one config, call one function, turn an error into one line.

No module of ours but the commands' own is imported before a command runs, so that `graft --help` never imports torch.
"""

import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from . import __version__
from .base.data.commands import app as data_app
from .base.parallel.commands import launch
from .base.parallel.launcher import tells_launcher
from .base.text.printable import markup, printable
from .base.tokenizer.tools.commands import app as tokenizer_app
from .finetune.adapters.commands import app as adapter_app
from .finetune.align import commands as align
from .finetune.align.arena_command import arena
from .finetune.commands import chat, generate
from .finetune.data.commands import inspect as inspect_records
from .finetune.evaluation.commands import evaluate
from .finetune.memory.commands import vram_app
from .finetune.memory.plan_command import plan
from .finetune.serve.commands import serve
from .finetune.sft_commands import Config, Device, Force, Resume, Seed, Settings, Steps, sft

# The pipeline's order; --help lists the commands so, in panels.
ORDER = {
    "1. Try it": ("demo",),
    "2. Text to tokens": ("tokenizer", "data"),
    "3. Train": ("plan", "config", "pretrain", "sft", "quantize", "launch"),
    "4. Align": ("dpo", "reward", "grpo", "ppo"),
    "5. Use": ("generate", "chat", "serve", "adapter", "eval", "arena"),
    "6. Look": ("vram", "plot", "doctor"),
}
PANEL = {name: panel for panel, names in ORDER.items() for name in names}


class InOrder(typer.core.TyperGroup):
    """Lists the commands in the pipeline's order."""

    def list_commands(self, ctx: object) -> list[str]:
        del ctx
        return [name for name in PANEL if name in self.commands]


class EachOnce(typer.core.TyperCommand):
    """A command whose single-valued options may be given once: Click keeps the last value and drops the others unseen."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Click does it. Raises ValueError for an option that is given twice, also under two of its names."""
        if not ctx.resilient_parsing:  # completion: the line is not finished
            _, _, given = self.make_parser(ctx).parse_args(list(args))
            for parameter, times in Counter(p for p in given if p.param_type_name == "option").items():
                if times > 1 and not getattr(parameter, "multiple", False):
                    names = "/".join([*parameter.opts, *parameter.secondary_opts])
                    raise ValueError(f"{names} is given {times} times and takes one value; keep one")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what is raised carries the command's name as a note."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted from None  # Click would end without a word
        except EOFError as error:  # Click takes it for a user who closed a prompt
            raise ValueError(f"a file ends too early: {error}") from error
        except Exception as error:
            error.add_note(f"command: {ctx.command_path}")
            raise


class _Interrupted(Exception):
    """Ctrl-C outside the training loop, which stops in an orderly way by itself."""


app = typer.Typer(
    cls=InOrder,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="The whole life of a small language model: tokenizer, pretraining, fine-tuning, LoRA, QLoRA, swapped adapters.",
)
app.add_typer(tokenizer_app, name="tokenizer", rich_help_panel=PANEL["tokenizer"])
data_app.command("inspect")(inspect_records)
app.add_typer(data_app, name="data", rich_help_panel=PANEL["data"])
app.add_typer(adapter_app, name="adapter", rich_help_panel=PANEL["adapter"])
app.add_typer(vram_app, name="vram", rich_help_panel=PANEL["vram"])
app.command("sft", rich_help_panel=PANEL["sft"])(sft)
app.command("plan", rich_help_panel=PANEL["plan"])(plan)
app.command("dpo", rich_help_panel=PANEL["dpo"])(align.dpo)
app.command("grpo", rich_help_panel=PANEL["grpo"])(align.grpo)
app.command("generate", rich_help_panel=PANEL["generate"])(generate)
app.command("chat", rich_help_panel=PANEL["chat"])(chat)
app.command("eval", rich_help_panel=PANEL["eval"])(evaluate)
app.command("serve", rich_help_panel=PANEL["serve"])(serve)
app.command("ppo", rich_help_panel=PANEL["ppo"])(align.ppo)
app.command("reward", rich_help_panel=PANEL["reward"])(align.reward)
app.command("arena", rich_help_panel=PANEL["arena"])(arena)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
app.command("launch", rich_help_panel=PANEL["launch"], context_settings=PASSED_ON)(launch)

Out = Annotated[Path, typer.Option("--out", help="Folder for the result; must be new, or use --resume or --force.")]
Base = Annotated[Path, typer.Option("--base", help="Model folder in Hugging Face's layout.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help=r"Sequences an update. \[default: 32 pretraining, 16 fine-tuning]")
]
LearningRate = Annotated[
    float | None, typer.Option("--learning-rate", "--lr", help=r"Peak rate. \[default: 1e-3; sft 5e-5, adapters 5e-4]")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graft {__version__}")
        raise typer.Exit


@app.callback()
def graft(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """What all commands share; the text of --help stands above."""
    del version


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
    """The whole chain in five minutes: tokenizer, base, four adapters swapped in one process, memory table.

    Example: graft demo --out runs/demo
    """
    from .finetune.demo.run import run_demo

    run_demo(out, seed=seed, force=force, device=device)


@app.command("config", rich_help_panel=PANEL["config"])
def show_config(
    stage: Annotated[
        str | None, typer.Argument(help="pretrain, sft, dpo, reward, grpo, ppo; recipes; all stages if not given.")
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
    from rich.table import Table

    from .base.settings import describe

    if stage == "recipes":
        from .finetune.recipes.listing import print_recipes

        print_recipes(as_json=as_json)
        return
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
                "key", "type", "default", "meaning", title=markup(f"graft {name}: [{part}]"), title_justify="left"
            )
            for key in described:
                table.add_row(*(markup(key[column]) for column in ("name", "type", "default", "meaning")))
            Console().print(table)


@app.command(rich_help_panel=PANEL["pretrain"])
def pretrain(
    data: Annotated[
        list[str],
        typer.Option("--data", help="Token shards, from graft data prepare; several: A=0.7 --data B=0.3,0.5@0.8."),
    ],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="Folder of the tokenizer.")],
    out: Out,
    config: Config = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help=r"nano to medium, gpt2, transformer-2017, ... \[default: micro]")
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", help="One dial: layers, and with them width, rate, batch and steps.")
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
    from .base.parallel.ranks import leave, ranks
    from .base.pretrain import run_pretrain
    from .finetune.evaluation.during import open_benchmarks
    from .finetune.memory.budget import within_budget
    from .finetune.memory.report import print_prediction

    flags = {"seed": seed, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    summary = run_pretrain(
        data=data,
        tokenizer=tokenizer,
        out=out,
        preset_name=preset,
        depth=depth,
        settings=_settings(config, settings, **flags),
        resume=resume,
        force=force,
        device=device,
        fit=within_budget,
        predict=print_prediction,
        benchmarks=open_benchmarks,
    )
    if ranks().is_first:
        _print_summary(out, summary)
    leave()


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

    _print_summary(out, run_quantize(base, out, calibrate=calibrate, double_quant=double_quant, force=force))


@app.command(rich_help_panel=PANEL["plot"])
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs; several go into one picture.")],
    out: Annotated[
        Path | None, typer.Option("--out", help=r"Picture file. \[default: RUN/loss.png, or runs.png of several]")
    ] = None,
) -> None:
    """Draw a run's loss curve to RUN/loss.png, or several runs in one picture: loss, rate, norms, throughput, spikes.

    Example: graft plot runs/demo/base
    """
    from .base.plot_runs import plot_runs
    from .base.plots import plot_run

    typer.echo(plot_run(runs[0]) if len(runs) == 1 and out is None else plot_runs(runs, out or Path("runs.png")))


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
        table.add_row(*map(markup, row))
    Console().print(table)


def _print_figures(figures: dict[str, object], as_json: bool) -> None:
    import json

    if as_json:
        typer.echo(json.dumps(figures))
        return
    for name, value in figures.items():
        typer.echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def _print_summary(out: Path, summary: dict[str, object]) -> None:
    shown = {name: value for name, value in summary.items() if value is not None}
    _print_figures(shown, as_json=False)
    typer.echo(f"written to {out}")


def _use_each_once(group: typer.Typer) -> None:
    for info in group.registered_commands:
        info.cls = EachOnce
    for info in group.registered_groups:
        if info.typer_instance is not None:
            _use_each_once(info.typer_instance)


_use_each_once(app)


@contextmanager
def _noted_interrupt() -> Iterator[list[int]]:
    """Within the block Ctrl-C raises KeyboardInterrupt as always, and also leaves its number in the list: foreign code may
    turn the exception into another one, such as safetensors while it reads a file."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    """Run the app; an error becomes one line on standard error and an exit code.

    1: bad input, a file or a device that fails, memory that does not suffice; 2: wrong usage; 70: a bug of graft's, whose
    traceback is written to a file; 130: Ctrl-C; 141: the reader of standard output has gone.
    """
    with _noted_interrupt() as interrupted:
        try:
            app(prog_name="graft")
        except BrokenPipeError:
            sys.exit(141)
        except Exception as error:
            if type(error).__name__ == "Interrupted":  # base.train's; its module would import torch
                _end(str(error), getattr(error, "exit_code", 1))
            if interrupted or isinstance(error, _Interrupted):
                _end("interrupted by Ctrl-C", 130)
            if _is_out_of_memory(error):
                first = (str(error) or type(error).__name__).splitlines()[0]
                _end(f"out of memory: {first}; see graft vram estimate --fit", 1)
            if isinstance(error, ValueError | OSError):
                _end(str(error) or type(error).__name__, 1)
            _end(_report_bug(error), 70)


def _end(message: str, code: int) -> NoReturn:
    """One line on standard error, then the exit code; under graft launch the line is left to the launcher."""
    line = printable(message.replace(chr(10), " "))
    if not tells_launcher(line, code):
        typer.echo(f"graft: {line}", err=True)
    sys.exit(code)


def _is_out_of_memory(error: Exception) -> bool:
    """Python's and NumPy's MemoryError, torch's OutOfMemoryError on a GPU and its RuntimeError on the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _report_bug(error: Exception) -> str:
    """The line for an exception that nobody expected; its traceback goes to a file that the line names."""
    [*_, command] = [note.removeprefix("command: ") for note in getattr(error, "__notes__", [])] or ["graft"]
    name, first = type(error).__name__, (str(error).splitlines() or [""])[0][:200]
    line = f"{command} failed: {name}: {first}. This is a bug in graft {__version__}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="graft-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"graft {__version__}, Python {sys.version}, arguments {sys.argv[1:]}\n")
            traceback.print_exception(error, file=file)
    except OSError as failure:
        return f"{line}; the traceback could not be written ({failure})"
    return f"{line}; please report it with the traceback in {file.name}"
