"""Beam search: transformers' own on the same weights, every sequence by hand, stop rules, adapters, bad input."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graft.base.generate.beam import beam_search
from graft.base.generate.engine import generate_ids
from graft.base.generate.sampling import Sampling
from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import save_model
from graft.base.model.transformer import Transformer

CONFIG = ModelConfig(31, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_ff=64, max_seq_len=48)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Wide weights, so that log-probabilities differ by much more than rounding, and sequences end at different lengths."""
    built = Transformer(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return built.eval()


def log_p_of(model: Transformer, prompt: list[int], new: Sequence[int]) -> float:
    with torch.no_grad():
        table = model(torch.tensor([[*prompt, *new]]))[0].log_softmax(-1)
    return sum(table[len(prompt) + i - 1, token].item() for i, token in enumerate(new))


def test_tokens_are_those_of_transformers(model: Transformer, tmp_path: Path) -> None:
    """Parity: each of the returned sequences and its score, for several widths, length penalties, stop tokens and prompts."""
    transformers = pytest.importorskip("transformers")
    save_model(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    n_ended = 0
    settings: list[tuple[int, float, Sequence[int], list[int], float]] = [
        (2, 1.0, range(5, 9), [1, 2, 3], 1.0), (3, 0.0, [5, 25], [4], 1.0), (4, 2.0, range(4), [6, 5, 4, 3, 2, 1], 1.0),
        (3, -1.0, range(9, 14), [9, 9], 1.0), (5, 1.0, range(7), [10, 11], 1.0), (3, 1.0, [29, 30], [12, 13], 1.3),
        (3, 1.0, range(4), [13, 0], 1.0),
    ]  # fmt: skip
    for n_beams, penalty, stops, prompt, repetition in settings:
        found = beam_search(
            model, prompt, Sampling(max_new_tokens=12, stop_ids=stops, repetition_penalty=repetition),
            n_beams=n_beams, length_penalty=penalty,
        )  # fmt: skip
        expected = peer.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=12,
            num_beams=n_beams, num_return_sequences=n_beams, length_penalty=penalty, eos_token_id=list(stops), pad_token_id=30,
            repetition_penalty=repetition, do_sample=False, early_stopping=False, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        for one, ids, score in zip(found, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True):
            theirs = ids[len(prompt) : len(prompt) + len(one.ids)]
            assert one.ids == theirs, (n_beams, penalty)
            assert set(ids[len(prompt) + len(one.ids) :]) <= {30}
            assert one.score == pytest.approx(score, abs=1e-4)  # float32 sums
            n_ended += one.ended
    assert n_ended > 5  # stop tokens did come


def test_wide_beams_find_the_best_of_all(model: Transformer) -> None:
    """Worked out apart: with as many beams as there are sequences, the best is the best of all 31 x 31."""
    [best, *_] = beam_search(model, [1, 2], Sampling(max_new_tokens=2), n_beams=31, length_penalty=0.0)
    with torch.no_grad():
        first, second = model(torch.tensor([[1, 2, token] for token in range(31)])).log_softmax(-1)[:, 1:].unbind(1)
    every = first[0][:, None] + second  # (31, 31)
    assert tuple(best.ids) == divmod(int(every.argmax()), 31)
    assert best.score == pytest.approx(every.max().item(), abs=1e-4)
    assert not best.ended


def test_one_beam_is_greedy(model: Transformer) -> None:
    """Law: a single beam follows the most probable token, up to the stop token."""
    greedy = generate_ids(model, [[3, 4]], Sampling(max_new_tokens=10))[0]
    [one] = beam_search(model, [3, 4], Sampling(max_new_tokens=10), n_beams=1)
    assert one.ids == greedy
    [stopped] = beam_search(model, [3, 4], Sampling(max_new_tokens=10, stop_ids=[greedy[4]]), n_beams=1)
    first = greedy.index(greedy[4])
    assert (stopped.ids, stopped.ended) == (greedy[: first + 1], True)
    assert stopped.score == pytest.approx(log_p_of(model, [3, 4], stopped.ids) / len(stopped.ids), abs=1e-4)


def test_what_may_come_and_what_ends(model: Transformer) -> None:
    """Law: forbidden ids never come; a text that `ends` says is over is finished where it was."""
    allowed = torch.zeros(31, dtype=torch.bool)
    allowed[[4, 5, 6]] = True
    found = beam_search(model, [1], Sampling(max_new_tokens=3), n_beams=4, allowed=allowed)
    assert {token for one in found for token in one.ids} <= {4, 5, 6}
    assert len(found) == 4
    only = torch.zeros(31, dtype=torch.bool)
    only[4] = True  # fewer sequences than beams
    assert [one.ids for one in beam_search(model, [1], Sampling(max_new_tokens=3), n_beams=4, allowed=only)] == [
        [4, 4, 4]
    ]
    found = beam_search(model, [1], Sampling(max_new_tokens=9), n_beams=3, ends=lambda ids: len(ids) == 2)
    assert [(len(one.ids), one.ended) for one in found] == [(2, True)] * 3


def test_the_adapter_acts_on_every_beam(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: each call of the model runs under the rows' adapter, as many times as there are rows."""
    asked: list[list[str | None]] = []

    class Block:
        def __enter__(self) -> None: ...
        def __exit__(self, *error: Any) -> None: ...

    monkeypatch.setattr(model, "row_selector", lambda names: (asked.append(list(names)), Block())[1])
    beam_search(model, [1, 2], Sampling(max_new_tokens=3), n_beams=2, adapter="a")
    assert asked == [["a"], ["a", "a"], ["a", "a"]]
    monkeypatch.setattr(model, "row_selector", None)
    with pytest.raises(ValueError, match="adapter 'a' is named, but the model has no bank"):
        beam_search(model, [1, 2], Sampling(max_new_tokens=3), n_beams=2, adapter="a")


def test_what_is_refused(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (([1], Sampling(), 0), "beams=0 must be >= 1"),
        (([1], Sampling(temperature=0.5), 2), "beam search takes the most probable text; leave temperature"),
        (([], Sampling(), 2), "the prompt has no token"),
        (([31], Sampling(), 2), "the prompt holds id 31, the model's ids are 0 to 30"),
        (([1] * 40, Sampling(max_new_tokens=9), 2), "the prompt has 40 tokens; with max_new_tokens=9 that is more"),
    ):
        prompt, sampling, n_beams = arguments
        with pytest.raises(ValueError, match=message):
            beam_search(model, prompt, sampling, n_beams=n_beams)
    nan = SimpleNamespace(forward=lambda x: x @ torch.full((32, 31), float("nan")))
    monkeypatch.setattr(model.lm_head, "forward", nan.forward)
    with pytest.raises(ValueError, match="logits hold NaN or infinity"):
        beam_search(model, [1], Sampling(max_new_tokens=2), n_beams=2)


def test_cache_rows_change_places(model: Transformer) -> None:
    """Law: after select_rows each row goes on as the row it was; more rows than the cache has room for are refused."""

    def last(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return model(rows)[:, -1]

    rows = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    cache = model.new_cache(3, 5)
    with torch.no_grad():
        model(rows, cache=cache)
        for order in ([2, 0, 0], [1, 0], [0, 1], [1, 1, 0]):
            cache.select_rows(order)
            rows = rows[order]
        found = model(torch.tensor([[10], [11], [12]]), cache=cache)[:, -1]
    expected = last(torch.cat([rows, torch.tensor([[10], [11], [12]])], 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="4 rows are more than the 3 of the cache"):
        cache.select_rows([0, 0, 0, 0])
