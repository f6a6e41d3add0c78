"""`graft sft`: its options, and which of them go together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

# What every training command has.
Config = Annotated[Path | None, typer.Argument(help="TOML file with config keys; see graft config.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value for any config key; can be repeated.")]
Seed = Annotated[int | None, typer.Option("--seed", help=r"Decides weights, data order and dropout. \[default: 0]")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer updates.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")]
Force = Annotated[bool, typer.Option("--force", help="Start over in a folder that holds a run.")]

Recipe = Annotated[
    str | None, typer.Option("--recipe", help="Settings that fit a model and a GPU; graft config recipes lists them.")
]
Base = Annotated[
    Path | None, typer.Option("--base", help="Model folder in Hugging Face's layout, or an id: org/name, @REVISION.")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data", help="Records: file, folder, glob or Hugging Face id (org/name:split), =WEIGHT; can be repeated."
    ),
]
EvalData = Annotated[
    list[str] | None, typer.Option("--eval-data", help="Held-out records for a validation loss; can be repeated.")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for the result; must be new, or use --resume or --force.")
]
Jobs = Annotated[
    Path | None, typer.Option("--jobs", help="TOML of [defaults] and [[jobs]]: many adapters at once on one base.")
]
Sweep = Annotated[
    list[str] | None,
    typer.Option("--sweep", help="key=value,value,...: train the grid at once, keep the best; can be repeated."),
]
Halving = Annotated[bool, typer.Option("--halving", help="With --sweep: drop the worse half again and again.")]
AtOnce = Annotated[
    int | None, typer.Option("--at-once", help="Adapters in training at a time, with --jobs or --sweep.")
]
Fit = Annotated[
    bool,
    typer.Option("--fit", help="With --jobs or --sweep: say what they will need and how many fit; train nothing."),
]

# The adapter's.
Lora = Annotated[bool, typer.Option("--lora", help="Train an adapter on the frozen base.")]
Qlora = Annotated[bool, typer.Option("--qlora", help="Train an adapter on the base in 4 bits.")]
Rank = Annotated[int | None, typer.Option("--rank", help=r"Rank of the adapter. \[default: 16]")]
Alpha = Annotated[float | None, typer.Option("--alpha", help=r"The update is scaled by alpha / rank. \[default: 32]")]
Dropout = Annotated[
    float | None, typer.Option("--dropout", help=r"On the adapter's input, while training. \[default: 0]")
]
Targets = Annotated[
    str | None, typer.Option("--targets", help=r"Linears to adapt, such as q_proj,v_proj. \[default: all-linear]")
]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="With --lora or --qlora: go on from this adapter.")]
QuantBackend = Annotated[
    str | None, typer.Option("--quant-backend", help="With --qlora: graft or bitsandbytes, to compare.")
]
Calibrate = Annotated[
    Path | None, typer.Option("--calibrate", help="With --qlora: text file by which the 4-bit codes are chosen.")
]

# The records'.
MaxSeqLen = Annotated[
    int | None, typer.Option("--max-seq-len", help=r"Tokens a record may have. \[default: the base's]")
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
Packing = Annotated[
    bool | None, typer.Option("--packing/--no-packing", help=r"Several records in a row. \[default: one a row, padded]")
]
Streaming = Annotated[
    bool | None, typer.Option("--streaming/--no-streaming", help="Keep encoded records on disk, not in memory.")
]

# The loop's.
Epochs = Annotated[
    float | None, typer.Option("--epochs", help=r"Passes over the records, without --steps. \[default: 3]")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help=r"Records an update. \[default: 16]")]
LearningRate = Annotated[
    float | None, typer.Option("--learning-rate", "--lr", help=r"Peak rate. \[default: 5e-5, adapters 5e-4]")
]
Schedule = Annotated[
    str | None, typer.Option("--schedule", help=r"cosine, linear, constant or wsd. \[default: cosine]")
]
Warmup = Annotated[
    float | None, typer.Option("--warmup", help=r"Updates, or a share such as 0.03. \[default: a tenth, at most 20]")
]
WeightDecay = Annotated[float | None, typer.Option("--weight-decay", help=r"Of matrices. \[default: 0]")]
EvalEvery = Annotated[int | None, typer.Option("--eval-every", help=r"Updates between evaluations. \[default: 100]")]
SaveEvery = Annotated[int | None, typer.Option("--save-every", help=r"Updates between checkpoints. \[default: 200]")]
Keep = Annotated[
    str | None, typer.Option("--keep", help=r"Checkpoints: best,last=K,every=N; best: the result. \[default: last]")
]
BestBy = Annotated[
    str | None, typer.Option("--best-by", help=r"val_loss, val_accuracy or val_f1_macro. \[default: val_loss]")
]
Patience = Annotated[
    int | None, typer.Option("--patience", help=r"Evaluations without a better one that end the run. \[default: never]")
]
Log = Annotated[list[str] | None, typer.Option("--log", help="tensorboard or wandb, beside metrics.jsonl.")]


def sft(
    ctx: typer.Context,
    base: Base = None,
    data: Data = None,
    out: Out = None,
    config: Config = None,
    recipe: Recipe = None,
    jobs: Jobs = None,
    sweep: Sweep = None,
    halving: Halving = False,
    at_once: AtOnce = None,
    fit: Fit = False,
    lora: Lora = False,
    qlora: Qlora = False,
    rank: Rank = None,
    alpha: Alpha = None,
    dropout: Dropout = None,
    targets: Targets = None,
    adapter: Adapter = None,
    eval_data: EvalData = None,
    max_seq_len: MaxSeqLen = None,
    on_too_long: OnTooLong = None,
    on_empty: OnEmpty = None,
    special_tokens: SpecialTokens = None,
    chat_template: ChatTemplateName = None,
    template_arg: TemplateArg = None,
    field: Field = None,
    packing: Packing = None,
    streaming: Streaming = None,
    quant_backend: QuantBackend = None,
    calibrate: Calibrate = None,
    settings: Settings = None,
    seed: Seed = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    schedule: Schedule = None,
    warmup: Warmup = None,
    weight_decay: WeightDecay = None,
    eval_every: EvalEvery = None,
    save_every: SaveEvery = None,
    keep: Keep = None,
    best_by: BestBy = None,
    patience: Patience = None,
    log: Log = None,
    device: Device = "auto",
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Fine-tune a base on records: every weight by default, or an adapter with --lora or --qlora.

    Example: graft sft --base runs/demo/base --data runs/demo/data/spam/train.jsonl --out runs/spam --lora --steps 60
    """
    if lora and qlora:
        raise ValueError("--lora and --qlora exclude each other; QLoRA is LoRA on a base in 4 bits")
    given = _settings(ctx.params)
    base = base or (Path(str(given["base"])) if "base" in given else None)
    given.pop("base", None)
    method = _method(given.pop("method", None), "lora" if lora else "qlora" if qlora else None, recipe)
    logs = _as_names(given.pop("log", []))
    if jobs is not None or sweep:
        _refuse_of_one(adapter, logs, given)
        options = {
            "halving": halving,
            "at_once": at_once,
            "fit": fit,
            "device": device,
            "resume": resume,
            "force": force,
        }
        _many(jobs, sweep or [], base, data or [], out, eval_data or [], method, given, options)
        return
    if halving or at_once is not None or fit:
        raise ValueError(
            "--halving, --at-once and --fit are about many adapters; add --sweep or --jobs, or leave them out"
        )
    if base is None or not data or out is None:
        missing = next(flag for flag, value in (("--base", base), ("--data", data), ("--out", out)) if not value)
        raise ValueError(f"{missing} is missing; graft sft needs --base, --data and --out, or --jobs FILE")
    if (method or "full") == "full":
        for name in (*OF_ADAPTER, "adapter"):
            if ctx.params[name] is not None:
                raise ValueError(f"--{name} is about an adapter; add --lora or --qlora, or leave it out")
    from ..base.parallel.ranks import leave, ranks
    from .sft import run_sft

    summary = run_sft(
        base=base,
        data=data,
        out=out,
        method=method or "full",
        settings=given,
        eval_data=eval_data or None,
        adapter=adapter,
        log=logs,
        resume=resume,
        force=force,
        device=device,
    )
    if ranks().is_first:
        for name, value in summary.items():
            if value is not None:
                typer.echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
        typer.echo(f"written to {out}")
    leave()


# The flags that are keys of the config, by the key's name where that differs.
OF_ADAPTER = ("rank", "alpha", "dropout", "targets")
OF_RECORDS = (
    "max_seq_len", "on_too_long", "on_empty", "special_tokens", "chat_template", "packing", "streaming", "quant_backend",
)  # fmt: skip
OF_LOOP = (
    "seed", "steps", "epochs", "batch_size", "learning_rate", "schedule", "weight_decay", "eval_every", "keep", "best_by",
    "patience", "log",
)  # fmt: skip
OTHER_NAMES = {
    "save_every": "checkpoint_every",
    "warmup": "warmup_steps",
    "template_arg": "template_args",
    "field": "fields",
}


def _settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's keys, overridden by the TOML file's, by --set and by the flags that were given."""
    from ..base.settings import combine
    from .data.commands import parse_fields, parse_template_args
    from .recipes import read_recipe

    keys = {name: flags[name] for name in (*OF_ADAPTER, *OF_RECORDS, *OF_LOOP)}
    keys |= {key: flags[name] for name, key in OTHER_NAMES.items()}
    if keys["targets"]:
        keys["targets"] = [word.strip() for word in keys["targets"].split(",") if word.strip()]
    if (warmup := keys["warmup_steps"]) is not None and warmup >= 1 and warmup.is_integer():
        keys["warmup_steps"] = int(warmup)
    for key, parse in (("template_args", parse_template_args), ("fields", parse_fields)):
        keys[key] = parse(keys[key]) if keys[key] else None
    keys["log"] = keys["log"] or None
    keys["calibrate"] = str(flags["calibrate"]) if flags["calibrate"] else None
    recipe = read_recipe(flags["recipe"]) if flags["recipe"] else {}
    return recipe | combine(flags["config"], flags["settings"] or [], keys)


def _method(named: object, flag: str | None, recipe: str | None) -> str | None:
    """The method of --lora or --qlora, else the one that a file names. Raises ValueError where they differ."""
    if flag is not None and named not in (None, flag):
        where = f"--recipe {recipe}, whose method is {named}," if recipe else f"method={named!r}"
        raise ValueError(f"--{flag} and {where} contradict each other; give one")
    return flag or (None if named is None else str(named))


def _as_names(value: object) -> list[str]:
    """`log` in a TOML file: a name, or a list of them."""
    return [str(name) for name in value] if isinstance(value, list) else [str(value)]


def _refuse_of_one(adapter: Path | None, logs: list[str], settings: Mapping[str, Any]) -> None:
    """Raise ValueError for what only a single run does, so that many don't ignore it."""
    for name, value in (("--adapter", adapter), ("--log", ",".join(logs)), ("streaming", settings.get("streaming"))):
        if value:
            shown = f"{name}=true" if value is True else f"{name} {value}"
            raise ValueError(f"{shown} is about a single run; leave it out with --jobs or --sweep")


def _many(
    jobs: Path | None,
    sweep: list[str],
    base: Path | None,
    data: list[str],
    out: Path | None,
    eval_data: list[str],
    method: str | None,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Hand --jobs and --sweep to the trainer of many adapters."""
    from .many.commands import many_from_flags

    many_from_flags(
        jobs=jobs,
        sweep=sweep,
        base=base,
        data=data,
        out=out,
        eval_data=eval_data,
        method=method,
        settings=settings,
        **options,
    )
