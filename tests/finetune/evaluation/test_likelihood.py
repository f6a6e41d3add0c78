"""Likelihoods of continuations: equal to plain forward passes, whatever is shared and batched; pairs cut as the harness does."""

import random
from pathlib import Path

import pytest
import torch

from graft.base.model.transformer import Transformer
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.evaluation import likelihood
from graft.finetune.evaluation.likelihood import Row, cut_to, encode_pair, score_groups
from graft.finetune.loading import load_model


def plain(model: Transformer, row: Row) -> tuple[float, bool]:
    """(log p, greedy) by one forward pass over the row alone."""
    with torch.no_grad():
        log_p = model(torch.tensor([row.ids[:-1]]))[0].double().log_softmax(-1)
    chosen = [
        (log_p[t - 1, row.ids[t]].item(), int(log_p[t - 1].argmax()) == row.ids[t])
        for t in range(row.n_given, len(row.ids))
    ]
    return sum(p for p, _ in chosen), all(best for _, best in chosen)


def groups_of(model: Transformer) -> list[list[Row]]:
    """Groups that share all, some or nothing, of one row and of several, some with a greedy continuation."""
    rng = random.Random(0)
    draw = lambda n: tuple(rng.randrange(model.config.vocab_size) for _ in range(n))  # noqa: E731
    context = draw(9)
    greedy = list(context)
    for _ in range(3):
        with torch.no_grad():
            greedy.append(int(model(torch.tensor([greedy]))[0, -1].argmax()))
    return [
        [Row((*context, *draw(n)), 9) for n in (1, 4, 2)],
        [Row((*context, *draw(1)), 9) for _ in range(3)],  # nothing but the context is read
        [Row(draw(5), 1)],
        [Row(draw(n), n - 2) for n in (6, 3)],  # nothing shared
        [Row((*context[:4], *draw(3)), 1), Row((*context[:4], *draw(5)), 1)],  # scored inside the shared beginning
        [Row(tuple(greedy), 9), Row((*context, *draw(20)), 9)],
        [Row(draw(2), 1), Row(draw(97), 1)],  # as long as the model reads
    ]


def test_the_same_as_plain_passes(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity: sums and greediness of each row are those of a forward pass over it alone, for any batch and any bound on the
    logits held at once."""
    model = load_model(base_dir)
    groups = groups_of(model)
    expected = [[plain(model, row) for row in group] for group in groups]
    assert sum(best for group in expected for _, best in group) == 1
    for batch_tokens, logits in ((1, 1), (60, 1 << 12), (10**6, 1 << 24)):
        monkeypatch.setattr(likelihood, "LOGITS", logits)
        done: list[tuple[int, int]] = []
        found = score_groups(model, groups, batch_tokens=batch_tokens, progress=lambda *n, done=done: done.append(n))
        for group, scored, truth in zip(groups, found, expected, strict=True):
            assert [one.n_tokens for one in scored] == [len(row.ids) - row.n_given for row in group]
            # float32 sums in another order, up to 96 of them
            assert [one.log_p for one in scored] == pytest.approx([log_p for log_p, _ in truth], abs=2e-3)
            assert [one.greedy for one in scored] == [best for _, best in truth]
        assert done[-1] == (len(groups), len(groups))
        assert len(done) == (len(groups) if batch_tokens == 1 else len(done))
    assert not model.training


def test_what_is_shared_is_read_once(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked by hand: 3 rows that share 20 tokens and have rests of 2, 3 and 3: 20 read once and 3 x 2 (the last token is
    only a target), and no logits but those of 1 shared and 2 + 1 + 2 own positions."""
    model = load_model(base_dir)
    context = tuple(range(40, 60))
    group = [Row((*context, *rest), 20) for rest in ((1, 2), (3, 4, 5), (6, 7, 8))]
    read, scored = [], []
    forward, head = type(model).hidden_states, model.lm_head.forward
    monkeypatch.setattr(
        type(model), "hidden_states", lambda self, ids, **k: (read.append(ids.shape), forward(self, ids, **k))[1]
    )
    monkeypatch.setattr(model.lm_head, "forward", lambda x: (scored.append(len(x)), head(x))[1])
    score_groups(model, [group])
    assert read == [(1, 20), (3, 2)]
    assert scored == [1 + 1 + 2 + 2]


def test_pairs_are_cut_as_the_harness_cuts_them(base_dir: Path) -> None:
    """Worked by hand: spaces at the context's end go to the continuation; an empty context is the end-of-text token; the
    whole is encoded and the context's length given; a continuation that merges into the context keeps one token."""
    tokenizer = Tokenizer.load(base_dir)
    eos = tokenizer.eos_token_id
    row = encode_pair(tokenizer, "the cat ", "sat")
    assert row == encode_pair(tokenizer, "the cat", " sat")
    assert row.ids == tuple(tokenizer.encode("the cat sat").tolist())
    assert row.n_given == len(tokenizer.encode("the cat"))
    assert encode_pair(tokenizer, "", "the cat") == Row((eos, *tokenizer.encode("the cat").tolist()), 1)
    assert encode_pair(tokenizer, "  ", "cat") == Row((eos, *tokenizer.encode("  cat").tolist()), 1)
    merged = encode_pair(tokenizer, "th", "e")
    assert merged.ids[merged.n_given :]
    whole = tokenizer.encode("the cat").tolist()
    assert len(whole) == 2 <= len(tokenizer.encode("the c"))  # "the", and " cat" of both: that one is scored
    assert encode_pair(tokenizer, "the c", "at") == Row(tuple(whole), 1)
    with pytest.raises(ValueError, match="a continuation is empty"):
        encode_pair(tokenizer, "the", "")


def test_long_contexts_lose_their_beginning() -> None:
    """Worked by hand: a model of 4 positions reads 4 tokens and predicts a fifth; the continuation is never cut."""
    row = Row((1, 2, 3, 4, 5, 6, 7), 5)
    assert cut_to(row, 4) == Row((3, 4, 5, 6, 7), 3)
    assert cut_to(row, 6) is row
    with pytest.raises(ValueError, match="the continuation has 2 tokens, but the model reads 1"):
        cut_to(row, 1)
