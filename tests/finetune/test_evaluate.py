"""Scores: F1 and windows by hand, answers at their own rows, adapters by record."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.base.generate.sampling import Sampling
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune import evaluate
from graft.finetune.adapters.files import save_adapter
from graft.finetune.adapters.lora import LoraConfig, attach_lora, lora_layers
from graft.finetune.data.records import Record
from graft.finetune.evaluate import (
    EvalOptions,
    compare,
    evaluate_records,
    f1_scores,
    most_likely,
    run_evaluate,
    wilson_interval,
    write_answers,
)
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

    def echo(
        model: Any, tokenizer: Tokenizer, prompts: list[list[int]], sampling: Sampling, *, template: Any, adapters: Any
    ) -> Any:
        batches.append(len(prompts))
        assert [len(p) for p in prompts] == sorted(len(p) for p in prompts)
        assert sampling.max_new_tokens == len(tokenizer.encode(" 5")) + 2
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


def test_wilsons_interval_by_hand() -> None:
    """Worked by hand, z = 1.96: of 10 right in 10, low = n / (n + z^2) = 10 / 13.8415 and high 1; of 5 in 10 the middle is
    0.5 and half = z sqrt(0.25 / 10 + z^2 / 400) / (1 + z^2 / 10)."""
    assert wilson_interval(10, 10) == pytest.approx((10 / 13.8415, 1), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0, 1 - 10 / 13.8415), abs=1e-4)
    half = 1.959964 * math.sqrt(0.025 + 1.959964**2 / 400) / (1 + 1.959964**2 / 10)
    assert wilson_interval(5, 10) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-9)
    with pytest.raises(ValueError, match="0 of 0 is no share"):
        wilson_interval(0, 0)


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


def test_rows_that_cannot_be_scored_are_listed_together_or_dropped(base_dir: Path, tmp_path: Path) -> None:
    """Law: empty rows, rows without an answer and prompts without room are all in one message, or counted."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": None}, {"prompt": "the cat " * 90, "completion": " b"},
        {"prompt": "d", "completion": " "}, {"prompt": "the cat " * 91, "completion": " b"},
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ValueError,
        match=r"4 rows can't be used: .*line 2: completion is null.*line 4: completion is empty.*line 3: the prompt has \d+ tok"
        r".*line 5: the prompt has",
    ):
        run_evaluate(base_dir, path, device="cpu")
    figures = run_evaluate(base_dir, path, device="cpu", on_empty="drop", on_too_long="drop")
    assert (figures["n_records"], figures["n_empty"], figures["n_too_long"]) == (1, 2, 2)
    alone = run_evaluate(base_dir, path, device="cpu", limit=1)
    assert figures == {**alone, "n_empty": 2, "n_too_long": 2}
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match=r"none of the 1 records is left to score"):
        run_evaluate(base_dir, path, device="cpu", on_empty="drop")


def test_several_adapters_on_one_base(base_dir: Path, tmp_path: Path) -> None:
    """Law: each row of the comparison is the adapter's own evaluation, and the base's has none."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": r.prompt, "completion": r.completion}) for r in rows()))
    folders = {}
    for seed, name in enumerate("ab"):
        model, config = load_model(base_dir), LoraConfig(rank=2)
        attach_lora(model, config, seed=seed)
        for _, layer in lora_layers(model):
            layer.updates["default"].lora_b.data.normal_(generator=torch.Generator().manual_seed(seed))
        save_adapter(model, tmp_path / name, config, base=str(base_dir))
        folders[name] = tmp_path / name
    done: list[tuple[int, int]] = []
    found = compare(base_dir, path, folders, device="cpu", progress=lambda *n: done.append(n))
    assert list(found) == ["base", "a", "b"]
    assert done[-1] == (5, 5)
    for name, figures in found.items():
        assert figures == run_evaluate(base_dir, path, adapter=folders.get(name), device="cpu")
    assert len({figures["loss"] for figures in found.values()}) == 3
    with pytest.raises(ValueError, match="adapter name 'base' is the bare base's here"):
        compare(base_dir, path, {"base": tmp_path / "a"}, device="cpu")
