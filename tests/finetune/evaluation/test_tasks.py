"""Rows of every benchmark -> questions, by hand; files plain, compressed and zipped; what is refused."""

import bz2
import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from graft.finetune.evaluation.tasks import Question, read_benchmark

SHARED = Path(__file__).parents[4] / "shared/data/benchmarks"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only(path: Path, **options: Any) -> Question:
    [question] = read_benchmark(path, **options).questions
    return question


def test_each_row_by_hand(tmp_path: Path) -> None:
    """Worked by hand: what is asked after what, in the harness's own words; the space before a choice belongs to it."""
    file = tmp_path / "x.jsonl"
    two = {"query": "Question: Why?\n", "choices": ["so", "not so"], "gold": 1}
    asked = {"arc_easy": "Question: Why?\nAnswer:", "piqa": "Question: Why?\nAnswer:", "copa": "Question: Why?"}
    for name, context in asked.items():
        question = only(write(file, two), name=name)
        assert (question.contexts, question.continuations, question.gold) == ((context,), (" so", " not so"), 1)
        assert question.lengths == (2, 6)
    cloze = only(write(file, {"context_options": ["Sam so Sam", "Sam so Max"], "continuation": "won.", "gold": 1}))
    assert (cloze.contexts, cloze.continuations, cloze.gold) == (("Sam so Sam", "Sam so Max"), (" won.",) * 2, 1)
    good = {"sentence_good": "It is.", "sentence_bad": "It are.", "UID": "is_are", "linguistics_term": "agreement"}
    pair = only(write(file, good))
    assert (pair.contexts, pair.continuations, pair.gold) == (("",), (" It is.", " It are."), 0)
    assert (pair.part, pair.family) == ("is_are", "agreement")
    word = only(write(file, {"context": "the cat sat on the", "continuation": "mat"}))
    assert (word.contexts, word.continuations) == (("the cat sat on the",), (" mat",))
    answer = only(write(file, {"context": "One and one?", "chain_of_thought": "1 + 1", "answer": "2"}), name="svamp")
    assert (answer.contexts, answer.continuations) == (("Question: One and one?\nAnswer:",), (" 2",))


def test_the_hugging_face_layouts(tmp_path: Path) -> None:
    """Law: a row as the Hugging Face set has it is the same question."""
    file = tmp_path / "x.jsonl"
    pairs = [
        ({"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}, "arc",
         {"query": "Question: Why?", "choices": ["a", "b"], "gold": 1}),
        ({"question_stem": "It is", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}, "openbook",
         {"query": "It is", "choices": ["a", "b"], "gold": 0}),
        ({"goal": "Eat", "sol1": "x", "sol2": "y", "label": 1}, "piqa",
         {"query": "Question: Eat\n", "choices": ["x", "y"], "gold": 1}),
        ({"activity_label": "Run", "ctx": "He", "endings": ["a", "b", "c", "d"], "label": "3"}, "hellaswag",
         {"query": "Run: He", "choices": ["a", "b", "c", "d"], "gold": 3}),
        ({"sentence": "Sam saw Max, so _ ran.", "option1": "Sam", "option2": "Max", "answer": "2"}, "winogrande",
         {"context_options": ["Sam saw Max, so Sam", "Sam saw Max, so Max"], "continuation": "ran.", "gold": 1}),
        ({"text": "the cat sat"}, "lambada", {"context": "the cat", "continuation": "sat"}),
    ]  # fmt: skip
    for theirs, name, ours in pairs:
        first = only(write(file, theirs), name=name)
        assert first == only(write(file, ours), name=name), name


def test_files_of_every_kind(tmp_path: Path) -> None:
    """Law: the same rows plain, gzipped, zipped and as HellaSwag's blocks; the name is the file's; the kind is told."""
    rows = [{"query": f"q {i}", "choices": ["a", "b", "c", "d"], "gold": i} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "one.jsonl").write_text(text)
    with gzip.open(tmp_path / "two.jsonl.gz", "wt") as stream:
        stream.write(text)
    with zipfile.ZipFile(tmp_path / "three.zip", "w") as archive:
        archive.writestr("data/", "")
        archive.writestr("__MACOSX/data/._a.jsonl", b"\x00\xff")
        archive.writestr("data/a.jsonl", json.dumps(rows[0]))
        archive.writestr("data/b.jsonl", "\n".join(map(json.dumps, rows[1:])))
    blocks = "".join(f"q {i}\n{i}\na\nb\nc\nd\n" for i in range(3))
    (tmp_path / "four.txt.bz2").write_bytes(bz2.compress(blocks.encode()))
    found = {path.name: read_benchmark(path) for path in sorted(tmp_path.iterdir())}
    assert [one.name for one in found.values()] == ["four", "one", "three", "two"]
    assert {one.kind for one in found.values()} == {"choice"}
    asked = [[(q.contexts, q.continuations, q.gold) for q in one.questions] for one in found.values()]
    assert asked == [asked[0]] * 4
    assert read_benchmark(tmp_path / "three.zip").questions[2].where.endswith("three.zip/data/b.jsonl line 2")
    assert len(read_benchmark(tmp_path / "one.jsonl", limit=2).questions) == 2


def test_shots_stand_before_and_are_not_asked(tmp_path: Path) -> None:
    """Worked by hand: two solved rows, a blank line after each, then the question; a limit counts the questions asked."""
    rows = [{"query": f"q{i}", "choices": ["a", "b"], "gold": i % 2} for i in range(5)]
    benchmark = read_benchmark(write(tmp_path / "x.jsonl", *rows), n_shots=2, limit=2)
    assert [q.contexts for q in benchmark.questions] == [("q0 a\n\nq1 b\n\nq2",), ("q0 a\n\nq1 b\n\nq3",)]
    assert benchmark.n_shots == 2
    pairs = write(tmp_path / "y.jsonl", *[{"sentence_good": "a", "sentence_bad": "b"}] * 3)
    with pytest.raises(ValueError, match="--shots is about questions with answers; y is of kind pair"):
        read_benchmark(pairs, n_shots=1)
    with pytest.raises(ValueError, match=r"holds 5 rows; with --shots 5 none is left to ask"):
        read_benchmark(tmp_path / "x.jsonl", n_shots=5)


def test_what_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl does not exist"):
        read_benchmark(tmp_path / "gone.jsonl")
    good = {"query": "q", "choices": ["a"], "gold": 0}
    with pytest.raises(
        ValueError, match=r"x\.jsonl line 1: no known benchmark row, it has the fields a; known are pair"
    ):
        read_benchmark(write(file, {"a": 1}))
    for row, message in (
        ({"query": "q", "choices": ["a"], "gold": 1}, r"line 2: gold is 1, but there are 1 choices"),
        (
            {"query": "q", "choices": ["a"]},
            r"line 2: not a row of kind choice \(KeyError: 'gold'\); it has the fields query",
        ),
        ({"query": "q", "choices": ["a"], "gold": ""}, r"line 2: invalid literal for int"),
        ([1], r"line 2: a row must be an object"),
    ):
        with pytest.raises(ValueError, match=message):
            read_benchmark(write(file, good, row))
    with pytest.raises(ValueError, match=r"2 rows can't be used: .*line 1: .*line 3"):
        read_benchmark(write(file, good | {"gold": 4}, good, good | {"gold": 5}))
    with pytest.raises(ValueError, match=r"--kind 'quiz' is unknown; choose choice, cloze, pair, lastword, answer"):
        read_benchmark(file, kind="quiz")
    with pytest.raises(ValueError, match=r"--shots -1 must be >= 0"):
        read_benchmark(file, n_shots=-1)
    file.write_text("{\n")
    with pytest.raises(ValueError, match=r"x\.jsonl line 1: not JSON"):
        read_benchmark(file)
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"unknown kind of file '\.csv'; graft reads \.jsonl"):
        read_benchmark(tmp_path / "x.csv")
    for name, content, message in (
        ("b.zip", b"no zip", "can't be read"),
        ("b.jsonl.gz", b"no gzip", "can't be read"),
        ("b.txt", b"q\n1\na\nb\n", "has 4 lines, not a multiple of 6"),
        ("c.txt", b"q\none\na\nb\nc\nd\n", "the label is 'one', not a number"),
        ("d.jsonl", b"\xff", "not UTF-8 at byte 0"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_benchmark(tmp_path / name)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the public benchmark files")
def test_the_public_files() -> None:
    """Law: every public file is read whole, as the kind that it is."""
    expected = {
        "arc_easy.jsonl.gz": ("choice", 2376), "piqa.jsonl.gz": ("choice", 1838), "openbook_qa.jsonl.gz": ("choice", 500),
        "copa.jsonl.gz": ("choice", 100), "winogrande.jsonl.gz": ("cloze", 1267), "lambada_openai.jsonl.gz": ("lastword", 5153),
        "svamp.jsonl.gz": ("answer", 300), "hellaswag_val.txt.bz2": ("choice", 10042),
        "blimp.zip": ("pair", 67_000), "arc_challenge.jsonl.gz": ("choice", 1172),
    }  # fmt: skip
    for name, (kind, n) in expected.items():
        benchmark = read_benchmark(SHARED / name)
        assert (benchmark.kind, len(benchmark.questions)) == (kind, n), name
