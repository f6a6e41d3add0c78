"""Benchmarks' figures: by hand from given likelihoods, and on a tiny base from forward passes worked out apart."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.evaluation import benchmarks
from graft.finetune.evaluation.benchmarks import choice_figures, named_tasks, run_benchmarks, score_benchmark
from graft.finetune.evaluation.likelihood import Likelihood, encode_pair
from graft.finetune.evaluation.metrics import wilson_interval
from graft.finetune.evaluation.tasks import Benchmark, Question, read_benchmark
from graft.finetune.generate import Answer
from graft.finetune.loading import load_model


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def likelihoods(*values: float) -> list[Likelihood]:
    return [Likelihood(value, 1, False) for value in values]


def test_accuracies_by_hand() -> None:
    """Worked by hand: -4 against -6 picks the first, per character -4/1 against -6/3 the second; of equals the first;
    guessing gets (1/2 + 1/4) / 2."""
    two = Question("1", ("q",), (" a", " bcd"), 1, (1, 3))
    four = Question("2", ("q",), (" a",) * 4, 0, (1,) * 4)
    figures = choice_figures([two, four], [likelihoods(-4, -6), likelihoods(-1, -1, -1, -1)])
    assert (figures["acc"], figures["acc_norm"], figures["chance"]) == (1 / 2, 1, 0.375)
    assert (figures["acc_low"], figures["acc_high"]) == wilson_interval(1, 2)
    assert (figures["acc_norm_low"], figures["acc_norm_high"]) == wilson_interval(2, 2)
    assert "parts" not in figures


def test_pairs_by_phenomenon_by_hand() -> None:
    """Worked by hand: 2 of 3 right in one paradigm, 0 of 1 in the other, of one family: mean of parts 1/3, of all 2/4."""
    part = lambda name: Question("1", ("",), (" a", " b"), 0, (), name, "agreement")  # noqa: E731
    questions = [part("x"), part("x"), part("x"), part("y")]
    figures = choice_figures(
        questions, [likelihoods(-1, -2), likelihoods(-1, -2), likelihoods(-2, -1), likelihoods(-2, -1)]
    )
    assert figures["acc"] == 1 / 2
    assert figures["acc_mean_of_parts"] == pytest.approx((2 / 3 + 0) / 2)
    assert {name: (one["n"], one["acc"]) for name, one in figures["parts"].items()} == {"x": (3, 2 / 3), "y": (1, 0)}
    assert figures["families"]["agreement"]["n"] == 4
    assert "acc_norm" not in figures


def log_p(model: Any, tokenizer: Tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """By one forward pass over the pair alone."""
    row = encode_pair(tokenizer, context, continuation)
    with torch.no_grad():
        table = model(torch.tensor([row.ids[:-1]]))[0].log_softmax(-1)
    steps = range(row.n_given, len(row.ids))
    return sum(table[t - 1, row.ids[t]].item() for t in steps), all(
        int(table[t - 1].argmax()) == row.ids[t] for t in steps
    )


def test_figures_worked_out_apart(base_dir: Path, tmp_path: Path) -> None:
    """Parity: choices, clozes, pairs and last words have the figures that single forward passes give."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    choices = [{"query": f"the {w}", "choices": ["sat on the mat", "sang", "bird " * n], "gold": n % 3} for n, w in
               enumerate(("cat", "bird", "sea", "tree", "river"), 1)]  # fmt: skip
    right, normed = 0, 0
    for row in choices:
        scores = [log_p(model, tokenizer, row["query"], f" {choice}")[0] for choice in row["choices"]]
        right += max(range(3), key=scores.__getitem__) == row["gold"]
        per = [s / len(choice) for s, choice in zip(scores, row["choices"], strict=True)]
        normed += max(range(3), key=per.__getitem__) == row["gold"]
    figures = score_benchmark(model, tokenizer, read_benchmark(write(tmp_path / "x.jsonl", *choices)))
    assert (figures["n"], figures["acc"], figures["acc_norm"]) == (5, right / 5, normed / 5)
    clozes = [
        {"context_options": [f"the {a}", "a bird"], "continuation": "sat on", "gold": 1} for a in ("cat", "sea", "x")
    ]
    after = [[log_p(model, tokenizer, context, " sat on") for context in row["context_options"]] for row in clozes]
    right = sum(second > first for first, second in after)
    figures = score_benchmark(model, tokenizer, read_benchmark(write(tmp_path / "x.jsonl", *clozes)))
    assert (figures["kind"], figures["acc"]) == ("cloze", right / 3)
    words = [{"context": "the cat sat on the", "continuation": w} for w in ("mat", "bird", "q")]
    apart = [log_p(model, tokenizer, row["context"], f" {row['continuation']}") for row in words]
    figures = score_benchmark(model, tokenizer, read_benchmark(write(tmp_path / "x.jsonl", *words)))
    assert figures["perplexity"] == pytest.approx(math.exp(-sum(p for p, _ in apart) / 3), rel=1e-4)
    assert figures["perplexity_low"] < figures["perplexity"] < figures["perplexity_high"]
    assert figures["acc"] == sum(greedy for _, greedy in apart) / 3


def test_numbers_that_are_written(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked by hand: the last number counts, 8.0 is 8, no number is wrong; the answers come back to their questions."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    said = {"a": " 3, so 8.0 apples", "bb": " 7", "ccc": " none"}

    def answers(model: Any, tokenizer: Any, prompts: list[list[int]], sampling: Any, *, stop: Any) -> list[Answer]:
        texts = [tokenizer.decode(ids) for ids in prompts]
        return [Answer(next(v for k, v in said.items() if f" {k}?" in text), [], "stop") for text in texts]

    monkeypatch.setattr(benchmarks, "generate_answers", answers)
    monkeypatch.setattr(benchmarks, "ANSWER_TOKENS", 8)
    rows = [{"context": f"How {name}?", "answer": "8"} for name in ("ccc", "bb", "a")]
    benchmark = read_benchmark(write(tmp_path / "svamp.jsonl", *rows))
    figures = score_benchmark(model, tokenizer, benchmark)
    assert (figures["kind"], figures["n"], figures["acc"]) == ("answer", 3, 1 / 3)
    long = Benchmark("svamp", "answer", [Question("row 9", ("the cat " * 90,), (" 8",), 0)])
    with pytest.raises(ValueError, match="row 9: no room for 8 new tokens; the model reads 96"):
        score_benchmark(model, tokenizer, long)


def test_long_contexts_are_counted(base_dir: Path, tmp_path: Path) -> None:
    """Law: a context that loses its beginning is scored and counted; a choice longer than the model is refused by its row."""
    rows = [{"query": "the cat " * n, "choices": ["sat", "sang"], "gold": 0} for n in (1, 200, 200)]
    file = write(tmp_path / "x.jsonl", *rows)
    found = run_benchmarks(base_dir, [file], device="cpu")
    assert found["base"]["x"]["n_cut"] == 2
    write(file, rows[0], {"query": "q", "choices": ["sat", "x" * 300], "gold": 0})
    with pytest.raises(ValueError, match=r"x\.jsonl line 2: the continuation has \d+ tokens, but the model reads 96"):
        run_benchmarks(base_dir, [file], device="cpu")


def test_named_tasks(tmp_path: Path) -> None:
    assert named_tasks(["a=x/b.jsonl", "c.tar.zip"]) == [("a", Path("x/b.jsonl")), ("c", Path("c.tar.zip"))]
    odd = write(tmp_path / "a=b.jsonl")
    assert named_tasks([odd]) == [("a=b", odd)]
    for wrong, said in ((["=x"], "the name or the file is empty"), (["x="], "the name or the file is empty"),
                        (["a=1", "a=2"], "the name 'a' is given twice")):  # fmt: skip
        with pytest.raises(ValueError, match=f"--task {wrong[-1]}: {said}; write NAME=FILE"):
            named_tasks(wrong)
    with pytest.raises(ValueError, match="no task given"):
        named_tasks([])
