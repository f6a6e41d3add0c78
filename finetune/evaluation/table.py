"""Figures as tables on the terminal: adapters against each other, benchmarks by adapter."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ...base.text.printable import markup

Figures = Mapping[str, Any]


def share_text(figures: Figures, name: str) -> str:
    """ "71.0% (64.4% to 76.8%)"; empty where there is no such figure."""
    if name not in figures:
        return ""
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    return f"{figures[name]:.1%} ({low:.1%} to {high:.1%})"


def comparison_table(found: Mapping[str, Figures]) -> Table:
    """A row for each adapter: counts, share with its interval, what else was asked for, loss."""
    first = next(iter(found.values()))
    is_text = "accuracy" not in first
    metrics = [name for name in ("chrf", "bleu") if name in first]
    shares = [name for name in first if name.startswith("pass@") and not name.endswith(("_low", "_high"))]
    shares += ["majority"] if "majority" in first else []
    answers = () if is_text else ("right", "accuracy", "95% interval", "macro-F1", *metrics, *shares)
    table = Table("adapter", "n", *answers, "loss", "perplexity", "bits a byte")
    for name, figures in found.items():
        cells = [markup(name), f"{figures['n_documents' if is_text else 'n_records']:,}"]
        if not is_text:
            interval = f"{figures['accuracy_low']:.1%} to {figures['accuracy_high']:.1%}"
            f1 = f"{figures['f1_macro']:.4f}" if "f1_macro" in figures else ""
            cells += [str(figures["n_correct"]), f"{figures['accuracy']:.1%}", interval, f1]
            cells += [f"{figures[metric]:.2f}" for metric in metrics] + [share_text(figures, one) for one in shares]
        cells += [f"{figures[key]:.4f}" if key in figures else "" for key in ("loss", "perplexity", "bits_per_byte")]
        table.add_row(*cells)
    return table


def benchmark_tables(found: Mapping[str, Mapping[str, Figures]]) -> list[Table]:
    """A row for each task and adapter; for minimal pairs a second table, a row for each family of phenomena."""
    table = Table("task", "adapter", "n", "acc (95% interval)", "acc_norm (95% interval)", "guessing", "perplexity")
    tables, adapters = [table], list(found)
    for task in next(iter(found.values())):
        for adapter in adapters:
            figures = found[adapter][task]
            table.add_row(
                markup(task),
                markup(adapter),
                f"{figures['n']:,}",
                share_text(figures, "acc"),
                share_text(figures, "acc_norm"),
                f"{figures['chance']:.1%}" if "chance" in figures else "",
                f"{figures['perplexity']:.2f}" if "perplexity" in figures else "",
            )
        families = [found[adapter][task].get("families", {}) for adapter in adapters]
        if families[0]:
            parts = Table(markup(task), "n", *(markup(adapter) for adapter in adapters))
            for family in families[0]:
                shares = [share_text(one[family], "acc") for one in families]
                parts.add_row(markup(family), f"{families[0][family]['n']:,}", *shares)
            means = [f"{found[adapter][task]['acc_mean_of_parts']:.1%}" for adapter in adapters]
            parts.add_row(f"mean of {len(found[adapters[0]][task]['parts'])} paradigms", "", *means)
            tables.append(parts)
    return tables


def print_tables(*tables: Table) -> None:
    """To standard output."""
    for table in tables:
        Console().print(table)
