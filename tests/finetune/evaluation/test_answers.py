"""Answers at their own rows, adapters by record."""

from pathlib import Path
from typing import Any

import pytest
import torch

from graft.base.generate.sampling import Sampling
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.data.records import Record
from graft.finetune.evaluation import answers
from graft.finetune.evaluation.answers import sample_figures, write_answers
from graft.finetune.evaluation.options import EvalOptions
from graft.finetune.loading import load_model


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

    monkeypatch.setattr(answers, "generate_rows", echo)
    names = ["a", None, "b", "c", None]
    written = write_answers(model, tokenizer, rows(), None, batch_size=2, adapters=names)
    assert written == ["3 a", "1 None", "2 b", "5 c", "4 None"]
    assert batches == [2, 2, 1]


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


def test_a_prompt_without_room_is_named(base_dir: Path) -> None:
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    long = Record("eval.jsonl line 7", prompt="the cat " * 500, completion=" 5")
    with pytest.raises(ValueError, match=r"eval\.jsonl line 7: the prompt has \d+ tokens and the answers need \d+"):
        write_answers(model, tokenizer, [*rows(), long], None)


def test_pass_at_k_by_hand(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked by hand, 4 samples each: 2 right: pass@1 1/2, pass@2 1 - C(2,2)/C(4,2) = 5/6; none right: 0. The majority of
    8, 7, 7, 9 is 7, which is right; that of wrong ones is wrong. Every sample has a seed of its own."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    drawn = {7: ["8", "so #### 7", "#### 7", "9"], 5: ["1", "2", "3", "3"]}
    seeds: list[int] = []

    def draw(
        model: Any, tokenizer: Any, prompts: list[list[int]], sampling: list[Sampling], **options: Any
    ) -> list[str]:
        seeds.extend(one.seed for one in sampling)
        assert {(one.temperature, one.top_p, one.max_new_tokens) for one in sampling} == {(0.8, 0.95, 11)}
        return [drawn[7 if "bird" in tokenizer.decode(prompt) else 5].pop(0) for prompt in prompts]

    monkeypatch.setattr(answers, "generate_rows", draw)
    records = [Record("a", prompt="a bird", completion=" 7"), Record("b", prompt="the cat sat", completion=" 5")]
    options = EvalOptions(n_samples=4, batch_size=3, seed=10, max_new_tokens=11, pass_k=(1, 2))
    figures = sample_figures(model, tokenizer, records, None, options=options)
    assert sorted(seeds) == list(range(10, 18))
    assert figures["pass@1"] == pytest.approx((1 / 2 + 0) / 2)
    assert figures["pass@2"] == pytest.approx((5 / 6 + 0) / 2)
    assert figures["majority"] == 1 / 2
    assert figures["n_samples"] == 4


def test_samples_do_not_depend_on_the_batch(base_dir: Path) -> None:
    """Law: the same seed gives the same samples in batches of any size."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    found = [
        sample_figures(
            model, tokenizer, rows(), None, options=EvalOptions(n_samples=3, batch_size=size, verify="regex:a")
        )
        for size in (1, 99)
    ]
    assert found[0] == found[1]
    assert 0 < found[0]["pass@1"] < 1
