"""Datasets: nothing cut, dropped or empty without a count; all bad rows in one message."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.data.chat import Encoded, encode_whole
from graft.finetune.data.dataset import DatasetOptions, encode_dataset, windows
from graft.finetune.data.records import Record

LONG = "the quick brown fox " * 30


def rows() -> list[Record]:
    return [
        Record("line 1", prompt="2 + 2 =", completion=" 4"),
        Record("line 2", text=LONG),
        Record("line 3", prompt="say it", completion=LONG),
    ]


def test_windows_by_hand() -> None:
    """Five tokens a b c d e, limit 3: a b c, c d e; the label c is learned in the first. Of a prompt a b c d, only d e."""
    ids = np.arange(5, dtype=np.int32)
    assert [w.ids.tolist() for w in windows(Encoded(ids, np.ones(5, bool)), 3)] == [[0, 1, 2], [2, 3, 4]]
    assert [w.ids.tolist() for w in windows(Encoded(ids, ids == 4), 3)] == [[2, 3, 4]]
    assert [w.ids.tolist() for w in windows(Encoded(ids[:4], np.ones(4, bool)), 3)] == [[0, 1, 2], [2, 3]]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 60), st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_windows_learn_each_label_once(n: int, limit: int, seed: int) -> None:
    """Law: over all windows the targets that carry loss are the whole's, in order."""
    rng = np.random.default_rng(seed)
    whole = Encoded(np.arange(n, dtype=np.int32), rng.random(n) < 0.5)
    pieces = windows(whole, limit)
    assert all(len(piece.ids) <= limit for piece in pieces)
    learned = [int(i) for piece in pieces for i, on in zip(piece.ids[1:], piece.loss_mask[1:], strict=True) if on]
    assert learned == [i for i in range(1, n) if whole.loss_mask[i]]


def test_by_default_texts_become_windows_and_answers_are_cut_with_a_count(tokenizer: Tokenizer) -> None:
    wholes = [encode_whole(record, tokenizer) for record in rows()]
    encoded, report = encode_dataset(rows(), tokenizer, None, 40)
    n_windows = -(-(len(wholes[1].ids) - 1) // 39)
    assert (report.n_records, report.n_split, report.n_cut, report.n_dropped) == (3, 1, 1, 0)
    assert len(encoded) == report.n_rows == 1 + n_windows + 1
    assert report.sources == (0, *[1] * n_windows, 2)
    assert report.n_lost_labels == len(wholes[2].ids) - 40
    assert encoded[-1].ids.tolist() == wholes[2].ids[:40].tolist()
    assert report.n_labels == sum(int(row.loss_mask[1:].sum()) for row in encoded)
    said = report.lines(40, DatasetOptions())
    assert said[0].startswith("1 of 3 records are longer than 40 tokens and were cut; ")
    assert said[1] == "1 records are longer than 40 tokens and became windows"
    assert "sources" not in report.figures()


def test_the_other_choices_for_long_rows(tokenizer: Tokenizer) -> None:
    encoded, report = encode_dataset(rows(), tokenizer, None, 40, DatasetOptions("drop"))
    assert (len(encoded), report.n_dropped, report.sources) == (1, 2, (0,))
    assert report.lines(40, DatasetOptions()) == ["2 of 3 records are longer than 40 tokens and were dropped"]
    encoded, report = encode_dataset(rows(), tokenizer, None, 40, DatasetOptions("cut"))
    assert (len(encoded), report.n_cut) == (3, 2)
    encoded, report = encode_dataset(rows(), tokenizer, None, 40, DatasetOptions("split"))
    assert report.n_split == 2
    assert report.n_labels == sum(int(encode_whole(record, tokenizer).loss_mask[1:].sum()) for record in rows())
    with pytest.raises(ValueError, match=r"2 rows can't be used: line 2: \d+ tokens where max_seq_len=40; .*; line 3: \d+ tokens"):
        encode_dataset(rows(), tokenizer, None, 40, DatasetOptions("error"))
    assert encode_dataset(rows(), tokenizer, None, 10**6)[1].lines(10**6, DatasetOptions()) == []


def test_prompts_that_are_too_long_are_all_in_one_message(tokenizer: Tokenizer) -> None:
    bad = [Record(f"line {i}", prompt=LONG, completion=" 4") for i in range(2, 9)]
    records = [rows()[0], *bad]
    with pytest.raises(ValueError, match=r"^7 rows can't be used: line 2: no label is left .*; line 6: .*; and 2 more$"):
        encode_dataset(records, tokenizer, None, 40)
    encoded, report = encode_dataset(records, tokenizer, None, 40, DatasetOptions("drop"))
    assert (len(encoded), report.n_dropped) == (1, 7)
    with pytest.raises(ValueError, match=r"none of the 7 records is left to learn from \(0 empty, 7 longer than 40 tokens\)"):
        encode_dataset(bad, tokenizer, None, 40, DatasetOptions("drop"))


def test_empty_rows_are_refused_together_or_dropped_with_a_count(tokenizer: Tokenizer) -> None:
    records = [rows()[0], Record("line 2", text="", empty="text is null"), Record("line 3", text="", empty="text is empty")]
    with pytest.raises(ValueError, match=r"2 rows can't be used: line 2: text is null; .*--on-empty drop.*; line 3: text is empty"):
        encode_dataset(records, tokenizer, None, 40)
    encoded, report = encode_dataset(records, tokenizer, None, 40, DatasetOptions(on_empty="drop"))
    assert (len(encoded), report.n_empty) == (1, 2)


def test_rows_that_spell_special_tokens(tokenizer: Tokenizer) -> None:
    """A row rendered beforehand: as text its tokens are letters, as tokens they are what they say."""
    text = "<|im_start|>user\nhi<|im_end|>"
    special = tokenizer.special_tokens
    encoded, report = encode_dataset([Record("r", text=text), rows()[0]], tokenizer, None, 99)
    assert report.n_special == 1
    assert special["<|im_start|>"] not in encoded[0].ids
    assert report.lines(99, DatasetOptions())[0].startswith("1 records spell special tokens, taken as plain text")
    [tokens], _ = encode_dataset([Record("r", text=text)], tokenizer, None, 99, DatasetOptions(special_tokens="tokens"))
    expected = [special["<|im_start|>"], *tokenizer.encode("user\nhi").tolist(), special["<|im_end|>"], tokenizer.eos_token_id]
    assert tokens.ids.tolist() == expected
    chat = ({"role": "user", "content": "a<|eot_id|>"}, {"role": "assistant", "content": "b<|eot_id|>c"})
    options = DatasetOptions(special_tokens="tokens")
    [row], _ = encode_dataset([Record("r", messages=chat)], tokenizer, None, 99, options)
    assert row.ids.tolist().count(special["<|eot_id|>"]) == 2
    assert tokenizer.decode(row.ids[row.loss_mask]) == "b<|eot_id|>c<|im_end|>"


def test_preferences_are_sent_to_dpo(tokenizer: Tokenizer) -> None:
    for record in (Record("r", prompt="a", chosen="b", rejected="c"), Record("r", prompt="a", completion="b", label=False)):
        with pytest.raises(ValueError, match=r"r: this row holds preferences .*; train on it with graft dpo"):
            encode_dataset([record], tokenizer, None, 99)


def test_unknown_choices() -> None:
    with pytest.raises(ValueError, match="--on-too-long 'crop' is unknown; choose auto, cut, drop, split, error"):
        DatasetOptions("crop")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="--special-tokens 'yes' is unknown; choose text, tokens"):
        DatasetOptions(special_tokens="yes")  # pyright: ignore[reportArgumentType]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=8), limit=st.integers(2, 30))
def test_every_record_is_accounted_for(sizes: list[tuple[int, int]], limit: int, tokenizer: Tokenizer) -> None:
    """Law: each record is in a row, dropped or named; cut and split never touch one that fits."""
    records = [Record(f"r{i}", prompt="fox " * a, completion=" fox" * b) for i, (a, b) in enumerate(sizes)]
    fits = [len(encode_whole(record, tokenizer).ids) <= limit for record in records]
    try:
        _, report = encode_dataset(records, tokenizer, None, limit, DatasetOptions("drop"))
        assert set(report.sources) == {i for i, fit in enumerate(fits) if fit}
        assert report.n_dropped == fits.count(False)
    except ValueError as error:
        assert not any(fits) and "none of the" in str(error)  # noqa: PT017, PT018
    rows, report = encode_dataset(records, tokenizer, None, limit, DatasetOptions("split"))
    assert set(report.sources) == set(range(len(records)))
    assert report.n_split == fits.count(False)
    assert max(len(row.ids) for row in rows) <= limit
