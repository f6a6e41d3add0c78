"""`graft eval` on the command line: benchmarks as a table and JSON, baselines, samples, what contradicts each other."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, standard output, standard error) of `graft ARGUMENTS`."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_benchmarks_of_a_base_and_adapters(run: Run, base_dir: Path, tmp_path: Path) -> None:
    """Law: several tasks and adapters in one run, a row each; JSON has the same figures; one adapter alone has no base."""
    choice = write(
        tmp_path / "quiz.jsonl", *({"query": "the", "choices": ["cat", "sea"], "gold": i % 2} for i in range(4))
    )
    pairs = [
        {"sentence_good": "the cat", "sentence_bad": "cat the", "UID": u, "linguistics_term": "order"} for u in "abc"
    ]
    pair = write(tmp_path / "pairs.jsonl", *pairs)
    records = write(
        tmp_path / "rows.jsonl", {"prompt": "the", "completion": " cat"}, {"prompt": "a", "completion": " bird"}
    )
    code, _, err = run(
        "sft", "--base", base_dir, "--data", records, "--out", tmp_path / "one", "--lora", "--rank", 2, "--steps", 1,
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    common = ["eval", "--base", base_dir, "--task", choice, "--task", f"minimal={pair}", "--device", "cpu"]
    code, out, err = run(*common, "--adapter", tmp_path / "one", "--adapter", f"two={tmp_path / 'one'}", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert list(found) == ["base", "one", "two"]
    assert found["one"] == found["two"]
    assert {"acc", "acc_low", "acc_norm_high", "chance", "n"} <= found["base"]["quiz"].keys()
    assert found["base"]["minimal"]["families"]["order"]["n"] == 3
    code, out, _ = run(*common, "--adapter", tmp_path / "one", "--adapter", f"two={tmp_path / 'one'}")
    assert code == 0
    for word in ("quiz", "minimal", "order", "mean of 3 paradigms", "two", f"{found['base']['quiz']['acc']:.1%} ("):
        assert word in out
    code, out, _ = run(*common, "--adapter", tmp_path / "one", "--json", "--limit", 2)
    alone = json.loads(out)
    assert list(alone) == ["one"]
    assert alone["one"]["quiz"]["n"] == 2
    long = write(tmp_path / "long.jsonl", {"query": "the cat " * 99, "choices": ["a", "b"], "gold": 0})
    code, _, err = run("eval", "--base", base_dir, "--task", long, "--device", "cpu")
    assert (code, "base, long: 1 contexts lost their beginning to fit the model" in err) == (0, True)


def test_baselines_and_samples(run: Run, base_dir: Path, tmp_path: Path) -> None:
    """Worked by hand: the commonest training label is right in 1 of 3, words tell 3 of 3; samples have pass@k; text metrics
    stand beside them."""
    train = [("a cat sat", "x"), ("a cat slept", "x"), ("a cat ran", "x"), ("a bird sang", "y"), ("a bird flew", "y")]
    held_out = [("cat", "x"), ("bird", "y"), ("bird bird", "y")]
    paths = [
        write(tmp_path / f"{name}.jsonl", *({"prompt": p, "completion": f" {c}"} for p, c in rows))
        for name, rows in (("train", train), ("eval", held_out))
    ]
    common = ["eval", "--base", base_dir, "--data", paths[1], "--device", "cpu"]
    code, out, err = run(*common, "--baselines", paths[0], "--json")
    assert code == 0, err
    found = json.loads(out)
    assert list(found) == ["majority", "words", "base"]
    assert (found["majority"]["n_correct"], found["words"]["n_correct"]) == (1, 3)
    assert (found["majority"]["n_records"], found["base"]["n_records"]) == (3, 3)
    assert "words" in run(*common, "--baselines", paths[0])[1]
    pytest.importorskip("sacrebleu")
    code, out, err = run(*common, "--samples", 4, "--pass-k", "1,3", "--metric", "chrf", "--seed", 3, "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert {
        "pass@1",
        "pass@3",
        "pass@3_low",
        "majority",
        "majority_high",
        "chrf",
        "chrf_signature",
        "n_samples",
    } <= figures.keys()
    assert "pass@2" not in figures
    code, out, _ = run(*common, "--adapter", f"base2={tmp_path}", "--samples", 2)
    assert code == 1


def test_what_contradicts_each_other(run: Run, base_dir: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", *({"prompt": "the", "completion": f" {i}"} for i in range(21)))
    task = write(tmp_path / "task.jsonl", {"query": "the", "choices": ["cat"], "gold": 0})
    for wrong, message in (
        ([], "give --data FILE (records or text) or --task NAME=FILE"),
        (["--data", rows, "--task", task], "give --data FILE (records or text) or --task NAME=FILE"),
        (["--data", rows, "--kind", "pair"], "--kind and --shots are about benchmarks"),
        (["--task", task, "--score", "likelihood"], "--score is about records; a --task has its own figures"),
        (["--task", task, "--max-new-tokens", 5], "--max-new-tokens is about records"),
        (["--task", task, "--seed", 5], "--seed is about records"),
        (["--task", task, "--batch-size", 5], "--batch-size is about records"),
        (["--task", task, "--samples", 2], "--samples is about records"),
        (["--task", task, "--limit", 0], "limit=0 must be >= 1"),
        (["--task", tmp_path / "gone.zip"], "gone.zip does not exist"),
        (["--data", rows, "--pass-k", "1;2", "--samples", 2], "--pass-k '1;2' is not whole numbers with commas"),
        (
            ["--data", rows, "--baselines", rows],
            "--baselines is about few answers; the training records have 21 distinct",
        ),
        (["--data", rows, "--metric", "rouge"], "--metric 'rouge' is unknown; choose chrf, bleu"),
        (["--data", rows, "--samples", 2, "--verify", "nobody"], "unknown reward 'nobody'"),
    ):
        code, _, err = run("eval", "--base", base_dir, "--device", "cpu", *wrong)
        assert (code, message in err) == (1, True), err
