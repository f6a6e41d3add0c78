"""Conversations: right answers by hand, held-out pairs alone in the evaluation, an answer that is asked for again."""

import json
from pathlib import Path

import pytest

from graft.finetune.data.records import read_records
from graft.finetune.demo.talks import AGAIN, FOLLOW_UPS, FUNCTIONS, QUESTIONS, make_talks, write_talks
from graft.finetune.tasks import held_out

NAMES = tuple(FUNCTIONS)
ASKED = {form.format(f=name): (i, j) for forms in (QUESTIONS, FOLLOW_UPS) for i, form in enumerate(forms) for j, name in
         enumerate(NAMES)}  # fmt: skip


def test_every_answer_is_right_and_every_pair_is_held_out_or_not() -> None:
    """Law: each question is answered by its function's words, each request to repeat by the answer before; an evaluation's
    pairs are all held out, a training's none."""
    for split, talks in zip((False, True), make_talks(0, 300, 100), strict=True):
        kinds = set()
        for talk in talks:
            turns = [str(message["content"]) for message in talk.messages or ()]
            assert [m["role"] for m in talk.messages or ()] == ["user", "assistant"] * (len(turns) // 2)
            kinds.add((len(turns), turns[-2] in AGAIN))
            for i in range(0, len(turns), 2):
                if turns[i] in AGAIN:
                    assert turns[i + 1] == turns[i - 1]
                    continue
                form, name = ASKED[turns[i]]
                assert turns[i + 1] == FUNCTIONS[NAMES[name]]
                assert held_out((form, name)) == split
        assert kinds == {(2, False), (4, False), (4, True)}


def test_the_same_seed_gives_the_same_talks(tmp_path: Path) -> None:
    """Law: files hold what make_talks gives; evaluation conversations are distinct; more than there are is refused."""
    write_talks(tmp_path, seed=3, n_train=20, n_eval=60)
    train, held = make_talks(3, 20, 60)
    assert [r.messages for r in read_records(tmp_path / "train.jsonl")] == [r.messages for r in train]
    assert [r.messages for r in read_records(tmp_path / "eval.jsonl")] == [r.messages for r in held]
    assert len({json.dumps(record.messages) for record in held}) == 60
    assert make_talks(4, 20, 60)[0] != train
    with pytest.raises(
        ValueError, match=r"the grammar has only about \d+ distinct evaluation conversations, 500 were asked"
    ):
        make_talks(0, 1, 500)
