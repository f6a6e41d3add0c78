"""The demo's report: its tables and figures, for the terminal and for report.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...base.text.printable import printable

BASELINES = {  # a task's figure -> its column
    "majority": "commonest answer",
    "bag_of_words": "words alone",
    "base_accuracy": "base, as it writes",
    "base_likelihood": "base, likeliest answer",
}
Tables = dict[str, tuple[list[str], list[list[str]]]]  # title -> (header, rows)


def tables(report: dict[str, Any]) -> Tables:
    """Every table of the report; cells are plain text."""
    header = ["adapter", "prompt", "answer", "expected"]
    wrong = [row for task in report["tasks"] for row in task["wrong"]]
    return {
        "Held-out accuracy (exact match on unseen combinations)": _accuracies(report),
        "One batch, an adapter for each row": (header, _answers(report["mixed_batch"])),
        "Wrong answers, the first of each adapter": (header, _answers(wrong)),
        "What the base alone goes on with (temperature 0.8)": (
            ["prompt", "text"],
            [[_line(one["prompt"]), _line(one["text"])] for one in report["samples"]],
        ),
        "Memory of a training step (2 x 64 tokens, float32)": _memory(report),
    }


def _accuracies(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            task["name"],
            str(task["n"]),
            *("" if task[key] is None else f"{task[key]:.1%}" for key in BASELINES),
            f"{task['accuracy']:.1%} ({task['low']:.1%} to {task['high']:.1%})",
            f"{task['adapter_bytes']:,}",
            f"{task['adapter_bytes'] / report['base_bytes']:.1%}",
        ]
        for task in report["tasks"]
    ]
    return ["task", "n", *BASELINES.values(), "with adapter (95% interval)", "adapter bytes", "of the base"], rows


def _answers(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[row["adapter"], *(_line(row[key]) for key in ("prompt", "answer", "expected"))] for row in rows]


def _line(text: str) -> str:
    """One line that is safe on a terminal and in a Markdown table."""
    return printable(text.replace("\n", " / ").replace("|", "\\|"))


def _memory(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    mib: Callable[[float], str] = lambda n: f"{n / 2**20:.2f} MiB"  # noqa: E731
    sizes = ("weights", "gradients", "optimizer", "predicted_peak", "measured_peak")
    rows = [[row["method"], *(mib(row[key]) for key in sizes), f"{row['error']:+.1%}"] for row in report["memory"]]
    return ["method", "weights", "gradients", "optimizer", "predicted peak", "measured peak", "error"], rows


def figures(report: dict[str, Any]) -> list[str]:
    """The lines beside the tables."""
    base, settings = report["base"], report["settings"]
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["stage_seconds"].items())
    trained = ", ".join(
        f"{name} {one['steps']} x {one['learning_rate']:g}" for name, one in settings["adapters"].items()
    )
    return [
        f"base: {base['n_params']:,} parameters, {report['base_bytes']:,} bytes; validation loss {base['val_loss']:.3f} "
        f"against {base['bigram_loss']:.3f} of a bigram model",
        f"first token after an adapter swap: {report['first_token_ms']['after_swap']:.1f} ms, without a swap "
        f"{report['first_token_ms']['no_swap']:.1f} ms (medians of 60, a prompt of about 20 tokens)",
        f"trained: base {settings['pretrain']['steps']} steps of {settings['pretrain']['batch_size']} x "
        f"{settings['model']['max_seq_len']} tokens ({settings['pretrain']['optimizer']}, "
        f"{settings['pretrain']['learning_rate']:g}); adapters of rank {settings['rank']}, {settings['n_train']:,} records, "
        f"batches of {settings['batch_size']}, steps x learning rate: {trained}",
        f"the whole demo: {report['seconds']:.0f} s ({stages}) on {settings['device']} with {settings['threads']} threads, "
        f"seed {settings['seed']}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    ]


def next_steps(out: str) -> list[str]:
    """Commands that go on from the demo's folder; the first two answer with a line typed or given."""
    base, adapters = f"--base {out}/base", f"{out}/adapters"
    named = " ".join(f"--adapter {name}={adapters}/{name}" for name in ("chat", "spam", "translation"))
    return [
        f"graft chat {base} {named}",
        f'graft generate {base} --adapter {adapters}/chat --prompt "what does len do?"',
        f"graft eval {base} --adapter {adapters}/spam --data {out}/data/spam/eval.jsonl "
        f"--baselines {out}/data/spam/train.jsonl",
        f"graft sft {base} --data {out}/data/spam/train.jsonl --out runs/spam-qlora --qlora --steps 100",
        f"graft adapter merge {base} --adapter {adapters}/spam --out runs/spam-merged",
        "graft vram estimate --model llama-7b --method qlora --seq 512",
    ]


def print_report(console: Console, report: dict[str, Any], out: Path) -> None:
    """Tables, figures and what to try next, on the terminal."""
    console.print()
    for title, (header, rows) in tables(report).items():
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*(cell.replace("[", "\\[") for cell in row))
        console.print(table)
    for line in figures(report):
        console.print(line, highlight=False)
    console.print(f"\n{out}/report.md, loss.png and memory.png hold this. What to try next:", highlight=False)
    for line in next_steps(str(out)):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    console.print("In the chat ask 'what does len do?', then 'say that again.'; /adapter spam swaps.", highlight=False)


def markdown(report: dict[str, Any]) -> str:
    """report.md."""
    lines = ["# graft demo", "", *[f"- {line}" for line in figures(report)], ""]
    lines += ["![loss](loss.png)", ""]
    for title, (header, rows) in tables(report).items():
        lines += [f"## {title}", "", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
    lines += ["![memory](memory.png)", ""]
    return "\n".join(lines)
