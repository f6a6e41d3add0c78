"""Records: every format and container gives the same rows; every bad file is one line that says where."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from graft.finetune.data.records import Record, read_records

SHARED = Path(__file__).parents[3] / "../shared/data"
QA = ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"})


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(tmp_path: Path, row: dict) -> Record:
    (record,) = read_records(write(tmp_path / "a.jsonl", row))
    return record


# --- formats: worked by hand ---------------------------------------------------------------------------------------


def test_text_and_string_prompts_stay_strings(tmp_path: Path) -> None:
    assert one(tmp_path, {"text": "once", "id": 7}) == Record("a.jsonl line 1", text="once")
    assert one(tmp_path, {"prompt": "a", "completion": "b"}) == Record("a.jsonl line 1", prompt="a", completion="b")
    assert one(tmp_path, {"prompt": "a"}).completion is None


def test_conversational_prompt_and_completion_become_messages(tmp_path: Path) -> None:
    record = one(tmp_path, {"prompt": [QA[0]], "completion": [QA[1]]})
    assert (record.messages, record.n_prompt_messages, record.prompt) == (QA, 1, None)


def test_alpaca_joins_instruction_and_input_and_replays_history(tmp_path: Path) -> None:
    row = {
        "instruction": "Add.",
        "input": "2 and 2",
        "output": "4",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    assert one(tmp_path, row).messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Add.\n2 and 2"},
        {"role": "assistant", "content": "4"},
    )
    without_input = {"instruction": "2 + 2?", "input": "", "output": "4", "text": "rendered twin of the same row"}
    assert one(tmp_path, without_input).messages == QA


def test_sharegpt_roles_are_mapped(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}, {"from": "observation", "value": "ok"}]
    record = one(tmp_path, {"conversations": said, "system": "Be brief."})
    assert record.messages == ({"role": "system", "content": "Be brief."}, *QA, {"role": "tool", "content": "ok"})


def test_chosen_and_rejected_are_carried(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "4"}}
    record = one(tmp_path, {**row, "rejected": {"from": "gpt", "value": "5"}})
    assert (record.messages, record.chosen) == (QA[:1], QA[1:])
    assert record.rejected == ({"role": "assistant", "content": "5"},)
    record = one(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert (record.prompt, record.chosen, record.rejected) == ("a", "b", "c")
    assert one(tmp_path, {"chosen": [*QA], "rejected": [*QA]}).chosen == QA


def test_extra_keys_of_a_message_and_tools_pass_through(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    record = one(tmp_path, {"messages": [QA[0], call], "tools": [{"name": "add"}]})
    assert record.messages is not None
    assert record.messages[1] == {**call, "content": ""}
    assert record.tools == ({"name": "add"},)


# --- containers: law (each gives the rows that were written) --------------------------------------------------------

ROWS = [
    {"prompt": 'say "hi", twice\nplease \u2028', "completion": "hi hi"},
    {"prompt": "größer", "completion": "bigger"},
]


def container(path: Path, rows: list[dict]) -> Path:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n\n" for r in rows), encoding="utf-8-sig")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.json.gz", "a.jsonl.gz", "a.csv.gz"])
def test_every_container_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    records = read_records(container(tmp_path / name, ROWS))
    assert [{"prompt": r.prompt, "completion": r.completion} for r in records] == ROWS


def test_where_names_the_line_that_a_row_starts_on(tmp_path: Path) -> None:
    """The first CSV row spans lines 2 and 3, as its prompt holds a line break; blank JSONL lines count."""
    assert [r.where for r in read_records(container(tmp_path / "a.csv", ROWS))] == ["a.csv line 2", "a.csv line 4"]
    assert [r.where for r in read_records(container(tmp_path / "a.jsonl", ROWS))] == [
        "a.jsonl line 1",
        "a.jsonl line 3",
    ]
    assert [r.where for r in read_records(container(tmp_path / "a.json", ROWS))] == ["a.json row 1", "a.json row 2"]


def test_tsv_is_plain_and_cells_may_hold_json(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('prompt\tcompletion\r\nthe "odd quote\tok\r\n', encoding="utf-8")
    assert read_records(path) == [Record("a.tsv line 2", prompt='the "odd quote', completion="ok")]
    path.write_text("messages\n" + json.dumps(QA) + "\n", encoding="utf-8")
    assert read_records(path)[0].messages == QA


def test_messages_survive_parquet(tmp_path: Path) -> None:
    assert read_records(container(tmp_path / "a.parquet", [{"messages": list(QA)}]))[0].messages == QA


def test_a_json_file_of_lines_is_read_as_jsonl(tmp_path: Path) -> None:
    assert [r.text for r in read_records(write(tmp_path / "a.json", {"text": "a"}, {"text": "b"}))] == ["a", "b"]


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not beside this checkout")
def test_files_in_the_wild() -> None:
    """Row counts as the data's README states them."""
    assert len(read_records(SHARED / "alpaca_demo/alpaca_en_demo.json")) == 999
    assert len(read_records(SHARED / "alpaca_long_2000/alpaca_data.json.gz")) == 2000
    assert len(read_records(SHARED / "code_alpaca/code_alpaca_2k.json")) == 2017
    preferences = read_records(SHARED / "dpo_demo/dpo_en_demo.json.gz")
    assert len(preferences) == 300
    assert all(r.messages and r.chosen and r.rejected for r in preferences)


# --- bad input: one line that names the place ------------------------------------------------------------------------


def bad(tmp_path: Path, content: bytes, name: str = "a.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_no_file_a_directory_or_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope\.jsonl: no such file"):
        read_records(tmp_path / "nope.jsonl")
    with pytest.raises(IsADirectoryError, match="is a directory; give one data file"):
        read_records(tmp_path)
    with pytest.raises(ValueError, match=r"unknown file type '\.xlsx'; choose \.json"):
        read_records(bad(tmp_path, b"x", "a.xlsx"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b" \n", r"a\.jsonl is empty"),
        ("a.csv", b"prompt,completion\n", r"a\.csv holds no rows"),
        ("a.json", b"[]", r"a\.json holds no rows"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b',
            r"a\.jsonl line 2: not JSON \(Unterminated string .* at column 10\)",
        ),
        ("a.json", b'[{"text": "a"},\n{]', r"a\.json line 2: not JSON \(.* at column 2\)"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"not UTF-8 at byte offset 13 \(byte 0xe9\)"),
        ("a.jsonl", b'["text"]', r"a\.jsonl line 1: a row must be an object .* got a list"),
        ("a.csv", b'prompt,completion\n"a"x,b\n', r"a\.csv line 2: not CSV"),
        ("a.csv", b"prompt,completion\na,b,c\n", r"a\.csv line 2: 3 cells where the header has 2"),
        ("a.tsv", b"ham\tGo until\nham\tOk\n", r"a\.tsv line 2: the fields found are Go until, ham; graft knows text"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a whole Parquet file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], r"a\.jsonl\.gz: not a whole gzip file"),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_records(bad(tmp_path, content, name))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "b"}, "line 1: the fields found are answer, question; graft knows text"),
        ({"text": 3}, "line 1: text must be a string, got a number"),
        ({"prompt": "a", "completion": ["b"]}, "line 1: completion must be a string, got a list"),
        ({"prompt": {"a": 1}}, r"line 1: prompt\[0\] has no role; its fields are a"),
        (
            {"messages": []},
            r"messages must be a list of \{role, content\} with at least one message, got an empty list",
        ),
        ({"messages": "hello"}, r"messages must be a list, or JSON text of one; not JSON"),
        ({"messages": 5}, "messages must be a list .* got a number"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object with role and content, got a string"),
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            r"messages\[0\] has the unknown role 'wizard'; use system",
        ),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content must be a string, got null"),
        ({"conversations": [{"from": "user2", "value": "x"}]}, "unknown role 'user2'; use human, gpt"),
        ({"conversations": [{"from": "gpt", "value": 2}]}, r"conversations\[0\]\.value must be a string, got a number"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "history must be a list of .user, assistant. pairs"),
        ({"instruction": ["a"], "output": "b"}, "instruction must be a string, got a list"),
        ({"messages": list(QA), "tools": {"name": "x"}}, "tools must be a list of objects"),
    ],
)
def test_a_wrong_row_says_what_was_found(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one(tmp_path, row)
