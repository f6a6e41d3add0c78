"""`graft vram estimate` and `graft vram measure`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from .measure import MemoryMeasure
    from .predict import MemoryEstimate
    from .settings import MemorySettings

vram_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Predict a run's memory before it starts, and measure the prediction.",
)

Model = Annotated[str, typer.Option("--model", help="Preset, model folder or config.json.")]
MethodOption = Annotated[
    str | None,
    typer.Option("--method", help=r"full, lora, qlora, generate, dpo, reward, grpo or ppo. \[default: the first four]"),
]
Weights = Annotated[str, typer.Option("--weights", help="What trains in dpo, reward, grpo, ppo: full, lora or qlora.")]
Batch = Annotated[int, typer.Option("--batch", help="Sequences an update; dpo, reward: pairs.")]
MicroBatch = Annotated[int | None, typer.Option("--micro-batch", help=r"Sequences at once. \[default: the batch]")]
Seq = Annotated[
    int | None, typer.Option("--seq", help=r"Tokens a sequence. \[default: 512, or the model's longest if less]")
]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the arithmetic: bfloat16, float16 or float32.")]
OptimizerOption = Annotated[str, typer.Option("--optimizer", help="adamw, adamw8bit or soap; muon with --method full.")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing/--no-checkpointing", help="Recompute activations.")]
Rank = Annotated[int, typer.Option("--rank", help="Of LoRA's adapters.")]
Targets = Annotated[str, typer.Option("--targets", help="Linears with an adapter, such as q_proj,v_proj.")]
DoubleQuant = Annotated[bool, typer.Option("--double-quant/--no-double-quant", help="Quantize the constants too.")]
AdapterSettings = Annotated[
    list[str] | None, typer.Option("--set", help="key=value of the adapter, such as use_dora=true; can be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

# Bars of the picture: label -> method and whether the constants are quantized too.
BARS = {
    "full": ("full", True),
    "LoRA": ("lora", True),
    "QLoRA": ("qlora", True),
    "QLoRA, no DQ": ("qlora", False),
}


@vram_app.command("estimate")
def estimate_command(
    model: Model,
    method: MethodOption = None,
    batch: Batch = 1,
    seq: Seq = None,
    micro_batch: MicroBatch = None,
    dtype: Dtype = "bfloat16",
    optimizer: OptimizerOption = "adamw",
    checkpointing: Checkpointing = True,
    rank: Rank = 16,
    targets: Targets = "all-linear",
    double_quant: DoubleQuant = True,
    settings: AdapterSettings = None,
    weights: Weights = "lora",
    fit: Annotated[str | None, typer.Option("--fit", help="Search what fits into it, such as 24GiB.")] = None,
    device: Annotated[
        str, typer.Option("--device", help="Whose kernels: auto, cpu or cuda; no GPU is needed.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Predict the peak memory of a training step, with no GPU and without allocating the model.

    Example: graft vram estimate --model llama-7b --method qlora --device cuda
    """
    from ..stages import step_work
    from .predict import estimate
    from .settings import METHODS, read_model_config
    from .units import parse_bytes

    config = read_model_config(model)
    seq = min(512, config.max_seq_len) if seq is None else seq
    requested = _settings(
        method, batch, micro_batch, seq, dtype, optimizer, checkpointing, rank, targets, double_quant, settings, weights
    )
    if fit is not None:
        _print_fits(config, requested[0], parse_bytes(fit), [requested[0].method] if method else None, device, as_json)
        return
    methods = METHODS[:3] if method is None and seq > config.max_seq_len else METHODS
    estimates = [
        estimate(config, one, device=device, work=step_work(one)) for one in requested if one.method in methods
    ]
    if as_json:
        _print_json(estimates[0].to_dict() if method else {"estimates": [e.to_dict() for e in estimates]})
        return
    from rich.console import Console

    console = Console()
    heading, table = _estimate_table(model, estimates)
    console.print(heading, highlight=False, markup=False)
    console.print(table)
    if len(estimates) < len(requested):
        longest = f"the model's longest sequence is {config.max_seq_len:,}"
        console.print(f"generate is left out: {longest}, and training beyond it needs another config")
    for one in estimates:
        console.print(
            f"{one.settings.name}: peak {_bytes(one.peak_bytes)} in {one.peak_at}: {_parts(one)}", highlight=False
        )
    if method is not None and max(estimates[0].activations):
        kept = estimates[0].activations
        console.print(f"activations kept: {_bytes(sum(kept))}, {_bytes(max(kept))} a layer at most", highlight=False)


@vram_app.command("measure")
def measure_command(
    model: Model,
    method: MethodOption = None,
    batch: Batch = 1,
    seq: Seq = None,
    micro_batch: MicroBatch = None,
    dtype: Dtype = "bfloat16",
    optimizer: OptimizerOption = "adamw",
    checkpointing: Checkpointing = True,
    rank: Rank = 16,
    targets: Targets = "all-linear",
    double_quant: DoubleQuant = True,
    settings: AdapterSettings = None,
    weights: Weights = "lora",
    out: Annotated[Path, typer.Option("--out", help="The picture.")] = Path("vram.png"),
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Run one step with random weights, and set its measured peak beside the predicted one.

    Example: graft vram measure --model nano --seq 256 --batch 4 --out vram.png
    """
    from dataclasses import replace

    from ...base.device import resolve_device
    from ..stages import step_work
    from .measure import measure
    from .picture import memory_picture
    from .predict import estimate, fits
    from .settings import read_model_config

    device = resolve_device(device)
    config = read_model_config(model)
    seq = min(512, config.max_seq_len) if seq is None else seq
    base = _settings(
        method, batch, micro_batch, seq, dtype, optimizer, checkpointing, rank, targets, double_quant, settings, weights
    )[0]
    bars = {label: replace(base, method=m, double_quant=dq) for label, (m, dq) in BARS.items()}
    chosen = [base] if method else list(bars.values())
    estimates = {label: estimate(config, one, device=device, work=step_work(one)) for label, one in bars.items()}
    for one in chosen:
        warning = fits(device, estimate(config, one, device=device, work=step_work(one)).peak_bytes)
        if warning:
            raise ValueError(f"{one.method}: {warning}, or a smaller --model")
    measures = [measure(config, one, device=device, work=step_work(one)) for one in chosen]
    measured = {
        label: measure.measured_bytes
        for label, one in bars.items()
        for measure in measures
        if measure.predicted.settings == one
    }
    memory_picture(estimates, out, measured=measured, title=f"{model}, batch {batch}, sequence {seq}, {device}")
    if as_json:
        figures = [one.to_dict() for one in measures]
        _print_json({**(figures[0] if method else {"measures": figures}), "picture": str(out)})
        return
    from rich.console import Console

    console = Console()
    console.print(_measure_table(model, measures))
    console.print(f"picture: {out}", highlight=False, markup=False)


# --- printing -----------------------------------------------------------------------------------------------------


def _settings(
    method: str | None,
    batch: int,
    micro_batch: int | None,
    seq: int,
    dtype: str,
    optimizer: str,
    checkpointing: bool,
    rank: int,
    targets: str,
    double_quant: bool,
    settings: Sequence[str] | None,
    weights: str,
) -> "list[MemorySettings]":
    """Settings of the requested method, or of every method that isn't alignment. Raises ValueError for unknown names."""
    from ...base.settings import check_settings, parse_assignments
    from ..adapters.config import LoraConfig
    from .settings import METHODS, STAGES, MemorySettings

    stage = method if method in STAGES[1:] else "sft"
    if stage == "sft" and method is not None and method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose {', '.join((*METHODS, *STAGES[1:]))}")
    method = method if stage == "sft" else weights

    names = tuple(target.strip() for target in targets.split(",") if target.strip())
    given = check_settings(parse_assignments(settings or []), LoraConfig)
    plain = {"rank": rank, "targets": names} if given.get("adapter_kind", "lora") == "lora" else {}
    lora = LoraConfig(**plain | given)
    return [
        MemorySettings(
            one, batch, micro_batch, seq, dtype, optimizer, checkpointing, rank, names, double_quant, lora, stage
        )
        for one in ([method] if method else METHODS)
    ]


def _print_fits(
    config: Any, settings: "MemorySettings", budget: int, methods: Sequence[str] | None, device: str, as_json: bool
) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..stages import step_work
    from .fit import TRAINING, find_fits

    with Console(stderr=True).status("predicting") as status:
        fits = find_fits(
            config,
            settings,
            budget,
            methods=methods or TRAINING,
            device=device,
            work_of=step_work,
            on_try=lambda one: status.update(
                f"predicting {one.method}, batch {one.batch_size}, sequence {one.seq_len}"
            ),
        )
    if as_json:
        _print_json({"budget_bytes": budget, "fits": [fit.to_dict() for fit in fits]})
        return
    table = Table(title=f"what fits into {_bytes(budget)}")
    columns = (
        "method",
        "checkpointing",
        f"largest batch at {settings.seq_len} tokens",
        "its peak",
        f"longest sequence at batch {settings.batch_size}",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for fit in fits:
        peak = _bytes(fit.peak_bytes) + ("" if fit.batch_size else " for one")
        table.add_row(
            fit.method,
            "yes" if fit.checkpointing else "no",
            str(fit.batch_size or "none"),
            peak,
            f"{fit.longest_seq_len:,}" if fit.longest_seq_len else "none",
        )
    Console().print(table)
    works = next(fit for fit in fits if fit.batch_size or fit.longest_seq_len)
    how = f"{works.method} with{'' if works.checkpointing else 'out'} checkpointing"
    size = f"batch {works.batch_size}" if works.batch_size else f"sequences of {works.longest_seq_len}"
    typer.echo(f"the most thorough that fits: {how}, {size}")


def _estimate_table(model: str, estimates: "Sequence[MemoryEstimate]") -> "tuple[str, Table]":
    """A heading (a title would be folded to the table's width), and a table of the parts by method."""
    from rich.table import Table

    one = estimates[0]
    where = "a GPU" if one.device == "cuda" else "the CPU (--device cuda for a GPU's)"
    s = one.settings
    unit, in_units = (2**30, "GiB") if max(e.peak_bytes for e in estimates) >= 2**30 else (2**20, "MiB")
    heading = (
        f"{model}, {one.n_params:,} parameters: {in_units} of one step\n"
        f"batch {s.batch_size}, {s.seq_len} tokens, {s.dtype}, kernels of {where}"
    )
    table = Table()
    table.add_column("")
    for e in estimates:
        table.add_column(e.settings.name, justify="right")
    rows = {
        "weights": [e.weights for e in estimates],
        "adapters": [e.adapters for e in estimates],
        "gradients": [e.gradients for e in estimates],
        "optimizer": [e.optimizer for e in estimates],
        "activations": [sum(e.activations) for e in estimates],
        "cache": [e.cache for e in estimates],
    }
    for name, parts in rows.items():
        if any(parts):
            table.add_row(name, *(f"{part / unit:.2f}" if part else "" for part in parts))
    table.add_section()
    table.add_row("peak", *(f"{e.peak_bytes / unit:.2f}" for e in estimates))
    return heading, table


def _measure_table(model: str, measures: "Sequence[MemoryMeasure]") -> "Table":
    from rich.table import Table

    from ...base.text.printable import markup

    s = measures[0].predicted.settings
    table = Table(
        title=f"{markup(model)} on {measures[0].predicted.device}: batch {s.batch_size}, {s.seq_len} tokens, {s.dtype}"
    )
    for column in ("method", "predicted", "measured", "error", "peak at", "step"):
        table.add_column(column, justify="left" if column in ("method", "peak at") else "right")
    for measure in measures:
        p = measure.predicted
        name = p.settings.name + ("" if p.settings.double_quant else ", no DQ")
        error = f"{measure.error:+.2%}"
        table.add_row(
            name, _bytes(p.peak_bytes), _bytes(measure.measured_bytes), error, p.peak_at, f"{measure.seconds:.2f} s"
        )
    return table


def _parts(estimate: "MemoryEstimate") -> str:
    return ", ".join(f"{kind} {_bytes(n)}" for kind, n in estimate.at_peak.items() if n >= estimate.peak_bytes / 1000)


def _bytes(n: float) -> str:
    from .units import say_bytes

    return say_bytes(n)


def _print_json(figures: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(figures))
