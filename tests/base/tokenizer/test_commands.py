"""`graft tokenizer` and `graft data`: what they print and write, and one line for each kind of bad input."""

import gzip
import io
import json
import re
import sys

import numpy as np
import pytest

import graft
from graft import cli
from graft.base.data.shards import open_tokens

TEXT = "the cat sat on the mat and the dog sat on the log.\n" * 20


@pytest.fixture
def run(monkeypatch, capsys):
    """`graft ARGUMENTS` in this process -> (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, arguments)])
        raw = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


@pytest.fixture
def refusal(run):
    """The one line of a command that fails, without `graft: `; a progress bar may stand before it."""

    def call(*arguments, stdin=""):
        code, out, err = run(*arguments, stdin=stdin)
        assert code == 1, (out, err)
        lines = [line for line in err.splitlines() if line.startswith("graft: ")]
        assert len(lines) == 1, err
        assert err.endswith(f"{lines[0]}\n")
        assert out == ""
        assert "Traceback" not in err
        return lines[0].removeprefix("graft: ")

    return call


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    file = tmp_path_factory.mktemp("book") / "book.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def folder(book):
    """A saved tokenizer of 270 tokens: bytes, ten merges, the command's three special tokens."""
    out = book.parent / "tokenizer"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    graft.Tokenizer.train([book], vocab_size=270, special_tokens=special).save(out)
    return out


# ----------------------------------------------------------------------------------------------------------- outputs


def test_train_writes_what_load_reads(run, book, folder, tmp_path):
    out = tmp_path / "tok"
    code, printed, _ = run("tokenizer", "train", book, "--vocab-size", 270, "--out", out)
    assert code == 0
    assert printed.startswith(f"{out}: 270 tokens, the longest ")
    tok = graft.Tokenizer.load(out)
    assert tok.vocab_size == 270
    assert list(tok.special_tokens) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tok.merges == graft.Tokenizer.load(folder).merges
    assert run("tokenizer", "train", book, "--vocab-size", 265, "--out", out, "--force")[0] == 0
    assert graft.Tokenizer.load(out).vocab_size == 265


def test_train_takes_pattern_and_special_tokens(run, book, tmp_path):
    out = tmp_path / "tok"
    options = ("--pattern", "qwen2", "--special", "<a>", "--special", "<b>", "--workers", 1)
    assert run("tokenizer", "train", book, "--vocab-size", 260, "--out", out, *options)[0] == 0
    tok = graft.Tokenizer.load(out)
    assert tok.special_tokens == {"<a>": 258, "<b>": 259}
    assert graft.base.tokenizer.patterns.QWEN2 in tok.definition.splits


def test_tokens_that_look_like_markup_are_printed_as_they_are(run, tmp_path):
    (tmp_path / "text.txt").write_text("=[/]= " * 50)
    code, out, err = run("tokenizer", "train", tmp_path / "text.txt", "--vocab-size", 263, "--out", tmp_path / "[/x]")
    assert (code, out.count("[/]"), out.count("[/x]")) == (0, 1, 2), (out, err)


def test_encode_and_decode_are_inverse(run, folder, tmp_path):
    text = "the cat, déjà vu 日本"
    ids = graft.Tokenizer.load(folder).encode(text).tolist()
    code, printed, _ = run("tokenizer", "encode", "--tokenizer", folder, text)
    assert (code, printed) == (0, " ".join(map(str, ids)) + "\n")
    assert run("tokenizer", "encode", "--tokenizer", folder, stdin=text)[1] == printed
    assert run("tokenizer", "decode", "--tokenizer", folder, *ids)[1] == text + "\n"
    assert run("tokenizer", "decode", "--tokenizer", folder, stdin=printed)[1] == text + "\n"
    file, out = tmp_path / "text.txt", tmp_path / "ids.npy"
    file.write_text(text)
    code, printed, _ = run("tokenizer", "encode", "--tokenizer", folder, "--file", file, "--out", out)
    assert (code, printed, np.load(out).tolist()) == (0, "", ids)


def test_special_tokens_count_only_when_asked_for(run, folder):
    plain = run("tokenizer", "encode", "--tokenizer", folder, "a<|im_end|>")[1].split()
    assert "269" not in plain
    assert run("tokenizer", "encode", "--tokenizer", folder, "--special", "a<|im_end|>")[1].split() == ["97", "269"]


def test_bytes_that_are_not_utf8_are_refused_wherever_they_come_from(run, refusal, folder):
    """Standard input and arguments are as strict as files, and as lenient when asked."""
    message = "is not UTF-8: byte 0xff at byte offset 2; fix the file or pass --errors replace"
    assert f"standard input {message}" in refusal("tokenizer", "encode", "--tokenizer", folder, stdin=b"ab\xffc")
    assert f"the text {message}" in refusal("tokenizer", "encode", "--tokenizer", folder, "ab\udcffc")
    code, out, _ = run("tokenizer", "encode", "--tokenizer", folder, "--errors", "replace", stdin=b"ab\xffc")
    expected = graft.Tokenizer.load(folder).encode("ab\ufffdc")
    assert (code, out.split()) == (0, [str(index) for index in expected.tolist()])


def test_compare_reads_what_train_reads_and_suits_itself_to_a_short_text(run, refusal, tmp_path):
    """Zipped files and folders; a vocabulary that the text can fill."""
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    code, out, _ = run("tokenizer", "compare", tmp_path)
    assert code == 0
    assert "graft BPE" in out
    assert refusal("tokenizer", "compare", tmp_path / "none") == f"{tmp_path / 'none'} does not exist"


def test_show(run, folder):
    code, out, _ = run("tokenizer", "show", "--tokenizer", folder, "--ids", "zé\n")
    assert code == 0
    assert "4 tokens, 4 bytes: 1.00 bytes a token" in out
    for part in ("z|<c3>|<a9>", "'z'", "122", "7a", "c3", "a9", "0a"):
        assert part in out


def test_compare(run, book, folder):
    code, out, _ = run("tokenizer", "compare", book, "--vocab-size", 262)
    assert code == 0
    for row in ("characters", "bytes", "words", "graft BPE", "262", "GPT-2's row needs its files"):
        assert row in out
    code, out, _ = run("tokenizer", "compare", book, "--tokenizer", folder, "--gpt2", folder)
    assert (code, out.count("270")) == (0, 2)


def test_prepare(run, book, folder, tmp_path):
    out = tmp_path / "data"
    code, printed, _ = run("data", "prepare", book, "--tokenizer", folder, "--out", out, "--val-fraction", 0.1)
    assert code == 0
    train, val = open_tokens(out, "train"), open_tokens(out, "val")
    assert f"train: {len(train):,} tokens from 1 documents" in printed
    assert train.n_bytes + val.n_bytes == len(TEXT)
    tok = graft.Tokenizer.load(folder)
    ids = [*train[:], *val[:]]
    assert tok.decode([index for index in ids if index != tok.eos_token_id]) == TEXT
    code, printed, _ = run("data", "prepare", book, "--tokenizer", folder, "--out", out, "--val-fraction", 0, "--force")
    assert (code, len(open_tokens(out, "val"))) == (0, 0)


# --------------------------------------------------------------------------------------------------------- bad input

TRAIN = [
    (["--vocab-size", 258], "vocab_size=258 is too small; 256 bytes and 3 special tokens need 259"),
    (["--vocab-size", 9999], r"vocab_size=9999 is more than this text can fill: after \d+ merges no pair is left"),
    (["--special", "<a>", "--special", "<a>"], "special token '<a>' is given twice; name each once"),
    (["--special", ""], "special token number 1 is empty"),
    (["--pattern", "(a"], r"pattern '\(a' is not a valid regular expression"),
    (["--pattern", "gpt-4"], "unknown pattern 'gpt-4'; choose gpt2, gpt4"),
    (["--pattern", "gtp2"], "unknown pattern 'gtp2'; choose gpt2, gpt4"),
    (["--pattern", "a*"], r"pattern 'a\*' matches the empty string"),
    (["--errors", "ignore"], "--errors is 'ignore'; choose strict or replace"),
]


@pytest.mark.parametrize(("options", "message"), TRAIN)
def test_what_train_refuses(refusal, book, tmp_path, options, message):
    if "--vocab-size" not in options:
        options = ["--vocab-size", 265, *options]
    found = refusal("tokenizer", "train", book, "--out", tmp_path / "out", *options)
    assert re.search(message, found), found
    assert not (tmp_path / "out").exists()


def test_files_that_train_refuses(refusal, folder, book, tmp_path):
    empty, blank = tmp_path / "empty.txt", tmp_path / "only.txt"
    empty.touch()
    blank.write_text("<|endoftext|>")
    out = ("--out", tmp_path / "out")
    assert refusal("tokenizer", "train", empty, *out) == f"{empty} is empty; give files with text"
    assert refusal("tokenizer", "train", blank, *out) == "the files hold no text to train on; give files with text"
    assert refusal("tokenizer", "train", tmp_path / "none.txt", *out) == f"{tmp_path / 'none.txt'} does not exist"
    (tmp_path / "nothing").mkdir()
    assert "holds no text, JSON, JSONL or parquet files" in refusal("tokenizer", "train", tmp_path / "nothing", *out)
    found = refusal("tokenizer", "train", book, "--out", folder)
    assert found == f"{folder} holds a tokenizer already; give another --out or pass --force"


def test_invalid_utf8_is_named_by_its_offset_or_replaced(run, refusal, folder, tmp_path):
    file = tmp_path / "broken.txt"
    file.write_bytes(TEXT.encode() + b"caf\xe9 " + TEXT.encode())
    at = f"{file} is not UTF-8: byte 0xe9 at byte offset {len(TEXT) + 3}; fix the file or pass --errors replace"
    out = tmp_path / "out"
    commands = {
        "train": ["tokenizer", "train", file, "--vocab-size", 265, "--out", out],
        "encode": ["tokenizer", "encode", "--tokenizer", folder, "--file", file],
        "compare": ["tokenizer", "compare", file, "--tokenizer", folder],
        "prepare": ["data", "prepare", file, "--tokenizer", folder, "--out", tmp_path / "data"],
    }
    for command in commands.values():
        assert refusal(*command).startswith(at)
    done = {name: run(*command, "--errors", "replace") for name, command in commands.items()}
    assert {name: code for name, (code, _, _) in done.items()} == dict.fromkeys(commands, 0)
    ids = list(map(int, done["encode"][1].split()))
    assert graft.Tokenizer.load(folder).decode(ids) == TEXT + "caf\ufffd " + TEXT


def test_ids_that_decode_refuses(refusal, folder):
    options = ("--tokenizer", folder)
    assert refusal("tokenizer", "decode", *options, 97, 270) == "id 270 is not in the vocabulary (0 to 269)"
    assert refusal("tokenizer", "decode", *options, stdin="-1") == "id -1 is not in the vocabulary (0 to 269)"
    assert "is not in the vocabulary" in refusal("tokenizer", "decode", *options, stdin=str(2**40))
    assert "ids are whole numbers with blanks between them" in refusal("tokenizer", "decode", *options, stdin="1,2")
    assert "give a flat sequence of whole numbers" in refusal("tokenizer", "decode", *options, stdin=str(2**70))


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "WordLevel"])
def test_a_tokenizer_of_another_kind(refusal, tmp_path, kind):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": kind, "vocab": {}}}))
    found = f"{tmp_path / 'tokenizer.json'}: the model is {kind}; graft reads byte-level BPE only"
    assert refusal("tokenizer", "encode", "--tokenizer", tmp_path, "a") == found
    assert refusal("tokenizer", "show", "--tokenizer", tmp_path, "a") == found
    assert refusal("tokenizer", "decode", "--tokenizer", tmp_path, "1") == found


def test_a_folder_without_tokenizer(refusal, tmp_path):
    assert "holds no tokenizer.json" in refusal("tokenizer", "encode", "--tokenizer", tmp_path, "a")
    assert refusal("tokenizer", "show", "--tokenizer", tmp_path / "x", "a").endswith(
        "does not exist; give a folder that holds tokenizer.json"
    )


def test_prepare_tells_what_it_left_out(run, refusal, folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "the cat"}\nno JSON\n{"body": ""}\n{"body": "the mat"}\n')
    (tmp_path / "val.jsonl").write_text('{"body": "the mat"}\n{"body": "a dog"}\n')
    options = (*("--tokenizer", folder, "--out", tmp_path / "data", "--field", "body"), "--val", tmp_path / "val.jsonl")
    assert "rows.jsonl line 2: not JSON" in refusal("data", "prepare", tmp_path / "r*.jsonl", *options)
    assert "--on-bad is 'drop'; choose error or skip" in refusal("data", "prepare", rows, *options, "--on-bad", "drop")
    code, printed, _ = run("data", "prepare", tmp_path / "r*.jsonl", *options, "--on-bad", "skip")
    printed = " ".join(printed.split())
    assert code == 0
    assert "tokens from 2 documents" in printed
    assert "1 of the 2 documents that validate are among the training documents as well, word for word" in printed
    assert "1 empty documents were left out" in printed
    assert "1 rows that give no text were left out:" in printed


def test_what_compare_and_prepare_refuse(run, refusal, book, folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("abc")
    assert "the files hold 3 characters; give at least 10" in refusal("tokenizer", "compare", short)
    options = ("--tokenizer", folder, "--out", tmp_path / "data")
    assert "val_fraction=1.0 is out of range" in refusal("data", "prepare", book, *options, "--val-fraction", 1)
    assert run("data", "prepare", book, *options)[0] == 0
    assert "holds finished token shards" in refusal("data", "prepare", book, *options)
