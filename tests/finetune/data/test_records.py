"""Records: every format and container gives the same rows; every bad file is one line that says where."""

import csv
import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from graft.finetune.data.records import Record, iterate_all, read_all, read_records

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


# --- null and empty cells, all bad rows at once ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "empty"),
    [
        ({"text": None}, "text is null"),
        ({"text": " \n"}, "text is empty"),
        ({"prompt": "a", "completion": None}, "completion is null"),
        ({"prompt": None, "completion": "b"}, "prompt is null"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "", "completion": "b"}, None),
        ({"instruction": "a", "output": None}, "output is null"),
        ({"instruction": "a", "input": None, "output": "b"}, None),
        ({"instruction": "a", "output": ""}, "the assistant says nothing"),
        ({"messages": None}, "messages is null"),
        ({"messages": [QA[0], {"role": "assistant", "content": None}]}, "messages[1].content is null"),
        ({"messages": [QA[0], {"role": "assistant", "content": ""}]}, "the assistant says nothing"),
        ({"messages": [QA[0], {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}]}, None),
        (
            {"messages": [{**QA[1], "train": False}, QA[0], {"role": "assistant", "content": "", "name": "bot"}]},
            "the assistant says nothing",
        ),
        ({"messages": [QA[0], {"role": "assistant", "content": "", "thinking": " "}]}, "the assistant says nothing"),
        ({"messages": [QA[0], {"role": "assistant", "content": "", "thinking": "hm"}]}, None),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]},
            "conversations[1].value is null",
        ),
    ],
)
def test_what_is_empty_is_named(row: dict, empty: str | None, tmp_path: Path) -> None:
    assert one(tmp_path, row).empty == empty


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t")])
def test_two_columns_of_one_name_are_refused(suffix: str, comma: str, tmp_path: Path) -> None:
    """Only the last of them would be read. Columns without a name may be many: pandas writes its index as one."""
    path = tmp_path / f"a.{suffix}"
    path.write_text(comma.join(["text", "note", "text"]) + "\n" + comma.join("abc") + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"a.{suffix} line 1: two columns are named 'text'; rename one of them"):
        read_records(path)


def test_all_bad_rows_are_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1}\n{"text": "a"}\n{"text": \nnull\n{"other": 2}\n[1]\n7\n')
    with pytest.raises(
        ValueError,
        match=r"^6 rows can't be used: a\.jsonl line 1: text must be .*; a\.jsonl line 3: not JSON .*; and 1 more$",
    ):
        read_records(path)


def test_content_in_parts_is_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    assert one(tmp_path, {"messages": [{"role": "user", "content": parts}, QA[1]]}).messages == QA
    with pytest.raises(ValueError, match=r"messages\[0\].content\[0\] is 'image'; graft reads parts of type text"):
        one(tmp_path, {"messages": [{"role": "user", "content": [{"type": "image"}]}]})


def test_a_rows_own_template_arguments(tmp_path: Path) -> None:
    record = one(tmp_path, {"messages": [*QA], "chat_template_kwargs": {"enable_thinking": False}})
    assert record.template_args == {"enable_thinking": False}
    with pytest.raises(ValueError, match="chat_template_kwargs must be an object, got a list"):
        one(tmp_path, {"messages": [*QA], "chat_template_kwargs": [1]})


# --- several files, weights, other names ------------------------------------------------------------------------------


def numbered(path: Path, name: str, n: int) -> Path:
    return write(path / f"{name}.jsonl", *({"text": f"{name}{i}"} for i in range(n)))


def test_files_folders_and_globs(tmp_path: Path) -> None:
    a, b = numbered(tmp_path, "a", 2), numbered(tmp_path, "b", 1)
    (tmp_path / "notes.md").write_text("no data")
    for specs in ([a, b], [tmp_path], [tmp_path / "*.jsonl"]):
        assert [record.text for record in read_all(specs)] == ["a0", "a1", "b0"]
    for spec, message in ((tmp_path / "x*.jsonl", "matches no file"), (tmp_path / "gone.jsonl", "no such file")):
        with pytest.raises(FileNotFoundError, match=message):
            read_all([spec])
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="none holds no data file"):
        read_all([tmp_path / "none"])
    with pytest.raises(ValueError, match="no data given"):
        read_all([])


def test_weights_are_shares_and_lose_no_record(tmp_path: Path) -> None:
    """Worked by hand: 6 and 4 records at 0.7 and 0.3 are 10/0.75... the larger unit is 4/0.3 = 13.3: 9 and 4."""
    a, b = numbered(tmp_path, "a", 6), numbered(tmp_path, "b", 4)
    texts = [record.text for record in read_all([f"{a}=0.7", f"{b}=0.3"])]
    assert texts == [f"a{i % 6}" for i in range(9)] + [f"b{i}" for i in range(4)]
    assert [r.text for r in read_all([f"{a}=2", f"{b}=2"])] == [f"a{i}" for i in range(6)] + [
        "b0",
        "b1",
        "b2",
        "b3",
        "b0",
        "b1",
    ]
    assert list(iterate_all([f"{a}=2", f"{b}=2"])) == read_all([f"{a}=2", f"{b}=2"])
    with pytest.raises(ValueError, match=r"a\.jsonl has no weight while others have"):
        read_all([a, f"{b}=0.3"])
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match=f"the weight {weight} is not a positive number"):
            read_all([f"{a}={weight}"])
    with pytest.raises(ValueError, match="the weights would repeat 10 records to"):
        read_all([f"{a}=1", f"{b}=1e-9"])
    odd = numbered(tmp_path, "lr=0.5", 1)  # a file name that holds an equals sign
    assert [record.text for record in read_all([odd])] == ["lr=0.50"]


def test_other_field_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b", "prompt": "not this"})
    [record] = read_records(path, {"prompt": "question", "completion": "answer"})
    assert (record.prompt, record.completion) == ("a", "b")
    with pytest.raises(ValueError, match=r"line 1: no field 'q' for prompt; the row has answer, prompt, question"):
        read_records(path, {"prompt": "q"})


# --- files that are attacks --------------------------------------------------------------------------------------------


def test_bombs_are_refused_before_they_fill_memory(tmp_path: Path) -> None:
    """300 MB of spaces in 300 KB of gzip; a million equal rows of 1 KB in a small Parquet file."""
    bomb = tmp_path / "a.jsonl.gz"
    with gzip.open(bomb, "wb") as file:
        for _ in range(300):
            file.write(b" " * 1_000_000)
    with pytest.raises(ValueError, match="compressed bytes hold more than"):
        read_records(bomb)
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1_000_000), ["x" * 1000])})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", compression="zstd")
    with pytest.raises(ValueError, match="more than 250 times the file"):
        read_records(tmp_path / "b.parquet")


def test_text_that_packs_well_is_no_bomb(tmp_path: Path) -> None:
    line = json.dumps({"text": "the same line over and over"}) + "\n"
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(line * 200_000)
    assert len(read_records(tmp_path / "a.jsonl.gz")) == 200_000


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl is a pipe, socket or device, not a file"):
        read_records(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"b\.jsonl is a pipe, socket or device"):
        read_all([tmp_path / "b.jsonl"])


@pytest.mark.parametrize(
    "text", ['{"text": ' + "[" * 100_000, '{"messages": ' + "[" * 5000 + "]" * 5000 + "}", "1" * 5000]
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_deep_and_huge_json_is_one_line(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text if name == "a.jsonl" else f"[{text}]")
    with pytest.raises(ValueError, match=r"a\.json") as caught:
        read_records(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "value", [1, 1.5, True, [], {}, [1], [None], [[]], {"a": 1}, [{"role": 1}], [{"role": "user"}], [{"content": "a"}]]
)
@pytest.mark.parametrize(
    "field", ["text", "prompt", "messages", "conversations", "instruction", "chosen", "tools", "system"]
)
def test_wrong_types_are_value_errors(field: str, value: object, tmp_path: Path) -> None:
    """Law: a value of any type in any field is a record or one line, never another exception."""
    others = {"prompt": {"completion": "a"}, "instruction": {"output": "b"}, "chosen": {"prompt": "a", "rejected": "c"},
              "tools": {"messages": [*QA]}, "system": {"instruction": "a", "output": "b"}}  # fmt: skip
    path = write(tmp_path / "a.jsonl", {**others.get(field, {}), field: value})
    try:
        read_records(path)
    except ValueError as error:
        assert str(error).startswith("a.jsonl line 1")  # noqa: PT017


# --- loss by turn, reasoning, formats, fields ----------------------------------------------------------------------


@pytest.mark.parametrize("key", [{"train": False}, {"training": False}, {"weight": 0}, {"weight": 0.0}])
def test_a_turn_without_loss_under_each_of_its_names(key: dict, tmp_path: Path) -> None:
    """axolotl's train and training, OpenAI's weight; true and 1 are the default and leave no trace."""
    said = {"messages": [QA[0], {**QA[1], **key}, {**QA[1], "weight": 1, "train": True}]}
    assert one(tmp_path, said).messages == (QA[0], {**QA[1], "train": False}, QA[1])


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(name: str, tmp_path: Path) -> None:
    record = one(tmp_path, {"messages": [QA[0], {**QA[1], name: "two and two"}]})
    assert record.messages == (QA[0], {**QA[1], "reasoning_content": "two and two"})


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({**QA[1], "weight": 0.5}, r"messages\[1\].weight is 0.5; expected 0 or 1"),
        ({**QA[1], "train": "no"}, r"messages\[1\].train is 'no'; expected true or false"),
        ({**QA[0], "train": True}, r"messages\[1\].train asks for loss on a turn of user"),
        (
            {**QA[1], "thinking": "a", "reasoning": "b"},
            r"messages\[1\] has reasoning and thinking, which mean the same",
        ),
        ({**QA[1], "weight": 1, "train": False}, r"messages\[1\] has train and weight, which mean the same and differ"),
        ({**QA[1], "thinking": 3}, r"messages\[1\].thinking must be a string, got a number"),
    ],
)
def test_what_a_turn_may_not_say(turn: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        one(tmp_path, {"messages": [QA[0], turn]})


def test_one_format_a_file(tmp_path: Path) -> None:
    """The rows of another format than the first are named; a null first row has none, and prompts may be of two kinds."""
    first, text = {"prompt": None, "completion": "b"}, {"text": "once"}
    assert len(read_records(write(tmp_path / "a.jsonl", first, text, text))) == 3
    with pytest.raises(
        ValueError, match=r"a.jsonl line 3: its format is prompt of messages where a.jsonl line 1 has prompt"
    ):
        read_records(
            write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"prompt": [QA[0]]})
        )
    with pytest.raises(
        ValueError, match=r"2 rows can't be used: a.jsonl line 2: its format is messages .*; a.jsonl line 3"
    ):
        read_records(write(tmp_path / "a.jsonl", text, {"messages": [*QA]}, {"conversations": [*QA]}))


def test_fields_that_nothing_reads_are_known(tmp_path: Path) -> None:
    rows = {
        ("id", "source"): {"text": "a", "id": 1, "source": "x", "empty": None},
        ("text",): {"instruction": "a", "output": "b", "text": "rendered"},
        ("score",): {"messages": [*QA], "tools": [{"name": "add"}], "score": 3},
        (): {"prompt": "a", "completion": "b", "label": 2},
    }
    for unused, row in rows.items():
        assert one(tmp_path, row).unused == unused


def test_arrow_files_of_both_kinds(tmp_path: Path) -> None:
    """A stream, as `datasets` writes it, and a file, as pyarrow's feather does."""
    table = pyarrow.table({"text": [f"row {i}" for i in range(2500)]})
    for name, new in (("s.arrow", pyarrow.ipc.new_stream), ("f.arrow", pyarrow.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        records = read_records(tmp_path / name)
        assert (len(records), records[2499].text, records[2499].where) == (2500, "row 2499", f"{name} row 2500")
    (tmp_path / "bad.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"bad\.arrow: not a whole Arrow file"):
        read_records(tmp_path / "bad.arrow")


def test_a_bad_byte_is_named_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the offset is the byte's in the whole file, whatever the chunks cut."""
    from graft.finetune.data import rows as module

    text = '{"text": "äöü"}\n'.encode() * 3
    at = text.rindex(b"\xc3")
    (tmp_path / "a.jsonl").write_bytes(text[:at] + b"\xff" + text[at + 1 :])
    for size in (1, 2, 3, 7, 1 << 20):
        monkeypatch.setattr(module, "_CHUNK", size)
        with pytest.raises(ValueError, match=rf"not UTF-8 at byte offset {at} \(byte 0xff\)"):
            read_records(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(text + b'{"text": "\xc3')
    with pytest.raises(ValueError, match=rf"not UTF-8 at byte offset {len(text) + 10} "):
        read_records(tmp_path / "b.jsonl")
