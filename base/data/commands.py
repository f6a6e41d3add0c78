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
        list[str],
        typer.Argument(
            help="Text, JSON, JSONL or Parquet files (gzip and zstd too), folders, globs, or Hugging Face ids."
        ),
    ],
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
    out: Annotated[Path, typer.Option(help="Folder to write: train-*.bin, val-*.bin, meta.json.")],
    val_fraction: Annotated[float, typer.Option(help="Share of the tokens that validates.")] = 0.01,
    val: Annotated[
        list[str] | None, typer.Option(help="What validates instead of a share: files as above; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the documents that validate.")] = 0,
    field: Annotated[str, typer.Option(help="Which field of JSON and Parquet rows holds the text.")] = "text",
    workers: Annotated[int | None, typer.Option(help="Processes that encode; by size when not given.")] = None,
    errors: Errors = "strict",
    on_bad: Annotated[
        str,
        typer.Option(help="Rows that give no text: error stops at the first, skip leaves them out and counts them."),
    ] = "error",
    force: Annotated[bool, typer.Option("--force", help="Replace finished token shards.")] = False,
) -> None:
    """Encode files into memory-mapped token shards.

    Example: graft data prepare book.txt --tokenizer tokenizer --out data
    """
    from rich import print as show
    from rich.markup import escape

    from ..text.documents import ReadCounts
    from ..text.progress import progress_bar
    from ..tokenizer.tokenizer import Tokenizer
    from .shards import prepare as run_prepare

    if on_bad not in ("error", "skip"):
        raise ValueError(f"--on-bad is {on_bad!r}; choose error or skip")
    counts = ReadCounts()
    with progress_bar() as progress:
        meta = run_prepare(
            paths,
            Tokenizer.load(tokenizer),
            out,
            val_fraction=val_fraction,
            val_paths=val or (),
            seed=seed,
            workers=workers,
            field=field,
            errors=check_errors(errors),
            on_bad=on_bad,
            counts=counts,
            force=force,
            progress=progress,
        )
    for split, entry in meta["splits"].items():
        ratio = entry["n_bytes"] / max(1, entry["n_tokens"])
        show(
            f"[bold]{split}[/bold]: {entry['n_tokens']:,} tokens from {entry['n_documents']:,} documents, "
            f"{ratio:.2f} bytes a token"
        )
    if n := meta["n_val_in_train"]:
        n_val = meta["splits"]["val"]["n_documents"]
        show(
            f"[yellow]{n:,} of the {n_val:,} documents that validate are among the training documents as well, word for "
            "word: the validation loss is too good[/yellow]"
        )
    for line in counts.lines():
        show(f"[yellow]{escape(line)}[/yellow]")
    show(escape(f"Train on it: graft pretrain --data {out} --tokenizer {tokenizer} --out run"))
