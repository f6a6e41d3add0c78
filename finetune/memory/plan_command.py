"""`graft plan`: one run's account; the best layouts over many GPUs; depth and tokens for a time budget on this machine."""

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ...base.model.config import ModelConfig


def plan(
    model: Annotated[
        str | None, typer.Option("--model", help="Preset, model folder or config.json; not with --budget alone.")
    ] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help=r"Such as 15e12. \[default: compute-optimal]")] = None,
    seq: Annotated[
        int | None, typer.Option("--seq", "--seq-len", help=r"Tokens a sequence. \[default: the model's longest]")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", "--gpu", help=r"a100, h100, h200 or rtx4090. \[default: h100]")
    ] = None,
    devices: Annotated[int, typer.Option("--devices", help="How many, in the account.")] = 1,
    gpus: Annotated[int | None, typer.Option("--gpus", help="Search the best layouts over so many, 8 a node.")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help=r"With --gpus: sequences a step. \[default: about 4M tokens]")
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            "--mfu",
            help=r"Share of the peak rate that is reached; with --gpus by a GPU alone. \[default: 0.4; a model]",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", help="Time, such as 20min: with --gpus its tokens; alone depth and tokens for this machine."
        ),
    ] = None,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="With --budget alone: of the tokenizer.")] = 8192,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Account for a pretraining run: parameters, FLOPs, days, bytes a parameter, arithmetic intensity.

    With --gpus the ten fastest layouts that fit, and what binds each; with --budget alone steps are timed on this machine.

    Example: graft plan --model llama-2-70b --tokens 15e12 --device h100 --devices 1024 --mfu 0.5
    """
    if budget is not None and tokens is not None:
        raise ValueError(f"--budget {budget} and --tokens {tokens} contradict each other; give one")
    if gpus is None and batch is not None:
        raise ValueError(f"--batch {batch} goes with --gpus, the search of layouts; leave it out")
    if budget is not None and gpus is None:
        unused = {"--model": model, "--seq": seq, "--device": device, "--mfu": mfu}
        if given := [f"{flag} {value}" for flag, value in unused.items() if value is not None]:
            raise ValueError(
                f"--budget without --gpus is about this machine's own recipe; leave out {', '.join(given)}"
            )
        _print_budget(budget, vocab_size, as_json)
        return
    if model is None:
        raise ValueError("--model is missing: a preset, a model folder or a config.json; or give --budget alone")
    from .settings import read_model_config

    config = read_model_config(model)
    try:
        n_tokens = None if tokens is None else float(tokens)
    except ValueError:
        raise ValueError(f"--tokens {tokens!r} is no number; write for example 15e12") from None
    if gpus is not None:
        _print_layouts(model, config, gpus, n_tokens, budget, batch, seq, device or "h100", mfu, as_json)
    else:
        _print_account(model, config, n_tokens, seq, device or "h100", devices, 0.4 if mfu is None else mfu, as_json)


def _print_account(
    model: str,
    config: "ModelConfig",
    n_tokens: float | None,
    seq: int | None,
    device: str,
    devices: int,
    mfu: float,
    as_json: bool,
) -> None:
    from ...base.plan import make_plan

    planned = make_plan(config, n_tokens=n_tokens, seq_len=seq, device=device, n_devices=devices, mfu=mfu)
    if as_json:
        _print_json(planned.to_dict())
        return
    from rich.console import Console
    from rich.table import Table

    from ...base.text.printable import markup
    from .units import say_bytes, say_seconds

    table = Table(
        title=f"{markup(model)} on {planned.n_devices} x {planned.device} at {planned.mfu:.0%} of its rate",
        show_header=False,
    )
    rows = {
        "parameters": f"{planned.n_params:,}",
        "tokens": f"{planned.n_tokens:.3g} (compute-optimal: {planned.optimal_tokens:.3g})",
        "FLOPs a token": f"{planned.flops_per_token:.3e} ({planned.attention_share:.1%} attention)",
        "FLOPs": f"{planned.flops:.3e}",
        "time": say_seconds(planned.seconds),
        "time without attention (6N a token)": say_seconds(planned.seconds * (1 - planned.attention_share)),
        **{
            f"bytes, {name}": f"{say_bytes(n)} ({n // planned.n_params} a parameter)"
            for name, n in planned.state_bytes.items()
        },
        "FLOPs a byte": f"{planned.intensity_training:.0f} training, {planned.intensity_decoding:.2f} decoding, "
        f"{planned.intensity_needed:.0f} needed",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _print_layouts(
    model: str,
    config: "ModelConfig",
    gpus: int,
    n_tokens: float | None,
    budget: str | None,
    batch: int | None,
    seq: int | None,
    device: str,
    mfu: float | None,
    as_json: bool,
) -> None:
    from rich.console import Console
    from rich.table import Table

    from ...base.plan import compute_optimal_tokens
    from ...base.text.printable import markup
    from .layout_search import default_batch, find_layouts
    from .units import parse_seconds, say_bytes, say_seconds

    seq_len = seq or config.max_seq_len
    batch = default_batch(gpus, seq_len) if batch is None else batch
    wanted = compute_optimal_tokens(config.n_active_params) if n_tokens is None else n_tokens
    with Console(stderr=True).status("predicting memory") as status:
        found = find_layouts(
            config,
            n_gpus=gpus,
            n_tokens=wanted,
            batch=batch,
            seq_len=seq_len,
            device=device,
            mfu=mfu,
            on_try=lambda one: status.update(f"predicting memory of {one.mesh}, ZeRO {one.zero}"),
        )
    time_s = None if budget is None else parse_seconds(budget)
    if time_s is not None:
        wanted = found[0].tokens_per_s * time_s
    if as_json:
        layouts = [one.to_dict() for one in found]
        _print_json({"n_gpus": gpus, "batch": batch, "seq_len": seq_len, "n_tokens": wanted, "layouts": layouts})
        return
    heading = f"{model}, {config.n_params:,} parameters, on {gpus} x {device}: {wanted:.3g} tokens"
    heading += f" in {say_seconds(time_s)}" if time_s else ""
    print(f"{heading}, {batch} sequences of {seq_len} tokens a step")
    names = (
        "mesh",
        "ZeRO",
        "micro",
        "recompute",
        "parts",
        "memory",
        "step",
        "MFU",
        "time",
        "compute / network / bubble",
    )
    table = Table(*names, "bound by", box=None)
    for one in found:
        t = one.time
        shares = (t.compute + t.update, t.network, t.bubble)
        table.add_row(
            *(markup(one.layout.mesh), str(one.layout.zero), str(one.layout.micro_batch)),
            *("yes" if one.layout.recompute else "no", str(one.layout.chunks), say_bytes(one.memory_bytes)),
            *(f"{t.total:.2f} s", f"{one.mfu:.1%}", say_seconds(wanted / one.tokens_per_s)),
            *(" / ".join(f"{share / t.total:.0%}" for share in shares), one.bound_by),
        )
    Console(width=max(140, Console().width)).print(table)
    print(f"the fastest: --set mesh={found[0].layout.mesh} --set zero={found[0].layout.zero}")


def _print_budget(budget: str, vocab_size: int, as_json: bool) -> None:
    from functools import partial

    from rich.console import Console
    from rich.table import Table

    from ...base.budget import plan_budget, time_steps
    from ...base.device import explain_device, resolve_device
    from ...base.recipe import model_at
    from ...base.run import TrainConfig
    from .predict import predict_run
    from .units import parse_seconds, say_bytes, say_seconds

    seconds, device = parse_seconds(budget), resolve_device()
    with Console(stderr=True).status("timing steps"):
        planned = plan_budget(seconds, vocab_size=vocab_size, timer=partial(time_steps, device=device))
    model = model_at(planned.depth, vocab_size)
    train = TrainConfig(**planned.settings)
    peak = predict_run(
        model, method="full", train=train, seq_len=model.max_seq_len, optimizer=train.optimizer, device=device
    )
    command = f"graft pretrain --depth {planned.depth} --steps {train.steps} --batch-size {train.batch_size}"
    command += f" --lr {train.learning_rate:.4g} --data {shlex.quote('TOKENS')} --tokenizer TOKENIZER --out RUN"
    if as_json:
        _print_json(
            {**planned.to_dict(), "budget_s": seconds, "peak_bytes": peak, "device": device, "command": command}
        )
        return
    table = Table("depth", "parameters", "tokens/s", "FLOP/s", title=f"timed now, {explain_device('auto', device)}")
    for one in planned.measured:
        table.add_row(str(one.depth), f"{one.n_params:,}", f"{one.tokens_per_s:,.0f}", f"{one.flops_per_s:.3g}")
    Console().print(table)
    print(
        f"depth {planned.depth}: {planned.n_params:,} parameters, {planned.n_tokens:,} tokens "
        f"({planned.tokens_per_param:.1f} a parameter) in {train.steps:,} steps, {say_seconds(planned.seconds)}, "
        f"peak {say_bytes(peak)} of tensors"
    )
    print(command)


def _print_json(figures: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(figures))
