"""Scores: F1 and windows by hand, answers at their own rows, adapters by record."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune import evaluate
from graft.finetune.data.records import Record
from graft.finetune.evaluate import evaluate_records, f1_scores, run_evaluate, write_answers
from graft.finetune.loading import load_model


def test_f1_by_hand() -> None:
    """Worked by hand: spam: 2 hits of 3, 1 false alarm: F1 = 4 / (3 + 3); ham: 1 hit of 2, 1 false: 2 / (2 + 2); a label
    that nobody predicts has 0, and a predicted word that is no label counts for none."""
    truth = ["spam", "spam", "spam", "ham", "ham", "odd"]
    predicted = ["spam", "spam", "ham", "spam", "ham", "what?"]
    scores = f1_scores(truth, predicted)
    assert scores == {"ham": pytest.approx(2 / 4), "odd": 0, "spam": pytest.approx(4 / 6)}
    assert list(scores) == sorted(scores)


def rows() -> list[Record]:
    return [Record(f"row {i}", prompt="the cat " * n, completion=f" {n}") for i, n in enumerate([3, 1, 2, 5, 4])]


def test_answers_come_back_to_their_rows(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: rows are batched by length, and each answer and each adapter still belongs to its own record."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    batches: list[int] = []

    def echo(model: Any, tokenizer: Tokenizer, prompts: list[list[int]], *, max_new_tokens: int, template: Any, adapters: Any
    ) -> Any:
        batches.append(len(prompts))
        assert [len(p) for p in prompts] == sorted(len(p) for p in prompts)
        assert max_new_tokens == len(tokenizer.encode(" 5")) + 2
        named = adapters or [None] * len(prompts)
        return [f" {tokenizer.decode(p).count('cat')} {name}\n" for p, name in zip(prompts, named, strict=True)]

    monkeypatch.setattr(evaluate, "generate_rows", echo)
    names = ["a", None, "b", "c", None]
    written = write_answers(model, tokenizer, rows(), None, batch_size=2, adapters=names)
    assert written == ["3 a", "1 None", "2 b", "5 c", "4 None"]
    assert batches == [2, 2, 1]


def test_figures_of_answers(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked by hand: 3 of 5 exact matches; five labels are classes with F1 1, 1, 1, 0, 0, twenty-one are not."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    monkeypatch.setattr(evaluate, "write_answers", lambda *a, **k: ["3", "1", "2", "4", "5"])
    figures = evaluate_records(model, tokenizer, rows(), None, batch_size=2)
    assert figures["accuracy"] == pytest.approx(3 / 5)
    assert figures["f1_macro"] == pytest.approx(3 / 5)
    assert (figures["f1_1"], figures["f1_4"], figures["n_records"]) == (1, 0, 5)
    whole = evaluate_records(model, tokenizer, rows(), None, batch_size=99)
    assert whole["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    many = [Record(f"row {i}", prompt="x", completion=f" {i}") for i in range(21)]
    monkeypatch.setattr(evaluate, "write_answers", lambda *a, **k: ["0"] * 21)
    assert "f1_macro" not in evaluate_records(model, tokenizer, many, None)


def test_the_greedy_answer_is_the_answer(base_dir: Path) -> None:
    """Law: a record whose completion is what the model writes in the room given to it is an exact match."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    [first] = write_answers(model, tokenizer, [Record("r", prompt="the cat", completion=" x")], None)
    n = len(tokenizer.encode(" x")) + 2
    ids = tokenizer.encode("the cat").tolist()
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert first == tokenizer.decode(ids[-n:]).strip()


def test_long_texts_in_windows(base_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """Worked out apart, token by token: each but the first of a document is predicted once, from its window's start."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    texts = ["the cat sat on the mat and looked at the bird. " * 12, "a bird sang"]
    (tmp_path / "two.txt").write_text("<|endoftext|>".join(texts))
    window, total, count = model.config.max_seq_len, 0.0, 0
    for text in texts:
        ids = [*tokenizer.encode(text).tolist(), tokenizer.eos_token_id]
        for i in range(1, len(ids)):
            start = (i - 1) // window * window
            if start == i - 1 or i == 1:
                with torch.no_grad():
                    log_p = model(torch.tensor([ids[start : start + window]]))[0].log_softmax(-1)
            total -= log_p[i - 1 - start, ids[i]].item()
            count += 1
    assert count > 2 * window
    figures = run_evaluate(base_dir, tmp_path / "two.txt", device="cpu")
    assert figures["n_documents"] == 2
    assert figures["n_tokens"] == count
    assert figures["loss"] == pytest.approx(total / count, rel=1e-5)  # float32 sums in another order
    n_bytes = sum(len(text.encode()) for text in texts)
    assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-5)


def test_one_token_is_scored_from_nothing(base_dir: Path, tmp_path: Path) -> None:
    """Law: a document of one byte has one label, its end."""
    (tmp_path / "one.txt").write_text("x")
    assert run_evaluate(base_dir, tmp_path / "one.txt", device="cpu")["n_tokens"] == 1


def test_what_cannot_be_scored(base_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps({"text": "c"}))
    with pytest.raises(ValueError, match=r"rows\.jsonl line 2: no answer to compare with"):
        run_evaluate(base_dir, path, device="cpu")
    assert run_evaluate(base_dir, path, limit=1, device="cpu")["n_records"] == 1
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"limit={limit} must be >= 1"):
            run_evaluate(base_dir, path, limit=limit, device="cpu")
    (tmp_path / "none.txt").write_text("<|endoftext|>")
    with pytest.raises(ValueError, match="holds no text to score"):
        run_evaluate(base_dir, tmp_path / "none.txt", device="cpu")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        run_evaluate(base_dir, tmp_path / "gone.jsonl", device="cpu")


def test_a_prompt_without_room_is_named(base_dir: Path) -> None:
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    long = Record("eval.jsonl line 7", prompt="the cat " * 500, completion=" 5")
    with pytest.raises(ValueError, match=r"eval\.jsonl line 7: the prompt has \d+ tokens and the answers need \d+"):
        write_answers(model, tokenizer, [*rows(), long], None)
