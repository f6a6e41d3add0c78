"""The results of bench/real_data.py as a table: one row a figure, with hardware, command and date."""

import os
import platform
import re
from pathlib import Path
from typing import Any


def table_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(metric, value) of every stage that has run."""
    rows: list[tuple[str, str]] = []
    if base := results.get("base"):
        what = f"TinyStories, {base['n_params'] / 1e6:.1f}M parameters, {base['tokens_read'] / 1e6:.2f}M tokens read"
        rows += [
            (f"{what}: validation loss, nats a token", f"{base['val_loss']:.3f}"),
            (f"{what}: validation bits a byte", f"{base['val_bits_per_byte']:.3f}"),
            (
                "a bigram model, all validation tokens: loss; bits a byte",
                f"{base['bigram_loss']:.3f}; {base['bigram_bits_per_byte']:.3f}",
            ),
        ]
    for task, metric in (("sms", "f1_spam"), ("sst2", "f1_good")):
        if not (result := results.get(task)):
            continue
        n = f"n = {result['n_test']:,}"
        rows.append(
            (
                f"{task}, always `{result['most_frequent']}` ({n}): accuracy",
                f"{result['most_frequent_share']:.1%}",
            )
        )
        for method in dict.fromkeys(run["method"] for run in result["runs"]):
            runs = [run for run in result["runs"] if run["method"] == method]
            which = "seed" if len(runs) == 1 else "seeds"
            which += " " + ", ".join(str(run["seed"]) for run in runs)
            accuracies = " / ".join(f"{run['accuracy']:.1%}" for run in runs)
            value = f"{accuracies}; {' / '.join(f'{run[metric]:.3f}' for run in runs)}"
            rows.append((f"{task}, {method}, {which}: accuracy; F1 of `{metric[3:]}`", value))
            share = runs[0]["stored_bytes"] / result["base_bytes"]
            rows.append(
                (
                    f"{task}, {method}: trained parameters; bytes stored (of the base's)",
                    f"{runs[0]['n_trained_params']:,}; {runs[0]['stored_bytes']:,} ({share:.1%})",
                )
            )
        for name, key in (("QLoRA - LoRA", "qlora_minus_lora"), ("LoRA - full", "lora_minus_full")):
            if not (gap := result.get(key)):  # results of an earlier version have no full fine-tuning of sst2
                continue
            rows.append(
                (
                    f"{task}, {name}, points of accuracy, paired over {len(gap['by_seed'])} seed(s), {n}",
                    f"{gap['points']:+.2f} (standard error {gap['standard_error']:.2f}; of one accuracy "
                    f"{gap['binomial_error_of_one_accuracy']:.2f})",
                )
            )
    if quality := results.get("quality"):
        for name, row in quality["formats"].items():
            error = f" +- {row['standard_error']:.4f}" if name not in ("float32", "bf16") else ""
            rows.append(
                (
                    f"base in {name} ({row['bits_per_weight']:.3f} bits a weight): validation loss; above bf16",
                    f"{row['val_loss']:.4f}; {row['above_bf16']:+.4f}{error} ({row['above_bf16_percent']:+.2f}%)",
                )
            )
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The results table as README and docs have it."""
    about = results["about"]
    lines = ["| metric | value | hardware | command | date |", "| --- | --- | --- | --- | --- |"]
    for metric, value in table_rows(results):
        lines.append(f"| {metric} | {value} | {about['hardware']} | `{about['command']}` | {about['date']} |")
    return "\n".join(lines) + "\n"


def hardware() -> str:
    """The processor's name and how many cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {name}"
