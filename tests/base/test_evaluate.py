"""Loss, bits per byte and the bigram model, against arithmetic by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from graft.base.data.shards import TokenShards
from graft.base.evaluate import bigram_loss, bits_per_byte, mean_loss


class Constant(nn.Module):
    """Gives every position the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*ids.shape, -1)


def shards(folder: Path, name: str, ids: list[int]) -> TokenShards:
    np.array(ids, dtype=np.uint16).tofile(folder / f"{name}-00000.bin")
    entry = {"n_tokens": len(ids), "n_bytes": len(ids), "n_documents": 1, "files": [f"{name}-00000.bin"]}
    return TokenShards(folder, name, {"dtype": "uint16", "splits": {name: entry}})


def test_bits_per_byte_by_hand() -> None:
    """Worked by hand: ln 2 nats a token are 1 bit; 30 tokens on 60 bytes make half a bit a byte."""
    assert bits_per_byte(math.log(2), n_tokens=30, n_bytes=60) == pytest.approx(0.5)
    # a uniform model over bytes, one token a byte, needs 8 bits each
    assert bits_per_byte(math.log(256), n_tokens=7, n_bytes=7) == pytest.approx(8)


def test_mean_loss_weighs_labels_not_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked by hand: p = (1/2, 1/4, 1/4). Three labels 0 in one batch and one label 1 in the next: (3 ln 2 + ln 4) / 4."""
    model = Constant([math.log(0.5), math.log(0.25), math.log(0.25)])
    from graft.base import evaluate

    monkeypatch.setattr(
        evaluate,
        "next_token_loss",
        lambda m, b: nn.functional.cross_entropy(m(b["ids"]).flatten(0, 1), b["targets"].flatten(), reduction="sum"),
    )
    ids = torch.zeros(1, 4, dtype=torch.int64)
    batches = [
        {"ids": ids, "targets": torch.tensor([[0, 0, 0, -100]])},
        {"ids": ids, "targets": torch.tensor([[-100, 1, -100, -100]])},
    ]
    assert mean_loss(model, batches) == pytest.approx((3 * math.log(2) + math.log(4)) / 4)
    assert math.isnan(mean_loss(model, []))
    model.train()
    mean_loss(model, batches)
    assert model.training
    assert model.logits.grad is None


def test_bigram_loss_by_hand(tmp_path: Path) -> None:
    """Worked by hand on 0 1 0 1 1 (V = 2): p(0) = (2 + 1) / 7, p(1) = (3 + 1) / 7; n(0) = 2, n(01) = 2, n(1) = 2 as a
    first token, n(10) = n(11) = 1. On 0 1 0 the loss is minus the mean of ln p(1|0) and ln p(0|1) with
    p(1|0) = (2 + s 4/7) / (2 + s), p(0|1) = (1 + s 3/7) / (2 + s), at the best s."""
    train, val = shards(tmp_path, "train", [0, 1, 0, 1, 1]), shards(tmp_path, "val", [0, 1, 0])
    by_s = [
        -0.5 * (math.log((2 + s * 4 / 7) / (2 + s)) + math.log((1 + s * 3 / 7) / (2 + s)))
        for s in (1, 3, 10, 30, 100, 300, 1000)
    ]
    assert bigram_loss(train, val, vocab_size=2) == pytest.approx(min(by_s))


def test_bigram_loss_is_a_distribution(tmp_path: Path) -> None:
    """Law: p(.|a) sums to 1 for each a, so on every continuation of one token the probabilities of the model add up;
    unseen pairs cost more than seen ones, and a never seen token stays finite."""
    train = shards(tmp_path, "train", [0, 1, 2, 0, 1, 2, 0, 1])
    n, s = 4, 1.0
    unigram = (np.bincount([0, 1, 2, 0, 1, 2, 0, 1], minlength=n) + 1) / (8 + n)
    seen = {(0, 1): 3, (1, 2): 2, (2, 0): 2}
    total = sum((seen.get((0, b), 0) + s * unigram[b]) / (3 + s) for b in range(n))
    assert total == pytest.approx(1)
    likely = bigram_loss(train, shards(tmp_path, "val", [0, 1, 2]), vocab_size=n)
    unlikely = bigram_loss(train, shards(tmp_path, "val", [1, 0, 2]), vocab_size=n)
    never = bigram_loss(train, shards(tmp_path, "val", [0, 3, 3]), vocab_size=n)
    assert likely < unlikely
    assert math.isfinite(never)
