"""Worked by hand and law: rows to pairs, both answers in one pass, batches that are a function of seed and step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from graft.base.model.huggingface import load_config
from graft.base.model.transformer import Transformer, initialize_
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.align.logprobs import response_logprobs
from graft.finetune.align.preference_rows import encode_pairs, mismatched
from graft.finetune.align.preferences import Pair, PreferenceBatches, answer_sums, collate_answers
from graft.finetune.align.reference import content_hash
from graft.finetune.data.chat import ChatTemplate, Encoded
from graft.finetune.data.preferences import read_preferences, to_preference
from graft.finetune.data.records import to_record

MESSAGES = [{"role": "user", "content": "hi"}]


def document(prompt: list[int], answer: list[int]) -> Encoded:
    ids = np.array([*prompt, *answer], np.int32)
    return Encoded(ids, np.arange(len(ids)) >= len(prompt))


def pair(i: int, n_chosen: int, n_rejected: int) -> Pair:
    """A pair whose tokens say whose they are."""
    return Pair(document([i, i], [100 + i] * n_chosen), document([i, i], [200 + i] * n_rejected))


def some_pairs(n: int = 7) -> list[Pair]:
    return [pair(i, 1 + i % 3, 1 + (2 * i) % 5) for i in range(n)]


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a", ["b", "c"]),
        ({"prompt": MESSAGES, "chosen": [{"role": "assistant", "content": "b"}],
          "rejected": [{"role": "assistant", "content": "c"}]}, "user", ["b", "c"]),
        ({"instruction": "a", "input": "", "output": "b", "chosen": "b", "rejected": "c"}, "user", ["b", "c"]),
        ({"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "b"},
          "rejected": {"from": "gpt", "value": "c"}}, "user", ["b", "c"]),
        ({"chosen": [*MESSAGES, {"role": "assistant", "content": "b"}],
          "rejected": [*MESSAGES, {"role": "assistant", "content": "c"}]}, "user", ["b", "c"]),
        ({"chosen": [*MESSAGES, {"role": "assistant", "content": "b"}],
          "rejected": [*MESSAGES, {"role": "assistant", "content": "b"}]}, "user", ["b", "b"]),
    ],
)  # fmt: skip
def test_both_answers_as_records(row, prompt, answers):
    """Every layout of a preference row gives two fine-tuning records with one prompt, equal answers too."""
    one = to_preference(to_record(row, "x line 1"))
    for side, answer in zip((one.chosen, one.rejected), answers, strict=True):
        record = one.answered(side)
        assert (record.chosen, record.rejected) == (None, None)
        if prompt == "a":
            assert (record.prompt, record.completion) == ("a", answer)
        else:
            assert [m["role"] for m in record.messages] == ["user", "assistant"]
            assert record.messages[-1]["content"] == answer
            assert record.n_prompt_messages == 1


def test_encode_pairs(tokenizer_dir: Path, tmp_path: Path):
    """Law: prompt tokens are the same in both, the loss is on the answers; equal pairs are counted and left out; a prompt that
    fills the context names its line."""
    rows = [
        {"prompt": "the cat", "chosen": " sat", "rejected": " slept"},
        {"prompt": "the cat", "chosen": " sat", "rejected": " sat"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = Tokenizer.load(tokenizer_dir)
    found = encode_pairs(read_preferences([file]), tokenizer, None, 50)
    [one] = found.pairs
    assert (found.n_equal, found.n_cut, found.is_chat) == (1, 0, False)
    for encoded, answer in ((one.chosen, " sat"), (one.rejected, " slept")):
        start = int(encoded.loss_mask.argmax())
        assert tokenizer.decode(encoded.ids[:start].tolist()) == "the cat"
        assert tokenizer.decode(encoded.ids[start:].tolist()).startswith(answer)
    with pytest.raises(
        ValueError, match=r"chosen equals rejected in all 1 rows \(in their first max_seq_len=50 tokens\)"
    ):
        encode_pairs(read_preferences([file])[1:], tokenizer, None, 50)
    with pytest.raises(ValueError, match=r"pairs.jsonl line 1: no label is left after truncation to max_seq_len=2"):
        encode_pairs(read_preferences([file]), tokenizer, ChatTemplate.of(tokenizer), 2)


def test_packed_layout():
    """Two answers of 3 and 4 tokens, rounded up to 8: see the picture in preferences.py."""
    batch = collate_answers([document([1, 2], [3]), document([1, 2], [4, 5])], packed=True, multiple_of=8, pad_id=9)
    assert batch["ids"].tolist() == [[1, 2, 3, 1, 2, 4, 5, 9]]
    assert batch["mask"].int().tolist() == [[0, 0, 1, 0, 0, 1, 1, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 7, 8]
    values = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 99]], requires_grad=True)
    sums = answer_sums(values, batch["lengths"])
    assert sums.tolist() == [6, 22]
    (grad,) = torch.autograd.grad((sums * torch.tensor([1.0, 10])).sum(), values)
    assert grad.tolist() == [[1, 1, 1, 10, 10, 10, 10, 0]]


def test_padded_layout():
    batch = collate_answers([document([1, 2], [3]), document([], [4, 5])], packed=False, multiple_of=4, pad_id=9)
    assert batch["ids"].tolist() == [[1, 2, 3, 9], [4, 5, 9, 9]]
    assert batch["mask"].int().tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]  # a first token can't be scored
    assert answer_sums(torch.ones(2, 4) * batch["mask"], batch["lengths"]).tolist() == [1, 1]
    one = collate_answers([document([1], [3])], packed=False, multiple_of=4)
    assert answer_sums(torch.ones(1, 4) * one["mask"], one["lengths"]).tolist() == [1]


def test_packed_is_padded(base_dir: Path):
    """Law: the sums of log-probabilities of each answer, and the gradients, are the same packed and padded (float32 sums in
    another order)."""
    model = Transformer(load_config(base_dir))
    initialize_(model, seed=1)
    results = []
    for packed in (True, False):
        batches = PreferenceBatches(some_pairs(), batch_size=7, max_tokens=200, packed=packed, multiple_of=8)
        [batch] = batches.batch_at(0)
        where = {name: batch.get(name) for name in ("positions", "cu_seqlens")}
        logp = response_logprobs(model, batch["ids"], batch["mask"], **where)
        sums = answer_sums(logp, batch["lengths"]).view(-1, 2)[batch["index"].argsort()]
        grads = torch.autograd.grad((sums * torch.arange(14.0).view(7, 2)).sum(), list(model.parameters()))
        results.append((sums, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_batches(packed):
    """Law: an epoch sees every pair once; no micro-batch is over max_tokens; both answers of a pair stand side by side with
    their reference; the same seed and step give the same tensors, another seed others."""
    pairs = some_pairs(12)
    ref = torch.arange(24.0).view(12, 2)
    options = {"batch_size": 4, "max_tokens": 40, "packed": packed, "multiple_of": 4, "ref_logp": ref}
    batches = PreferenceBatches(pairs, seed=3, **options)
    for epoch in (0, 1):
        seen = []
        for step in range(3 * epoch, 3 * epoch + 3):
            for batch in batches.batch_at(step):
                assert batch["ids"].numel() <= 40
                assert batch["ids"].shape[1] % 4 == 0
                assert torch.equal(batch["ref_logp"], ref[batch["index"]])
                seen += batch["index"].tolist()
                labels = answer_sums(batch["ids"] * batch["mask"].double(), batch["lengths"])
                n_labels = answer_sums(batch["mask"].double(), batch["lengths"])
                means = (labels / n_labels).view(-1, 2)
                assert torch.equal(means, torch.stack([100.0 + batch["index"], 200.0 + batch["index"]], 1).double())
        assert sorted(seen) == list(range(12))
    assert PreferenceBatches(pairs, seed=3, **options).pairs_at(5) == batches.pairs_at(5)
    assert PreferenceBatches(pairs, seed=4, **options).pairs_at(0) != batches.pairs_at(0)


def test_batches_refuse():
    with pytest.raises(ValueError, match="no pairs to train on"):
        PreferenceBatches([], batch_size=1, max_tokens=9)
    with pytest.raises(ValueError, match="batch_size=0 must be >= 1"):
        PreferenceBatches(some_pairs(), batch_size=0, max_tokens=99)
    with pytest.raises(ValueError, match=r"pair 2 takes 12 positions, a micro-batch holds max_tokens=11"):
        PreferenceBatches(some_pairs(), batch_size=1, max_tokens=11)
    with pytest.raises(ValueError, match=r"ref_logp has shape \(3, 2\); 7 pairs need \(7, 2\)"):
        PreferenceBatches(some_pairs(), batch_size=1, max_tokens=99, ref_logp=torch.zeros(3, 2))


def test_content_hash():
    """Law: equal for equal pairs; another token, mask or order is another hash."""
    a, b = pair(1, 2, 3), pair(2, 2, 3)
    assert content_hash([a, b]) == content_hash([pair(1, 2, 3), pair(2, 2, 3)])
    other_mask = Pair(Encoded(a.chosen.ids, ~a.chosen.loss_mask), a.rejected)
    hashes = {content_hash(p) for p in ([a, b], [b, a], [a], [Pair(a.rejected, a.chosen), b], [other_mask, b])}
    assert len(hashes) == 5


def test_mismatched():
    """Prompts [1], [2, 2], [3] with answers a, b, c become 1 b, 2 2 c, 3 a."""
    rows = [document([1], [7]), document([2, 2], [8, 8]), document([3], [9])]
    assert [m.ids.tolist() for m in mismatched(rows)] == [[1, 8, 8], [2, 2, 9], [3, 7]]
    assert [m.loss_mask.tolist() for m in mismatched(rows)] == [
        [False, True, True],
        [False, False, True],
        [False, True],
    ]
    with pytest.raises(ValueError, match="KTO's KL estimate needs at least 2 rows in a micro-batch, got 1"):
        mismatched(rows[:1])
