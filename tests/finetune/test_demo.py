"""The demo's pieces, and the whole of it at a size that takes seconds."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graft.base.runlog import read_metrics
from graft.finetune import demo

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
    "settings": {"seed": 7, "device": "cpu", "threads": 2, "n_train": 4000},
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


LONG = "a docstring of more than forty characters, which is kept"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of a few files; pydoc's topics stay the real ones."""
    folder = tmp_path / "lib"
    for name, text in {
        "b.py": f'"""{LONG} b."""\n\n\ndef f():\n    """{LONG} f."""\n\n\ndef g():\n    """short"""\n',
        "a.py": f'class C:\n    """{LONG} C."""\n',
        "broken.py": "def (\n",
        "latin.py": "x = 'caf\u00e9'",
        "test/t.py": f'"""{LONG} test."""',
        "site-packages/s.py": f'"""{LONG} installed."""',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="latin-1")
    monkeypatch.setattr(demo, "sysconfig", SimpleNamespace(get_path=lambda name: str(folder)))
    return folder


def test_the_text_by_hand(library: Path) -> None:
    """Worked by hand: topics by name; docstrings file by file, the short one left out; sources block by block; no tests,
    no installed packages, nothing that does not parse or is not UTF-8."""
    found = list(demo.stdlib_documents(10**9))
    topics = [name for name, _ in found if name.startswith("topic ")]
    assert topics == sorted(topics)
    assert "topic if" in topics
    assert found[len(topics) :] == [
        ("docstring in a.py", f"{LONG} C."),
        ("docstring in b.py", f"{LONG} b."),
        ("docstring in b.py", f"{LONG} f."),
        ("source a.py", f'class C:\n    """{LONG} C."""'),
        ("source b.py", f'"""{LONG} b."""'),
        ("source b.py", f'def f():\n    """{LONG} f."""'),
    ]
    few = list(demo.stdlib_documents(100_000))
    assert few == found[: len(few)]
    size = [len(text.encode()) for _, text in few]
    assert sum(size[:-1]) < 100_000 <= sum(size)


@pytest.mark.slow
def test_there_is_enough_text() -> None:
    """Law: as much as the demo asks for, with docstrings and sources in it, none of it from tests or installed packages."""
    documents = list(demo.stdlib_documents(demo.TEXT_BYTES))
    assert sum(len(text.encode()) for _, text in documents) >= demo.TEXT_BYTES
    kinds = {name.split()[0] for name, _ in documents}
    assert kinds == {"topic", "docstring", "source"}


def test_the_tables_by_hand() -> None:
    """Worked by hand: 5000 of 200000 bytes are 2.5%; 2^20 bytes are 1 MiB; a prompt's line break is a slash."""
    text = demo._markdown(REPORT)
    assert "| spam | 200 | 50.0% |  | 12.5% | 52.0% | 99.5% (97.2% to 99.9%) | 5,000 | 2.5% |" in text
    assert "| spam | c / d | ham | spam |" in text
    assert "| spam | a / b | ham | spam |" in text
    assert "| LoRA | 1.00 MiB | 0.50 MiB | 2.00 MiB | 5.00 MiB | 4.00 MiB | +25.0% |" in text
    assert "1,234,567 parameters, 200,000 bytes; validation loss 3.250 against 4.125 of a bigram model" in text
    assert "first token after an adapter swap: 3.2 ms, without a swap 3.1 ms" in text
    assert "300 s (base 200 s, memory 99 s) on cpu with 2 threads, seed 7" in text
    assert "python 3.12.1" in text
    assert "![loss](loss.png)" in text
    assert "![memory](memory.png)" in text
    for line in text.splitlines():  # every table row has its header's number of cells
        if line.startswith("| "):
            assert line.count("|") in (5, 8, 10)


def test_next_steps_are_commands_that_parse() -> None:
    """Law: what the demo tells to try next are graft's own commands and options."""
    import shlex

    import typer

    from graft import cli

    app = typer.main.get_command(cli.app)
    for line in demo._next_steps("runs/demo"):
        graft, *arguments = shlex.split(line)
        assert graft == "graft"
        command: Any = app
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context("graft", arguments)


@pytest.mark.slow
def test_the_whole_demo_small(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: it leaves the files that the README names, prints every table, and refuses a folder that is not empty."""
    monkeypatch.setattr(demo, "TEXT_BYTES", 60_000)
    monkeypatch.setattr(demo, "VOCAB_SIZE", 320)
    small = {"n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64}
    monkeypatch.setattr(demo, "MODEL", demo.MODEL | small)
    monkeypatch.setattr(demo, "PRETRAIN", demo.PRETRAIN | {"steps": 4, "batch_size": 2})
    monkeypatch.setattr(demo, "TASK_SETTINGS", {name: {"steps": 2} for name in demo.TASK_SETTINGS})
    monkeypatch.setattr(demo, "N_TRAIN", 24)
    monkeypatch.setattr(demo, "N_EVAL", 4)
    monkeypatch.setenv("COLUMNS", "200")
    assert library.exists()
    out = tmp_path / "demo"
    report = demo.run_demo(out, device="cpu")
    for name in ("tokenizer/tokenizer.json", "base/model.safetensors", "report.md", "loss.png", "memory.png"):
        assert (out / name).stat().st_size > 0
    for task in ("spam", "sentiment", "translation"):
        assert (out / "adapters" / task / "adapter_model.safetensors").exists()
        assert len(read_metrics(out / "adapters" / task / "metrics.jsonl")) == 2
    assert len(read_metrics(out / "base/metrics.jsonl")) == 4
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert [task["name"] for task in report["tasks"]] == ["spam", "sentiment", "translation"]
    assert [row["adapter"] for row in report["mixed_batch"]] == 2 * ["spam", "sentiment", "translation"]
    assert [row["method"] for row in report["memory"]] == ["full", "LoRA", "QLoRA", "QLoRA, single"]
    assert report["base"]["bigram_loss"] > 0
    by_name = {task["name"]: task for task in report["tasks"]}
    assert by_name["translation"]["majority"] is by_name["translation"]["base_likelihood"] is None
    assert by_name["spam"]["majority"] == 0.5  # two labels in equal parts
    assert all(task["n"] == 4 and task["low"] <= task["accuracy"] <= task["high"] for task in report["tasks"])
    assert report["seconds"] == pytest.approx(sum(report["stage_seconds"].values()), abs=0.1)
    assert min(report["first_token_ms"].values()) > 0
    said = capsys.readouterr().out
    for title in demo._rows(report):
        assert title in said
    assert "What to try next" in said
    with pytest.raises(FileExistsError, match=r"is not empty; use --force to run the demo there again"):
        demo.run_demo(out, device="cpu")
