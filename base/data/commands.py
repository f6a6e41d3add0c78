"""graft data: prepare."""

from pathlib import Path
from typing import Annotated

import typer

from ..tokenizer.tools.commands import Errors, check_errors

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback()
def data() -> None:
    """Turn raw text into what training reads."""


@app.command()
def prepare(
    paths: Annotated[
        list[Path], typer.Argument(help="Text, JSONL or parquet files, or folders of them; also gzipped.")
    ],
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
    out: Annotated[Path, typer.Option(help="Folder to write: train-*.bin, val-*.bin, meta.json.")],
    val_fraction: Annotated[float, typer.Option(help="Share of the tokens that validates.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Draws the documents that validate.")] = 0,
    field: Annotated[str, typer.Option(help="Which field of JSON and parquet rows holds the text.")] = "text",
    workers: Annotated[int | None, typer.Option(help="Processes that encode; by size when not given.")] = None,
    errors: Errors = "strict",
    force: Annotated[bool, typer.Option("--force", help="Replace finished token shards.")] = False,
) -> None:
    """Encode files into memory-mapped token shards.

    Example: graft data prepare book.txt --tokenizer tokenizer --out data
    """
    from rich import print as show
    from rich.markup import escape

    from ..text.progress import progress_bar
    from ..tokenizer.tokenizer import Tokenizer
    from .shards import prepare as run_prepare

    with progress_bar() as progress:
        meta = run_prepare(
            paths,
            Tokenizer.load(tokenizer),
            out,
            val_fraction=val_fraction,
            seed=seed,
            workers=workers,
            field=field,
            errors=check_errors(errors),
            force=force,
            progress=progress,
        )
    for split, entry in meta["splits"].items():
        ratio = entry["n_bytes"] / max(1, entry["n_tokens"])
        show(
            f"[bold]{split}[/bold]: {entry['n_tokens']:,} tokens from {entry['n_documents']:,} documents, "
            f"{ratio:.2f} bytes a token"
        )
    show(escape(f"Train on it: graft pretrain --data {out} --tokenizer {tokenizer} --out run"))
