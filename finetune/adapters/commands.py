"""`graft adapter`: what lies in adapter folders, merging them into one or into their base, and making one out of two models."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback()
def adapter() -> None:
    """List, show, merge and extract adapters (PEFT folders)."""


@app.command("list")
def list_adapters(
    folder: Annotated[Path, typer.Argument(help="Folder that holds adapter folders, at any depth.")] = Path(),
) -> None:
    """List the adapters below a folder.

    Example: graft adapter list runs/demo/adapters
    """
    from rich.console import Console
    from rich.table import Table

    from ...base.text.printable import markup
    from ..data.records import join_errors
    from .files import CONFIG, read_adapter

    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist")
    folders = sorted(path.parent for path in folder.rglob(CONFIG))
    if not folders:
        raise ValueError(f"no adapter ({CONFIG}) lies below {folder}")
    table = Table()
    for column in ("adapter", "rank", "alpha", "linears", "beside LoRA", "bytes", "base"):
        table.add_column(column, overflow="fold")
    unreadable = []
    for path in folders:
        try:
            one = read_adapter(path)
        except (ValueError, OSError) as error:
            unreadable.append(str(error))
            continue
        alpha = markup(one.config.get("lora_alpha")) if one.layers else ""
        linears = str(len(one.layers)) if one.layers else ""
        base = markup(one.config.get("base_model_name_or_path"))
        ranks = ", ".join(map(str, one.ranks))
        table.add_row(markup(path), ranks, alpha, linears, markup(one.beyond_lora or ""), f"{one.n_bytes:,}", base)
    if table.row_count:
        Console().print(table)
    if unreadable:
        raise ValueError(f"{len(unreadable)} of {len(folders)} adapters can't be read: {join_errors(unreadable)}")


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Adapter folder.")],
    every: Annotated[bool, typer.Option("--all", help="A line for each linear, with its shapes.")] = False,
) -> None:
    """Show an adapter's config, the size of its update by layer and kind of linear, and what it has beside those.

    Example: graft adapter show runs/demo/adapters/spam
    """
    from rich.console import Console

    from ...base.text.printable import markup
    from .files import read_adapter
    from .norms import beside_pairs, every_linear, summary

    one = read_adapter(folder)
    console = Console()
    for key in ("base_model_name_or_path", "peft_type", "r", "lora_alpha", "target_modules", "use_rslora"):
        if key in one.config:
            console.print(f"{key}: {markup(one.config[key])}", highlight=False)
    for key, value in one.graft.items():
        console.print(f"{markup(key)}: {markup(value)}", highlight=False)
    if one.layers:
        console.print(every_linear(one) if every else summary(one))
    for line in beside_pairs(one):
        console.print(markup(line), highlight=False)
    console.print(f"{len(one.layers)} linears, {one.n_bytes:,} bytes", highlight=False)


Text = Annotated[
    Path | None,
    typer.Option("--text", help=r"Held-out text or records to compare predictions on. \[default: a few prompts]"),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what the folder holds.")]
AllowDrift = Annotated[bool, typer.Option("--allow-drift", help="Write it even if its predictions differ by more.")]


@app.command()
def merge(
    base: Annotated[Path, typer.Option("--base", help="The model folder that the adapters were made for.")],
    adapter: Annotated[list[Path], typer.Option("--adapter", help="Adapter folder; can be repeated.")],
    out: Annotated[Path, typer.Option("--out", help="New folder.")],
    weights: Annotated[
        str | None, typer.Option("--weights", help=r"One for each adapter, such as 0.7,0.3. \[default: equal]")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="Of several: cat (exact), linear, ties or dare (of equal ranks).")
    ] = "cat",
    into: Annotated[
        str | None,
        typer.Option("--into", help=r"base: a model; adapter: one adapter. \[default: base; of several: adapter]"),
    ] = None,
    density: Annotated[float, typer.Option("--density", help="ties, dare: share of the numbers that stay.")] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="dare: which numbers stay.")] = 0,
    any_sum: Annotated[bool, typer.Option("--any-sum", help="Weights need not add up to 1.")] = False,
    text: Text = None,
    force: Force = False,
    allow_drift: AllowDrift = False,
) -> None:
    """Fold an adapter into its base's weights, or several into one adapter or into the base.

    Example: graft adapter merge --base runs/demo/base --adapter runs/demo/adapters/spam --out runs/spam-merged
    """
    from .combine import run_combine
    from .merge import run_merge

    if density != 0.5 and method not in ("ties", "dare"):
        raise ValueError(f"--density {density:g} is about ties and dare; add --method, or leave it out")
    if seed and method != "dare":
        raise ValueError(f"--seed {seed} is about dare; add --method dare, or leave it out")
    if len(adapter) == 1 and weights is None and method == "cat" and into in (None, "base"):
        report, drift = run_merge(base, adapter[0], out, text=text, force=force, allow_drift=allow_drift)
        if report.relative_error:
            typer.echo(
                f"the base is in 4 bits: requantizing lost up to {report.relative_error:.1%} of a layer's update"
            )
        typer.echo(drift.sentence())
        typer.echo(f"merged {report.n_layers} layers, written to {out}")
        return
    found = run_combine(
        base=base,
        adapters=adapter,
        weights=None if weights is None else _numbers(weights),
        method=method,
        out=out,
        into=into or ("base" if len(adapter) == 1 else "adapter"),
        density=density,
        seed=seed,
        text=text,
        any_sum=any_sum,
        allow_drift=allow_drift,
        force=force,
    )
    shares = " + ".join(
        f"{weight:g} x {name}" for weight, name in zip(found["weights"], found["adapters"], strict=True)
    )
    typer.echo(f"{found['method']}, rank {found['rank']}: {shares}")
    typer.echo(
        f"against the weighted sum of the updates on {found['n_tokens']} tokens: KL {found['kl']:.2e} nats a token, "
        f"{found['equal_tokens']:.1%} of greedy tokens equal"
    )
    typer.echo(f"written to {out}")


def _numbers(text: str) -> list[float]:
    """'0.7,0.3' -> [0.7, 0.3]. Raises ValueError for what is no number."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights {text!r} are no numbers; write for example 0.7,0.3") from None


@app.command()
def extract(
    base: Annotated[Path, typer.Option("--base", help="Model folder.")],
    tuned: Annotated[Path, typer.Option("--tuned", help="The same model after full fine-tuning.")],
    out: Annotated[Path, typer.Option("--out", help="New adapter folder.")],
    rank: Annotated[int, typer.Option("--rank", help="Of the adapter.")] = 16,
    targets: Annotated[str, typer.Option("--targets", help="Linears to cover, such as q_proj,v_proj.")] = "all-linear",
    text: Text = None,
    force: Force = False,
    allow_drift: AllowDrift = False,
) -> None:
    """Write the difference of two models as an adapter of the first: the best one of that rank.

    Example: graft adapter extract --base runs/demo/base --tuned runs/tuned --out runs/difference --rank 16
    """
    from .extract import run_extract

    names = tuple(name.strip() for name in targets.split(",") if name.strip())
    found = run_extract(
        base=base, tuned=tuned, out=out, rank=rank, targets=names, text=text, force=force, allow_drift=allow_drift
    )
    typer.echo(f"rank {rank} keeps {found['kept']:.1%} of the squared difference, least of {found['least_kept']}")
    if found["left_out"]:
        shown = ", ".join(found["left_out"][:3])
        typer.echo(f"{len(found['left_out'])} weights differ and are no linears that were asked for: {shown}, ...")
    typer.echo(
        f"base + adapter against {tuned} on {found['n_tokens']} tokens: KL {found['kl']:.2e} nats a token, "
        f"{found['equal_tokens']:.1%} of greedy tokens equal"
    )
    typer.echo(f"written to {out}")
