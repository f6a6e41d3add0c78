"""Figures of records: by hand, and token by token."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.data.records import Record
from graft.finetune.evaluation import records as scored
from graft.finetune.evaluation.labels import most_likely
from graft.finetune.evaluation.metrics import wilson_interval
from graft.finetune.evaluation.options import EvalOptions
from graft.finetune.evaluation.records import evaluate_records
from graft.finetune.loading import load_model


def rows() -> list[Record]:
    return [Record(f"row {i}", prompt="the cat " * n, completion=f" {n}") for i, n in enumerate([3, 1, 2, 5, 4])]


def test_figures_of_answers(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked by hand: 3 of 5 exact matches; five labels are classes with F1 1, 1, 1, 0, 0, twenty-one are not."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    monkeypatch.setattr(scored, "write_answers", lambda *a, **k: ["3", "1", "2", "4", "5"])
    figures = evaluate_records(model, tokenizer, rows(), None, batch_size=2)
    assert figures["accuracy"] == pytest.approx(3 / 5)
    assert figures["f1_macro"] == pytest.approx(3 / 5)
    assert (figures["f1_1"], figures["f1_4"], figures["n_records"]) == (1, 0, 5)
    whole = evaluate_records(model, tokenizer, rows(), None, batch_size=99)
    assert whole["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    many = [Record(f"row {i}", prompt="x", completion=f" {i}") for i in range(21)]
    monkeypatch.setattr(scored, "write_answers", lambda *a, **k: ["0"] * 21)
    assert "f1_macro" not in evaluate_records(model, tokenizer, many, None)


def test_a_cut_answer_is_counted(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: an answer that doesn't fit behind its prompt is counted, and bits a byte, whose bytes aren't known, aren't given."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    monkeypatch.setattr(scored, "write_answers", lambda *a, **k: ["x", "y"])
    records = [Record("a", prompt="the", completion=" xyz" * 90), Record("b", prompt="the", completion=" y")]
    figures = evaluate_records(model, tokenizer, records, None, options=EvalOptions(max_new_tokens=4))
    assert (figures["n_cut"], "bits_per_byte" in figures) == (1, False)
    figures = evaluate_records(model, tokenizer, records[1:] * 2, None, options=EvalOptions(max_new_tokens=4))
    assert ("n_cut" in figures, "bits_per_byte" in figures) == (False, True)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"score": "likelihood"}, "--score likelihood"), ({"metrics": ("bleu",)}, "--metric"), ({"n_samples": 2}, "--samples"),
        ({"max_new_tokens": 3}, "--max-new-tokens"),
    ],
)  # fmt: skip
def test_text_has_no_answers(base_dir: Path, options: dict[str, Any], flag: str) -> None:
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    with pytest.raises(ValueError, match=f"{flag} is about answers, the data is text without any"):
        evaluate_records(model, tokenizer, [Record("a", text="the cat")], None, options=EvalOptions(**options))


def test_the_most_likely_answer_worked_out_apart(base_dir: Path) -> None:
    """Worked out apart, token by token: the answer of the largest sum of log-probabilities, whatever the batch."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    labels = [" sat on", " bird", " q"]
    prompts = ["the cat", "a bird sang in the", "r", "the sea is", "the cat sat on the mat and"]
    records = [Record(f"r {i}", prompt=p, completion=labels[i % 3]) for i, p in enumerate(prompts)]
    expected = []
    for prompt in prompts:
        sums = {}
        for label in labels:
            ids, total = tokenizer.encode(prompt).tolist(), 0.0
            for token in tokenizer.encode(label).tolist():
                with torch.no_grad():
                    total += model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token].item()
                ids.append(token)
            sums[label] = total
        expected.append(max(sums, key=lambda label: sums[label]).strip())
    for size in (1, 4, 99):
        options = EvalOptions(score="likelihood", batch_size=size)
        assert most_likely(model, tokenizer, records, None, options=options) == expected
    figures = evaluate_records(model, tokenizer, records, None, options=EvalOptions(score="likelihood"))
    n_right = sum(labels[i % 3].strip() == label for i, label in enumerate(expected))
    assert (figures["n_correct"], figures["accuracy"], figures["score"]) == (n_right, n_right / 5, "likelihood")
    assert (figures["accuracy_low"], figures["accuracy_high"]) == wilson_interval(n_right, 5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    n_labels = sum(len(tokenizer.encode(r.completion or "")) + 1 for r in records)  # and the end
    n_bytes = sum(len(r.completion or "") for r in records)
    assert figures["bits_per_byte"] == pytest.approx(figures["loss"] * n_labels / n_bytes / math.log(2))
    many = [Record(f"r {i}", prompt="x", completion=f" {i}") for i in range(21)]
    with pytest.raises(ValueError, match="compares few answers, the records have 21 distinct ones"):
        most_likely(model, tokenizer, many, None)
    with pytest.raises(ValueError, match="--score 'best' is unknown; choose exact, likelihood"):
        EvalOptions(score="best")  # pyright: ignore[reportArgumentType]
