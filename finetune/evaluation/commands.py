"""`graft eval`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    base: Annotated[Path, typer.Option("--base", help="Model folder in Hugging Face's layout.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Records with answers (file, folder, glob), or a text file; can be repeated."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Instead of --data: a benchmark, NAME=FILE or FILE; can be repeated."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", help="Adapter folder, A:0.7,B:0.3, or NAME=either; several are compared with the base."
        ),
    ] = None,
    score: Annotated[
        str, typer.Option("--score", help="exact: the answer it writes; likelihood: its most probable of few answers.")
    ] = "exact",
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="chrf or bleu of the answers too; can be repeated.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", help="Answers drawn for each record: pass@k and majority vote.")
    ] = 0,
    pass_k: Annotated[
        str | None, typer.Option("--pass-k", help=r"ks with commas. \[default: 1, 2, 4, ... up to --samples]")
    ] = None,
    verify: Annotated[
        str,
        typer.Option(
            "--verify", help="What makes a sample right: exact, number:0.01, label, regex:P, MODULE:FUNCTION."
        ),
    ] = "exact",
    temperature: Annotated[float, typer.Option("--temperature", help="Of the samples.")] = 0.8,
    top_p: Annotated[float, typer.Option("--top-p", help="Of the samples.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Of the samples.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help=r"Of an answer. \[default: the longest true one's and 2]")
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option("--baselines", help="Training records: their commonest label and naive Bayes over words as rows."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind", help=r"Of each --task: choice, cloze, pair, lastword, answer. \[default: by its fields]"
        ),
    ] = None,
    shots: Annotated[
        int, typer.Option("--shots", help="First rows of a --task that stand, solved, before each question.")
    ] = 0,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N records or questions.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Records at once.")] = 32,
    on_too_long: Annotated[
        str, typer.Option("--on-too-long", help="Prompts that leave no room for an answer: error or drop.")
    ] = "error",
    on_empty: Annotated[str, typer.Option("--on-empty", help="Null or empty rows: error or drop.")] = "error",
    special_tokens: Annotated[
        str, typer.Option("--special-tokens", help="Those that the data spells: text or tokens.")
    ] = "text",
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help=r"Name or file of a template. \[default: the model's own]")
    ] = None,
    template_arg: Annotated[
        list[str] | None, typer.Option("--template-arg", help="key=value for the template; can be repeated.")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option("--field", help="Other field names, such as prompt=question; can be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a base or adapters: loss, perplexity, bits a byte, right answers with their 95% interval, F1 for labels; or
    benchmarks: ARC, PIQA, OpenBookQA, COPA, HellaSwag, WinoGrande, BLiMP, LAMBADA, SVAMP.

    Example: graft eval --base runs/demo/base --adapter runs/demo/adapters/spam --data runs/demo/data/spam/eval.jsonl
    """
    if bool(data) == bool(task):
        raise ValueError("give --data FILE (records or text) or --task NAME=FILE (a benchmark), one of the two")
    folders = adapter_folders(adapter or [])
    run: dict[str, Any] = {"with_base": len(folders) != 1, "limit": limit, "dtype": dtype, "device": device}
    if task:
        of_records = {
            "--score": score != "exact", "--metric": metric, "--samples": samples, "--pass-k": pass_k,
            "--verify": verify != "exact", "--temperature": temperature != 0.8, "--top-p": top_p != 0.95, "--seed": seed,
            "--max-new-tokens": max_new_tokens is not None, "--baselines": baselines, "--batch-size": batch_size != 32,
            "--on-too-long": on_too_long != "error", "--on-empty": on_empty != "error",
            "--special-tokens": special_tokens != "text", "--field": field, "--chat-template": chat_template,
            "--template-arg": template_arg,
        }  # fmt: skip
        for flag, given in of_records.items():
            if given:
                raise ValueError(f"{flag} is about records; a --task has its own figures, so leave it out")
        _benchmarks(base, task, folders, as_json, kind=kind, n_shots=shots, **run)
        return
    if kind is not None or shots:
        raise ValueError("--kind and --shots are about benchmarks; add --task FILE, or leave them out")
    from ..data.commands import parse_fields, parse_template_args

    options = {
        "score": score,
        "metrics": tuple(metric or ()),
        "n_samples": samples,
        "pass_k": _whole_numbers("--pass-k", pass_k),
        "verify": verify,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "on_too_long": on_too_long,
        "on_empty": on_empty,
        "special_tokens": special_tokens,
        "fields": parse_fields(field) if field else None,
        "chat_template": chat_template,
        "template_args": parse_template_args(template_arg) if template_arg else None,
    }
    _records(base, data or [], folders, as_json, baselines=baselines, **run, **options)


def _whole_numbers(flag: str, text: str | None) -> tuple[int, ...]:
    """ "1,5" -> (1, 5). Raises ValueError."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"{flag} {text!r} is not whole numbers with commas; write for example {flag} 1,5") from None


def _records(base: Path, data: list[str], folders: dict[str, Path], as_json: bool, **options: Any) -> None:
    from ...base.progress import counting
    from .run import compare
    from .table import comparison_table, print_tables

    with counting("eval", shown=sys.stderr.isatty()) as observe:
        found = compare(base, data, folders, progress=observe, **options)
    if len(found) > 1 and not as_json:
        print_tables(comparison_table(found))
        for name, one in found.items():
            counts = [f"{key}: {one[key]:,}" for key in ("n_empty", "n_too_long", "n_cut") if key in one]
            if counts:
                typer.echo(f"{name}, rows left out or cut: {', '.join(counts)}", err=True)
        return
    figures = found if len(found) > 1 else next(iter(found.values()))
    if as_json:
        typer.echo(json.dumps(figures))
        return
    for name, value in figures.items():
        typer.echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def _benchmarks(base: Path, tasks: list[str], folders: dict[str, Path], as_json: bool, **options: Any) -> None:
    from ...base.progress import counting
    from .benchmarks import run_benchmarks
    from .table import benchmark_tables, print_tables

    with counting("eval", shown=sys.stderr.isatty()) as observe:
        found = run_benchmarks(base, tasks, folders, progress=observe, **options)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        print_tables(*benchmark_tables(found))
    for adapter, figures in found.items():
        for task, one in figures.items():
            if "n_cut" in one:
                typer.echo(
                    f"{adapter}, {task}: {one['n_cut']:,} contexts lost their beginning to fit the model", err=True
                )


def adapter_folders(given: list[str]) -> dict[str, Path]:
    """Folders by name: NAME=DIR, or DIR under its own name. Raises ValueError for a name that comes twice."""
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            is_stack = ":" in text and not Path(text).exists()
            name, folder = text if is_stack else Path(text).resolve().name, text
        if not name or name in folders:
            raise ValueError(f"--adapter {text}: the name {name!r} is empty or given twice; write NAME=DIR")
        folders[name] = Path(folder)
    return folders
