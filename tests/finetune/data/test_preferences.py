"""Preference rows of TRL, LLaMA-Factory and KTO become one kind of record; worked by hand."""

import json
from pathlib import Path

import pytest

from graft.finetune.data.preferences import PreferenceRecord, pair_labelled, read_preferences, to_preference
from graft.finetune.data.records import Record, read_records

U, A, B = (
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "assistant", "content": "5"},
)


def read(tmp_path: Path, *rows: dict) -> list[PreferenceRecord]:
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_preferences([tmp_path / "p.jsonl"])


LAYOUTS = {
    "trl": {"prompt": [U], "chosen": [A], "rejected": [B]},
    "trl implicit prompt": {"chosen": [U, A], "rejected": [U, B]},
    "trl, prompt repeated": {"prompt": [U], "chosen": [U, A], "rejected": [U, B]},
    "trl, prompt as a string": {"prompt": "2 + 2?", "chosen": [U, A], "rejected": [U, B]},
    "alpaca of LLaMA-Factory": {"instruction": "2 +", "input": "2?", "chosen": "4", "rejected": "5"},
    "sharegpt of LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "2 + 2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_layouts(name: str, tmp_path: Path) -> None:
    [row] = read(tmp_path, LAYOUTS[name])
    question = {"role": "user", "content": "2 +\n2?"} if "alpaca" in name else U
    assert (row.prompt, row.chosen, row.rejected) == ((question,), (A,), (B,))
    answered = row.answered((B,))
    assert (answered.messages, answered.n_prompt_messages) == ((question, B), 1)


def test_strings_stay_strings_and_share_their_beginning(tmp_path: Path) -> None:
    for row, expected in (
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("a", "b", "c")),
        ({"chosen": "Q: 1 A: yes", "rejected": "Q: 1 A: no"}, ("Q: 1 A: ", "yes", "no")),
    ):
        [record] = read(tmp_path, row)
        assert (record.prompt, record.chosen, record.rejected) == expected


def test_verdicts_are_paired_by_prompt(tmp_path: Path) -> None:
    """good a, bad b, bad a, whole c: the two of prompt a make a pair; b is left out and counted."""
    rows = read(
        tmp_path,
        {"prompt": "a", "completion": "good", "label": True},
        {"prompt": "b", "completion": "bad", "label": False},
        {"prompt": "a", "completion": "poor", "label": False},
        {"prompt": "c", "chosen": "x", "rejected": "y"},
    )
    pairs, n_single = pair_labelled(rows)
    assert n_single == 1
    assert [(r.where[-1], r.prompt, r.chosen, r.rejected) for r in pairs] == [
        ("1", "a", "good", "poor"),
        ("4", "c", "x", "y"),
    ]
    rows = read(tmp_path, {"messages": [U, A], "kto_tag": True}, {"messages": [U, B], "label": False})
    [pair], n_single = pair_labelled(rows)
    assert (n_single, pair.prompt, pair.chosen, pair.rejected) == (0, (U,), (A,), (B,))


def test_a_class_label_is_no_verdict(tmp_path: Path) -> None:
    for row in ({"text": "spam!", "label": True}, {"prompt": "a", "completion": "b", "label": 1}):
        (tmp_path / "c.jsonl").write_text(json.dumps(row))
        assert [record.is_preference for record in read_records(tmp_path / "c.jsonl")] == [False]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="r: no rejected answer; give both"):
        to_preference(Record("r", prompt="a", chosen="b"))
    with pytest.raises(
        ValueError, match=r"2 rows can't be used: p\.jsonl line 1: no preference; .*; p\.jsonl line 2: no preference"
    ):
        read(tmp_path, {"prompt": "a"}, {"prompt": "a", "completion": "b"})
