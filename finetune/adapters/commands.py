"""`graft adapter`: what lies in adapter folders, and merging one into its base."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback()
def adapter() -> None:
    """List, show and merge LoRA adapters (PEFT folders)."""


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
    from .files import CONFIG, read_adapter

    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist")
    folders = sorted(path.parent for path in folder.rglob(CONFIG))
    if not folders:
        raise ValueError(f"no adapter ({CONFIG}) lies below {folder}")
    table = Table()
    for column in ("adapter", "rank", "alpha", "layers", "bytes", "base"):
        table.add_column(column, overflow="fold")
    for path in folders:
        one = read_adapter(path)
        ranks = ", ".join(map(str, one.ranks))
        alpha, base = (markup(one.config.get(key)) for key in ("lora_alpha", "base_model_name_or_path"))
        table.add_row(markup(path), ranks, alpha, str(len(one.layers)), f"{one.n_bytes:,}", base)
    Console().print(table)


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="Adapter folder.")]) -> None:
    """Show an adapter's config and, for each layer, its shape and the size of its update.

    Example: graft adapter show runs/demo/adapters/spam
    """
    from rich.console import Console
    from rich.table import Table

    from ...base.text.printable import markup
    from .files import read_adapter

    one = read_adapter(folder)
    console = Console()
    for key in ("base_model_name_or_path", "r", "lora_alpha", "target_modules", "use_rslora"):
        console.print(f"{key}: {markup(one.config.get(key))}", highlight=False)
    for key, value in one.graft.items():
        console.print(f"{markup(key)}: {markup(value)}", highlight=False)
    table = Table()
    for column in ("layer", "A", "B", "scale", "norm of scale * B A"):
        table.add_column(column, overflow="fold")
    for path, (a, b, scale) in one.layers.items():
        norm = scale * (b.float() @ a.float()).norm().item()
        table.add_row(
            markup(path), f"{a.shape[0]} x {a.shape[1]}", f"{b.shape[0]} x {b.shape[1]}", f"{scale:g}", f"{norm:.4f}"
        )
    console.print(table)
    console.print(f"{one.n_bytes:,} bytes", highlight=False)


@app.command()
def merge(
    base: Annotated[Path, typer.Option("--base", help="The model folder that the adapter was made for.")],
    adapter: Annotated[Path, typer.Option("--adapter", help="Adapter folder.")],
    out: Annotated[Path, typer.Option("--out", help="New model folder.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the model that the folder holds.")] = False,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Write the result even if its predictions differ from base + adapter.")
    ] = False,
) -> None:
    """Fold an adapter into its base's weights and write a model folder that needs no adapter.

    Example: graft adapter merge --base runs/demo/base --adapter runs/demo/adapters/spam --out runs/spam-merged
    """
    from .merge import run_merge

    report, drift = run_merge(base, adapter, out, force=force, allow_drift=allow_drift)
    if report.relative_error:
        typer.echo(f"the base is in 4 bits: requantizing lost up to {report.relative_error:.1%} of a layer's update")
    typer.echo(
        f"against base + adapter on {drift.n_tokens} tokens: KL {drift.kl:.2e} nats a token, "
        f"{drift.equal_greedy:.1%} of greedy tokens equal"
    )
    typer.echo(f"merged {report.n_layers} layers, written to {out}")
