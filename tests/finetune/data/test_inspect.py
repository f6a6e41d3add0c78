"""graft data inspect: counts by hand, colours by token, nothing in the data steers the terminal."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from graft.base.tokenizer.tokenizer import Tokenizer
from graft.cli import app
from graft.finetune.data.chat import encode_whole
from graft.finetune.data.commands import parse_fields, parse_template_args
from graft.finetune.data.dataset import DatasetOptions
from graft.finetune.data.inspect import LEARNED, histogram, inspect_data, print_inspection, row_text
from graft.finetune.data.records import Record

TEXT = "the cat sat on the mat. " * 40
FILES = {
    "a.jsonl": [
        {"messages": [{"role": "user", "content": "the cat [bold]"}, {"role": "assistant", "content": "sat\x1b[31m"}]}
    ],
    "b.jsonl": [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": None},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ],
    "c.jsonl": [{"text": TEXT, "source": "a book"}],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A folder of three files, each of one format."""
    for name, rows in FILES.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_counts_by_hand(file: Path, base_dir: Path) -> None:
    found = inspect_data([file], base_dir)
    figures = found.figures()
    assert {name: figures[name] for name in ("n_records", "n_duplicates", "n_preferences", "n_bad", "n_split", "max_seq_len")} == {
        "n_records": 6, "n_duplicates": 1, "n_preferences": 1, "n_bad": 1, "n_split": 1, "max_seq_len": 97,
    }  # fmt: skip
    assert found.bad == ["b.jsonl line 3: completion is null; fill it, or drop the row"]
    text = Record("r", text=TEXT)
    assert figures["tokens_max"] == len(encode_whole(text, Tokenizer.load(base_dir)).ids)
    assert found.wheres[:3] == ["a.jsonl line 1", "b.jsonl line 1", "b.jsonl line 2"]
    assert inspect_data([file], base_dir, options=DatasetOptions(on_empty="drop")).figures()["n_empty"] == 1


def test_what_is_learned_is_in_colour(base_dir: Path) -> None:
    tokenizer = Tokenizer.load(base_dir)
    row = encode_whole(Record("r", prompt="the cat", completion=" sat"), tokenizer)
    text = row_text(row, tokenizer)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if LEARNED in str(span.style))
    assert green == " sat<|endoftext|>"
    assert text.plain == "the cat sat<|endoftext|>"


def test_data_cannot_steer_the_terminal(file: Path, base_dir: Path) -> None:
    console = Console(record=True, width=200, color_system=None, file=open("/dev/null", "w"))  # noqa: SIM115
    print_inspection(inspect_data([file], base_dir), Tokenizer.load(base_dir), console)
    shown = console.export_text()
    console.file.close()
    assert "\x1b" not in shown
    assert "the cat [bold]" in shown
    assert "fields that nothing reads: source (1)" in shown
    assert "would be refused: b.jsonl line 3: completion is null" in shown


def test_the_histogram_counts_every_row() -> None:
    """Worked by hand: 1, 2 and 9 in two bins of 5 are two and one."""
    lines = histogram([1, 2, 9], limit=5, n_bins=2)
    assert [line.split()[4] for line in lines] == ["2", "1"]
    assert "<- max_seq_len 5" in lines[1]


def test_the_command(file: Path, base_dir: Path) -> None:
    result = CliRunner().invoke(
        app, ["data", "inspect", str(file), "--base", str(base_dir), "--json", "--on-empty", "drop"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["n_empty"] == 1


def test_fields_and_template_arguments() -> None:
    assert parse_fields(["prompt=question", "completion=answer"]) == {"prompt": "question", "completion": "answer"}
    assert parse_template_args(["enable_thinking=false", "name=x", "n=3"]) == {
        "enable_thinking": False,
        "name": "x",
        "n": 3,
    }
    for wrong in (["prompt"], ["=a"], ["a=b", "a=c"]):
        with pytest.raises(ValueError, match="is not FIELD=NAME"):
            parse_fields(wrong)
    for wrong in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match="is not key=value"):
            parse_template_args(wrong)
