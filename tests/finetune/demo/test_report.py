"""The report's tables and figures by hand; its commands exist; what a model writes stays text."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from graft.finetune.demo.report import markdown, next_steps, print_report

REPORT: dict[str, Any] = {
    "base": {"n_params": 1234567, "val_loss": 3.25, "val_bits_per_byte": 1.5, "bigram_loss": 4.125},
    "tasks": [
        {
            "name": "spam", "n": 200, "majority": 0.5, "bag_of_words": None, "base_accuracy": 0.125, "base_likelihood": 0.52,
            "accuracy": 0.995, "low": 0.972, "high": 0.999, "adapter_bytes": 5000,
            "wrong": [{"adapter": "spam", "prompt": "c\nd", "answer": "ham", "expected": "spam"}],
        }
    ],
    "base_bytes": 200_000,
    "first_token_ms": {"after_swap": 3.25, "no_swap": 3.125},
    "settings": {
        "seed": 7, "device": "cpu", "threads": 2, "n_train": 4000, "n_eval": 200, "rank": 6, "batch_size": 16,
        "model": {"max_seq_len": 128}, "pretrain": {"steps": 600, "batch_size": 8, "optimizer": "muon", "learning_rate": 0.015},
        "adapters": {"spam": {"steps": 350, "learning_rate": 0.003}},
    },
    "samples": [{"prompt": "def ", "text": "f(x|y):\n\x1b[2J [red]"}],
    "versions": {"python": "3.12.1"},
    "stage_seconds": {"base": 200.4, "memory": 99.2},
    "mixed_batch": [{"adapter": "spam", "prompt": "a\nb", "answer": "ham", "expected": "spam"}],
    "memory": [
        {
            "method": "LoRA", "weights": 2**20, "gradients": 2**19, "optimizer": 2**21, "predicted_peak": 5 * 2**20,
            "measured_peak": 4 * 2**20, "error": 0.25,
        }
    ],
    "seconds": 299.6,
}  # fmt: skip


def test_the_tables_by_hand() -> None:
    """Worked by hand: 5000 of 200000 bytes are 2.5%; 2^20 bytes are 1 MiB; a prompt's line break is a slash."""
    text = markdown(REPORT)
    assert "| spam | 200 | 50.0% |  | 12.5% | 52.0% | 99.5% (97.2% to 99.9%) | 5,000 | 2.5% |" in text
    assert "| spam | c / d | ham | spam |" in text
    assert "| spam | a / b | ham | spam |" in text
    assert "| LoRA | 1.00 MiB | 0.50 MiB | 2.00 MiB | 5.00 MiB | 4.00 MiB | +25.0% |" in text
    assert "1,234,567 parameters, 200,000 bytes; validation loss 3.250 against 4.125 of a bigram model" in text
    assert "first token after an adapter swap: 3.2 ms, without a swap 3.1 ms" in text
    assert "base 600 steps of 8 x 128 tokens (muon, 0.015); adapters of rank 6, 4,000 records" in text
    assert "steps x learning rate: spam 350 x 0.003" in text
    assert r"| def  | f(x\|y): / \x1b[2J [red] |" in text  # a sample can't break the table or the terminal
    assert "300 s (base 200 s, memory 99 s) on cpu with 2 threads, seed 7" in text
    assert "python 3.12.1" in text
    assert "![loss](loss.png)" in text
    assert "![memory](memory.png)" in text
    for line in text.splitlines():  # every table row has its header's number of cells
        if line.startswith("| "):
            assert line.replace("\\|", "").count("|") in (3, 5, 8, 10)


def test_next_steps_are_commands_that_parse() -> None:
    """Law: what the demo tells to try next are graft's own commands and options."""
    import shlex

    import typer

    from graft import cli

    app = typer.main.get_command(cli.app)
    for line in next_steps("runs/demo"):
        graft, *arguments = shlex.split(line)
        assert graft == "graft"
        command: Any = app
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context("graft", arguments)


def test_what_a_model_writes_is_printed_as_text() -> None:
    """Law: markup and control characters of a sample come out as they are, escaped."""
    out = io.StringIO()
    print_report(Console(file=out, width=200), REPORT, Path("runs/demo"))
    said = out.getvalue()
    assert "\x1b" not in said
    assert r"\x1b[2J [red]" in said
    assert "What to try next" in said
