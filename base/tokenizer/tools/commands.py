"""graft tokenizer: train, encode, decode, show, compare."""

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train a tokenizer, turn text into ids and back, and look at the tokens.",
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
Errors = Annotated[str, typer.Option(help="strict, or replace: what to do with bytes that are not UTF-8.")]
Folder = Annotated[Path, typer.Option("--tokenizer", help="Folder with tokenizer.json.")]


@app.command()
def train(
    paths: Annotated[
        list[Path], typer.Argument(help="Text, JSONL or parquet files, or folders of them; also gzipped.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens in all: 256 bytes, merges, special tokens.")] = 10_000,
    pattern: Annotated[str, typer.Option(help="gpt2, gpt4, llama3, qwen2, or a regular expression.")] = "gpt2",
    special: Annotated[list[str] | None, typer.Option(help="A special token; may be repeated.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that count words; by size when not given.")] = None,
    errors: Errors = "strict",
    force: Annotated[bool, typer.Option("--force", help="Replace a tokenizer that is there.")] = False,
) -> None:
    """Train a byte-level BPE tokenizer on files.

    Example: graft tokenizer train book.txt --vocab-size 1000 --out tokenizer
    """
    from rich import print as show
    from rich.markup import escape

    from ...text.progress import progress_bar
    from ..tokenizer import Tokenizer

    if (out / "tokenizer.json").exists() and not force:
        raise ValueError(f"{out} holds a tokenizer already; give another --out or pass --force")
    with progress_bar() as progress:
        tokenizer = Tokenizer.train(
            paths,
            vocab_size=vocab_size,
            pattern=pattern,
            special_tokens=SPECIAL_TOKENS if special is None else special,
            workers=workers,
            progress=progress,
            errors=check_errors(errors),
        )
    tokenizer.save(out)
    longest = max(tokenizer.definition.vocab.values(), key=len)
    spelt = escape(repr(longest.decode("utf-8", "replace")))
    show(f"[bold]{escape(str(out))}[/bold]: {tokenizer.vocab_size:,} tokens, the longest {spelt}")
    show(f"Look at it: graft tokenizer show --tokenizer {escape(str(out))} 'some text'")


def check_errors(errors: str) -> Literal["strict", "replace"]:
    """The --errors flag. Raises ValueError unless it is one of the two."""
    if errors not in ("strict", "replace"):
        raise ValueError(f"--errors is {errors!r}; choose strict or replace")
    return cast(Literal["strict", "replace"], errors)


@app.command()
def encode(
    text: Annotated[
        str | None, typer.Argument(help="The text; standard input when neither it nor --file is given.")
    ] = None,
    tokenizer: Folder = Path("tokenizer"),
    file: Annotated[Path | None, typer.Option(help="Encode this file.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the ids here as a .npy array instead of printing them.")
    ] = None,
    special: Annotated[bool, typer.Option("--special", help="Let special tokens in the text count as such.")] = False,
    errors: Errors = "strict",
) -> None:
    """Turn text into ids.

    Example: graft tokenizer encode --tokenizer tokenizer 'Hello world'
    """
    import os
    import sys

    import numpy as np

    from ...text.documents import checked
    from ..tokenizer import Tokenizer

    tok = Tokenizer.load(tokenizer)
    if file is not None:
        text = read_text(file, errors)
    elif text is None:
        text = checked(sys.stdin.buffer.read(), "standard input", 0, check_errors(errors)).decode()
    else:  # bytes that aren't UTF-8 come from the shell as surrogates
        text = checked(os.fsencode(text), "the text", 0, check_errors(errors)).decode()
    ids = tok.encode(text, allowed_special="all" if special else ())
    if out is None:
        print(" ".join(map(str, ids.tolist())))
    else:
        np.save(out, ids)


def read_text(file: Path, errors: str) -> str:
    """A UTF-8 file. Raises ValueError with the offset of a byte that isn't, unless errors is "replace"."""
    from ...text.documents import checked

    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist")
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; give a file")
    return checked(file.read_bytes(), file, 0, check_errors(errors)).decode()


@app.command()
def decode(
    ids: Annotated[list[int] | None, typer.Argument(help="The ids; standard input when there are none.")] = None,
    tokenizer: Folder = Path("tokenizer"),
) -> None:
    """Turn ids into text.

    Example: graft tokenizer decode --tokenizer tokenizer 72 105
    """
    import sys

    from ..tokenizer import Tokenizer

    words = sys.stdin.read().split() if ids is None else ids
    try:
        numbers = [int(word) for word in words]
    except ValueError as error:
        raise ValueError(f"ids are whole numbers with blanks between them ({error})") from None
    print(Tokenizer.load(tokenizer).decode(numbers))


@app.command()
def show(
    text: Annotated[str, typer.Argument(help="The text.")],
    tokenizer: Folder = Path("tokenizer"),
    special: Annotated[bool, typer.Option("--special", help="Let special tokens in the text count as such.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="List the tokens with their ids.")] = False,
) -> None:
    """Colour the tokens of a text.

    Example: graft tokenizer show --tokenizer tokenizer 'Hello world, it is 2026!'
    """
    from rich.console import Console

    from ...text.utf8 import to_utf8
    from ..tokenizer import Tokenizer
    from .show import colour_tokens, token_table

    tok = Tokenizer.load(tokenizer)
    found = tok.encode(text, allowed_special="all" if special else ()).tolist()
    console = Console()
    few_colours = console.color_system in (None, "standard", "windows") or console.no_color
    console.print(colour_tokens([tok.token_bytes(index) for index in found], marks=few_colours))
    n_bytes = len(to_utf8(text))
    console.print(
        f"{len(found)} tokens, {n_bytes} bytes: {n_bytes / max(1, len(found)):.2f} bytes a token", style="dim"
    )
    if ids:
        console.print(token_table(found, [tok.token_bytes(index) for index in found]))


@app.command()
def compare(
    files: Annotated[
        list[Path],
        typer.Argument(help="Files or folders, as train reads them; the table is about all of them together."),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A graft tokenizer; trained on the files when not given.")
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help=r"Vocabulary of the tokenizer that is trained. \[default: 5000, less for short texts]"),
    ] = None,
    gpt2: Annotated[
        Path | None, typer.Option(help="Folder with GPT-2's tokenizer.json, or vocab.json and merges.txt.")
    ] = None,
    errors: Errors = "strict",
) -> None:
    """Put characters, bytes, words, graft's BPE and GPT-2's side by side on your text.

    The vocabularies of characters and words come from the first nine tenths of the text, the figures from the last.

    Example: graft tokenizer compare book.txt --vocab-size 1000
    """
    from rich.console import Console

    from ...text.documents import read_documents
    from .compare import comparison_table

    text = b"".join(piece.data for piece in read_documents(files, errors=check_errors(errors))).decode()
    Console().print(comparison_table(text, tokenizer, vocab_size, gpt2))
