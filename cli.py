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
from .base.text.printable import markup, printable
from .base.tokenizer.tools.commands import app as tokenizer_app
from .finetune.adapters.commands import app as adapter_app
from .finetune.align import commands as align
from .finetune.data.commands import inspect as inspect_records
from .finetune.memory.commands import plan, vram_app
from .finetune.serve.commands import serve

# The pipeline's order; --help lists the commands so, in panels.
ORDER = {
    "1. Try it": ("demo",),
    "2. Text to tokens": ("tokenizer", "data"),
    "3. Train": ("plan", "config", "pretrain", "sft", "quantize"),
    "4. Align": ("dpo", "reward", "grpo", "ppo"),
    "5. Use": ("generate", "chat", "serve", "adapter", "eval"),
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
app.command("plan", rich_help_panel=PANEL["plan"])(plan)
app.command("dpo", rich_help_panel=PANEL["dpo"])(align.dpo)
app.command("grpo", rich_help_panel=PANEL["grpo"])(align.grpo)
app.command("serve", rich_help_panel=PANEL["serve"])(serve)
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
OnTooLong = Annotated[
    str | None,
    typer.Option("--on-too-long", help=r"Rows beyond the limit: auto, cut, drop, split or error. \[default: auto]"),
]
OnEmpty = Annotated[
    str | None, typer.Option("--on-empty", help=r"Null or empty rows: drop or error. \[default: error]")
]
SpecialTokens = Annotated[
    str | None, typer.Option("--special-tokens", help=r"Those that the data spells: text or tokens. \[default: text]")
]
ChatTemplateName = Annotated[
    str | None, typer.Option("--chat-template", help=r"Name or file of a template. \[default: the model's own]")
]
TemplateArg = Annotated[
    list[str] | None, typer.Option("--template-arg", help="key=value for the template; can be repeated.")
]
Field = Annotated[
    list[str] | None, typer.Option("--field", help="Other field names, such as prompt=question; can be repeated.")
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
                "key", "type", "default", "meaning", title=markup(f"graft {name}: [{part}]"), title_justify="left"
            )
            for key in described:
                table.add_row(*(markup(key[column]) for column in ("name", "type", "default", "meaning")))
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
    _print_summary(out, summary)


@app.command(rich_help_panel=PANEL["sft"])
def sft(
    base: Annotated[Path | None, typer.Option("--base", help="Model folder in Hugging Face's layout.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", help="Records (JSON, JSONL, CSV, Parquet): file, folder or glob, =WEIGHT; can be repeated."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the result; must be new, or use --resume or --force.")
    ] = None,
    config: Config = None,
    jobs: Annotated[
        Path | None,
        typer.Option("--jobs", help="TOML of [defaults] and [[jobs]]: many adapters at once on one base."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", help="key=value,value,...: train the grid at once, keep the best; can be repeated."),
    ] = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="With --sweep: drop the worse half again and again on the way.")
    ] = False,
    at_once: Annotated[
        int | None, typer.Option("--at-once", help="Adapters in training at a time, with --jobs or --sweep.")
    ] = None,
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
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="With --lora or --qlora: go on from this adapter.")
    ] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option("--eval-data", help="Held-out records for a validation loss; can be repeated.")
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option("--max-seq-len", help=r"Tokens a record may have. \[default: the base's]")
    ] = None,
    on_too_long: OnTooLong = None,
    on_empty: OnEmpty = None,
    special_tokens: SpecialTokens = None,
    chat_template: ChatTemplateName = None,
    template_arg: TemplateArg = None,
    field: Field = None,
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
    from .finetune.data.commands import parse_fields, parse_template_args
    from .finetune.sft import run_sft

    if lora and qlora:
        raise ValueError("--lora and --qlora exclude each other; QLoRA is LoRA on a base in 4 bits")
    names = [t.strip() for t in targets.split(",") if t.strip()] if targets else None
    lora_keys = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": names}
    loop = {"seed": seed, "steps": steps, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    given = _settings(
        config,
        settings,
        **lora_keys,
        **loop,
        quant_backend=quant_backend,
        max_seq_len=max_seq_len,
        on_too_long=on_too_long,
        on_empty=on_empty,
        special_tokens=special_tokens,
        chat_template=chat_template,
        template_args=parse_template_args(template_arg) if template_arg else None,
        fields=parse_fields(field) if field else None,
    )
    flag = "lora" if lora else "qlora" if qlora else None
    method = given.pop("method", None)
    if flag is not None and method not in (None, flag):
        raise ValueError(f"--{flag} and method={method!r} contradict each other; give one")
    if jobs is not None or sweep:
        from .finetune.sweep import many_from_flags

        if len(data or []) > 1 or len(eval_data or []) > 1:
            raise ValueError(
                "--sweep and --jobs take one file of records each; join them into one, or name them by job"
            )
        many_from_flags(
            jobs=jobs,
            sweep=sweep or [],
            halving=halving,
            at_once=at_once,
            base=base,
            data=Path(data[0]) if data else None,
            out=out,
            eval_data=Path(eval_data[0]) if eval_data else None,
            method=None if flag is None and method is None else str(flag or method),
            settings=given,
            resume=resume,
            force=force,
            device=device,
        )
        return
    if halving or at_once is not None:
        raise ValueError("--halving and --at-once are about many adapters; add --sweep or --jobs, or leave them out")
    if base is None or not data or out is None:
        missing = next(flag for flag, value in (("--base", base), ("--data", data), ("--out", out)) if value is None)
        raise ValueError(f"{missing} is missing; graft sft needs --base, --data and --out, or --jobs FILE")
    method = str(flag or method or "full")
    if method == "full":
        for name, value in {**lora_keys, "adapter": adapter}.items():
            if value is not None:
                raise ValueError(f"--{name} is about an adapter; add --lora or --qlora, or leave it out")
    summary = run_sft(
        base=base,
        data=data,
        out=out,
        method=method,
        settings=given,
        eval_data=eval_data or None,
        adapter=adapter,
        resume=resume,
        force=force,
        device=device,
    )
    _print_summary(out, summary)


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


@app.command(rich_help_panel=PANEL["generate"])
def generate(
    base: Base,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to go on from; - reads it from stdin; can be repeated.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="A prompt a line; in .jsonl a JSON string each.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Adapter folder in PEFT's layout.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p")] = None,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: what was said becomes less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A string that ends a text; can be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    speculate: Annotated[
        str | None, typer.Option("--speculate", help="Guess tokens ahead: ngram, or the folder of a small model.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help=r"As a turn of a chat, or not. \[default: as trained]"),
    ] = None,
    chat_template: ChatTemplateName = None,
    template_arg: TemplateArg = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object for each prompt: text, how it ended, log-probabilities.")
    ] = False,
) -> None:
    """Continue prompts, with or without an adapter.

    Example: graft generate --base runs/demo/base --prompt "def main" --max-new-tokens 40
    """
    import json

    from .base.generate.sampling import Sampling
    from .finetune.data.commands import parse_template_args
    from .finetune.session import Session

    prompts = _prompts(prompt or [], prompt_file)
    sampling = Sampling(
        temperature, top_k, top_p, min_p, max_new_tokens, seed=seed, repetition_penalty=repetition_penalty
    )
    args = parse_template_args(template_arg) if template_arg else None
    session = Session(base, dtype=dtype, device=device, chat=chat, chat_template=chat_template, template_args=args)
    if speculate is not None:
        session.speculate(speculate, dtype=dtype, device=device)
    if adapter is not None:
        session.load(adapter.name or "adapter", adapter)
    talks: list[list[dict[str, object]]] = [[{"role": "user", "content": text}] for text in prompts]
    stops = stop or []
    if len(talks) == 1 and not as_json:
        session.answer(talks[0], sampling=sampling, stop=stops, on_text=lambda piece: _write(piece))
        _write("\n")
        return
    for text, one, answer in zip(prompts, talks, session.answers(talks, sampling=sampling, stop=stops), strict=True):
        if as_json:
            figures = {"prompt": text, "text": answer.text, "finished": answer.finished, "n_tokens": len(answer.ids)}
            log_p = [round(value, 6) for value in session.log_probabilities(one, answer.ids)]
            _write(json.dumps({**figures, "log_probabilities": log_p}, ensure_ascii=False) + "\n")
        else:
            _write(f"{text}\n{answer.text}\n\n")


def _prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of --prompt and --prompt-file, in this order. Raises ValueError without any."""
    import json

    prompts = [sys.stdin.read() if text == "-" else text for text in given]
    if file is not None:
        if not (file == Path("-") or file.is_file()):
            raise FileNotFoundError(f"--prompt-file {file} does not exist or is not a regular file")
        try:
            lines = (sys.stdin.read() if file == Path("-") else file.read_text(encoding="utf-8")).split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {file}: not UTF-8 at byte {error.start}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line) if file.suffix == ".jsonl" else line
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file} line {number}: not JSON ({error})") from None
            value = value.get("prompt") if isinstance(value, dict) else value
            if not isinstance(value, str):
                raise ValueError(f"{file} line {number}: expected a JSON string, or an object with a string prompt")
            prompts.append(value)
    if not prompts:
        raise ValueError("no prompt given; use --prompt TEXT, --prompt - or --prompt-file FILE with at least one line")
    return prompts


@app.command(rich_help_panel=PANEL["chat"])
def chat(
    base: Base,
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help="NAME=DIR; can be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 128,
    temperature: Annotated[float, typer.Option("--temperature")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty")] = 1.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    chat_template: ChatTemplateName = None,
    template_arg: TemplateArg = None,
    dtype: Annotated[str, typer.Option("--dtype")] = "float32",
    device: Device = "auto",
) -> None:
    """Talk to a base; /adapter NAME swaps, /adapters lists, /base turns them off, /quit ends.

    The first --adapter is in use at the beginning. A line becomes a turn of a conversation, or a prompt of the shape that
    the adapter learned.

    Example: graft chat --base runs/demo/base --adapter spam=runs/demo/adapters/spam
    """
    from .base.generate.sampling import Sampling
    from .finetune.data.commands import parse_template_args
    from .finetune.session import Session, named_folders, talk

    sampling = Sampling(
        temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed, repetition_penalty=repetition_penalty
    )
    args = parse_template_args(template_arg) if template_arg else None
    session = Session(base, dtype=dtype, device=device, chat=None, chat_template=chat_template, template_args=args)
    folders = named_folders(adapter or [])
    for name, folder in folders.items():
        session.load(name, folder)
    session.use(next(iter(folders), None))
    talk(session, sampling)


@app.command("eval", rich_help_panel=PANEL["eval"])
def evaluate(
    base: Base,
    data: Annotated[
        list[str],
        typer.Option("--data", help="Records with answers (file, folder, glob), or a text file; can be repeated."),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="Adapter folder, or NAME=DIR; several are compared with the base."),
    ] = None,
    score: Annotated[
        str, typer.Option("--score", help="exact: the answer it writes; likelihood: its most probable of few answers.")
    ] = "exact",
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N records.")] = None,
    on_too_long: Annotated[
        str, typer.Option("--on-too-long", help="Prompts that leave no room for an answer: error or drop.")
    ] = "error",
    on_empty: Annotated[str, typer.Option("--on-empty", help="Null or empty rows: error or drop.")] = "error",
    special_tokens: Annotated[
        str, typer.Option("--special-tokens", help="Those that the data spells: text or tokens.")
    ] = "text",
    chat_template: ChatTemplateName = None,
    template_arg: TemplateArg = None,
    field: Field = None,
    dtype: Annotated[str, typer.Option("--dtype")] = "float32",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a base or adapters: loss, perplexity, bits a byte, right answers with their 95% interval, F1 for labels.

    Example: graft eval --base runs/demo/base --adapter runs/demo/adapters/spam --data runs/demo/data/spam/eval.jsonl
    """
    import json

    from .base.progress import counting
    from .finetune.data.commands import parse_fields, parse_template_args
    from .finetune.evaluate import compare

    folders = _adapter_folders(adapter or [])
    with counting("eval", shown=sys.stderr.isatty()) as observe:
        found = compare(
            base,
            data,
            folders,
            with_base=len(folders) != 1,
            limit=limit,
            dtype=dtype,
            device=device,
            progress=observe,
            score=score,
            on_too_long=on_too_long,
            on_empty=on_empty,
            special_tokens=special_tokens,
            fields=parse_fields(field) if field else None,
            chat_template=chat_template,
            template_args=parse_template_args(template_arg) if template_arg else None,
        )
    if len(found) == 1:
        [figures] = found.values()
        _print_figures(figures, as_json)
    elif as_json:
        typer.echo(json.dumps(found))
    else:
        _print_comparison(found)


def _adapter_folders(given: list[str]) -> dict[str, Path]:
    """Folders by name: NAME=DIR, or DIR under its own name. Raises ValueError for a name that comes twice."""
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            name, folder = Path(text).resolve().name, text
        if not name or name in folders:
            raise ValueError(f"--adapter {text}: the name {name!r} is empty or given twice; write NAME=DIR")
        folders[name] = Path(folder)
    return folders


def _print_comparison(found: dict[str, dict[str, Any]]) -> None:
    """A row for each adapter: counts, share with its interval, F1, loss."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    is_text = "accuracy" not in next(iter(found.values()))
    columns = (
        "adapter",
        "n",
        *(() if is_text else ("right", "accuracy", "95% interval", "macro-F1")),
        "loss",
        "perplexity",
        "bits a byte",
    )
    table = Table(*columns)
    for name, figures in found.items():
        cells = [escape(name), str(figures["n_documents" if is_text else "n_records"])]
        if not is_text:
            interval = f"{figures['accuracy_low']:.1%} to {figures['accuracy_high']:.1%}"
            f1 = f"{figures['f1_macro']:.4f}" if "f1_macro" in figures else ""
            cells += [str(figures["n_correct"]), f"{figures['accuracy']:.1%}", interval, f1]
        cells += [f"{figures[key]:.4f}" for key in ("loss", "perplexity", "bits_per_byte")]
        table.add_row(*cells)
    Console().print(table)


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
        table.add_row(*map(markup, row))
    Console().print(table)


def _write(text: str) -> None:
    """A model's text, at once: as it is into a file or pipe, without control characters onto a terminal."""
    sys.stdout.write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)
    sys.stdout.flush()


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
    """One line on standard error, then the exit code."""
    typer.echo(f"graft: {printable(message.replace(chr(10), ' '))}", err=True)
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
