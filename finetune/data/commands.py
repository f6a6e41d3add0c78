"""graft data inspect."""

from pathlib import Path
from typing import Annotated, Any

import typer


def inspect(
    data: Annotated[list[str], typer.Argument(help="Files, folders or globs of records; each may end in =WEIGHT.")],
    base: Annotated[Path, typer.Option("--base", help="Model folder: its tokenizer, template and length.")],
    rows: Annotated[int, typer.Option("--rows", help="How many rows to show.")] = 3,
    max_seq_len: Annotated[int | None, typer.Option("--max-seq-len", help="Tokens a row may have.")] = None,
    on_too_long: Annotated[str, typer.Option("--on-too-long", help="auto, cut, drop, split or error.")] = "auto",
    on_empty: Annotated[str, typer.Option("--on-empty", help="drop or error.")] = "error",
    special_tokens: Annotated[str, typer.Option("--special-tokens", help="text or tokens, where data spells them.")] = "text",
    chat_template: Annotated[str | None, typer.Option("--chat-template", help="Name or file of a template.")] = None,
    template_arg: Annotated[list[str] | None, typer.Option("--template-arg", help="key=value for the template.")] = None,
    field: Annotated[list[str] | None, typer.Option("--field", help="Other field names: prompt=question.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object of counts.")] = False,
) -> None:
    """Show rows as the model will see them: what carries loss, lengths, duplicates, what would be cut or refused.

    Example: graft data inspect runs/demo/data/spam/train.jsonl --base runs/demo/base
    """
    import json

    from rich.console import Console

    from ...base.tokenizer.tokenizer import Tokenizer
    from .dataset import DatasetOptions
    from .inspect import inspect_data, print_inspection

    options = DatasetOptions(on_too_long, on_empty, special_tokens)  # pyright: ignore[reportArgumentType] (checked there)
    found = inspect_data(
        data,
        base,
        max_seq_len=max_seq_len,
        options=options,
        fields=parse_fields(field or []),
        chat_template=chat_template,
        template_args=parse_template_args(template_arg or []),
    )
    if as_json:
        typer.echo(json.dumps(found.figures()))
    else:
        print_inspection(found, Tokenizer.load(base), Console(), n_rows=rows)


def parse_fields(assignments: list[str]) -> dict[str, str]:
    """['prompt=question'] -> {'prompt': 'question'}. Raises ValueError for what isn't FIELD=NAME."""
    fields = {}
    for assignment in assignments:
        field, equals, name = assignment.partition("=")
        if not (equals and field and name) or field in fields:
            raise ValueError(f"--field {assignment!r} is not FIELD=NAME, each once; write for example prompt=question")
        fields[field] = name
    return fields


def parse_template_args(assignments: list[str]) -> dict[str, Any]:
    """['enable_thinking=false'] -> {'enable_thinking': False}: JSON values, else the text itself. Raises ValueError."""
    import json

    found: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not (equals and key.isidentifier()) or key in found:
            raise ValueError(
                f"--template-arg {assignment!r} is not key=value, each once; write for example enable_thinking=false"
            )
        try:
            found[key] = json.loads(text)
        except (ValueError, RecursionError):
            found[key] = text
    return found
