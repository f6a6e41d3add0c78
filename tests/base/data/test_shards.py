"""Law: the shards hold each document's ids and EOS, once, whatever the workers, pieces and shard sizes; bad input."""

import json
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest

import graft
from graft.base.data import shards
from graft.base.data.shards import open_tokens, prepare

EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    file = tmp_path_factory.mktemp("tok") / "a.txt"
    file.write_text("the cat sat on the mat, then the other cat sat there. " * 5)
    return graft.Tokenizer.train([file], vocab_size=270)


@pytest.fixture
def corpus(tmp_path):
    """100 documents of 1 to 100 words, the last without EOT behind it."""
    texts = [" ".join(["the cat sat"] * n) for n in range(1, 101)]
    (tmp_path / "a.txt").write_text(EOT.join(texts))
    return tmp_path / "a.txt", texts


def split_documents(ids, eos):
    """Ids -> the ids of each document, EOS left out."""
    ends = np.flatnonzero(ids == eos)
    assert ids[-1] == eos
    return [part[part != eos].tolist() for part in np.split(ids, ends + 1)[:-1]]


@pytest.mark.parametrize("shard_tokens", [50, 1_000_000])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_document_is_in_one_split(tmp_path, monkeypatch, tok, corpus, workers, shard_tokens):
    monkeypatch.setattr(shards, "PIECE_BYTES", 300)
    file, texts = corpus
    meta = prepare([file], tok, tmp_path / "out", val_fraction=0.2, workers=workers, shard_tokens=shard_tokens)
    train, val = open_tokens(tmp_path / "out"), open_tokens(tmp_path / "out", "val")
    found = split_documents(train[:], tok.eos_token_id) + split_documents(val[:], tok.eos_token_id)
    assert sorted(found) == sorted(tok.encode(text).tolist() for text in texts)
    assert train.n_bytes + val.n_bytes == sum(len(text) for text in texts)
    assert (train.n_documents + val.n_documents, train.n_documents) == (
        100,
        len(split_documents(train[:], tok.eos_token_id)),
    )
    assert val.n_bytes == sum(len(tok.decode(ids)) for ids in split_documents(val[:], tok.eos_token_id))
    assert len(val) / (len(train) + len(val)) == pytest.approx(0.2, abs=0.02)
    assert meta["dtype"] == "uint16"
    assert meta["tokenizer"] == tok.fingerprint()
    assert meta == json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (len(meta["splits"]["train"]["files"]) > 5) == (shard_tokens == 50)
    whole = train[:]
    for a, b in (
        (0, 1),
        (49, 51),
        (0, len(train)),
        (120, 260),
        (len(train) - 3, len(train) + 5),
        (7, 7),
        (-5, len(train)),
    ):
        assert train[a:b].tolist() == whole[a:b].tolist()
    assert train[0:3].dtype == np.int64
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_the_seed_draws_the_documents(tmp_path, tok, corpus):
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        prepare([corpus[0]], tok, tmp_path / str(number), val_fraction=0.2, seed=seed)
        drawn.append(open_tokens(tmp_path / str(number), "val")[:].tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_one_long_text_gives_its_end(tmp_path, tok):
    text = "the cat sat on the mat. " * 400
    (tmp_path / "a.txt").write_text(text)
    prepare([tmp_path / "a.txt"], tok, tmp_path / "out", val_fraction=0.1)
    train, val = open_tokens(tmp_path / "out"), open_tokens(tmp_path / "out", "val")
    assert np.concatenate([train[:], val[:]]).tolist() == [*tok.encode(text).tolist(), tok.eos_token_id]
    assert train.n_bytes + val.n_bytes == len(text)
    assert len(tok.decode(val[:-1])) == val.n_bytes
    assert len(val) == round(0.1 * (len(train) + len(val)))


def test_without_validation(tmp_path, tok, corpus):
    prepare([corpus[0]], tok, tmp_path / "out", val_fraction=0)
    assert len(open_tokens(tmp_path / "out", "val")) == 0
    assert open_tokens(tmp_path / "out").n_documents == 100


def test_files_that_validate(tmp_path, tok, corpus):
    """Law: with val_paths their documents validate, all of them and no others; those that also train are counted."""
    file, texts = corpus
    (tmp_path / "val.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in (texts[3], "a mat", "", texts[7]))
    )
    meta = prepare([file], tok, tmp_path / "out", val_paths=[tmp_path / "val.jsonl"])
    train, val = open_tokens(tmp_path / "out"), open_tokens(tmp_path / "out", "val")
    assert split_documents(train[:], tok.eos_token_id) == [tok.encode(text).tolist() for text in texts]
    expected = [tok.encode(text).tolist() for text in (texts[3], "a mat", texts[7])]
    assert split_documents(val[:], tok.eos_token_id) == expected
    assert (meta["n_val_in_train"], meta["n_empty"], meta["n_bad"]) == (2, 1, 0)
    assert (val.n_documents, val.n_bytes) == (3, len(texts[3]) + 5 + len(texts[7]))
    assert (meta["val_fraction"], meta["val_sources"]) == (None, [str(tmp_path / "val.jsonl")])
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        prepare([file], tok, tmp_path / "other", val_paths=[tmp_path / "none.txt"])


def test_bad_requests(tmp_path, tok, corpus):
    file, _ = corpus
    with pytest.raises(ValueError, match=r"val_fraction=1 is out of range"):
        prepare([file], tok, tmp_path / "out", val_fraction=1)
    bare = graft.Tokenizer.train([file], vocab_size=260, special_tokens=[])
    with pytest.raises(ValueError, match="the tokenizer has no end-of-text token"):
        prepare([file], bare, tmp_path / "out")
    (tmp_path / "only.txt").write_text(EOT)
    with pytest.raises(ValueError, match="the files hold no document"):
        prepare([tmp_path / "only.txt"], tok, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"out holds no meta\.json; make it with graft data prepare"):
        open_tokens(tmp_path / "out")
    prepare([file], tok, tmp_path / "out")
    with pytest.raises(ValueError, match="out holds finished token shards; give another folder or pass --force"):
        prepare([file], tok, tmp_path / "out")
    prepare([file], tok, tmp_path / "out", force=True)
    with pytest.raises(ValueError, match=r"unknown split 'test'; .* has train, val"):
        open_tokens(tmp_path / "out", "test")
    with pytest.raises(ValueError, match="step 2 is not supported"):
        open_tokens(tmp_path / "out")[0:4:2]
    meta = tmp_path / "out" / "meta.json"
    whole = meta.read_text()
    for damaged in ("{", "{}", '{"splits": null}', "[]", '{"splits": {"train": {}}}', '{"splits": ["train"]}'):
        meta.write_text(damaged)
        with pytest.raises(ValueError, match=r"out/meta\.json is damaged .*; make it again with graft data prepare"):
            open_tokens(tmp_path / "out")
    meta.write_text(whole)
    shard = tmp_path / "out" / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"the train files hold \d+ tokens, meta\.json says \d+"):
        open_tokens(tmp_path / "out")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00000\.bin is missing"):
        open_tokens(tmp_path / "out")


MEASURE = """
import sys, graft
from graft.base.data.shards import prepare
tok = graft.Tokenizer.load(sys.argv[1])
peaks = []
for file in sys.argv[2:]:
    prepare([file], tok, f"{file}.out", workers=1, force=True)
    peaks.append(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024)  # of this process alone
print(*peaks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("megabytes", [110, pytest.param(1024, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_file(tmp_path, tok, megabytes):
    """After 50 MB twice (the allocator settles then), a larger file of one document may add at most 60 MB, whatever its size.

    1 GB stays under 1 GB.
    """
    if shutil.disk_usage(tmp_path).free < 4e6 * megabytes:
        pytest.skip(f"{4e-3 * megabytes:.1f} GB of free disk are needed")
    tok.save(tmp_path / "tok")
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    block = "".join(f"the cat number {n} sat on the mat.\n" for n in range(28_000)).encode()[: 1 << 20]
    for file, n in ((small, 50), (large, megabytes)):
        with file.open("wb") as out:
            for _ in range(n):
                out.write(block)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "tok"), str(small), str(small), str(large)]
    _, first, second = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert second - first < 60e6
    assert second < 1e9
    for left in (large, small, *tmp_path.glob("*.out")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


# --- what is there stays until the new is whole ---------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_not_ours_stays(tmp_path, tok, corpus):
    """Law: files under names that graft uses, which no meta.json names, are neither removed nor overwritten."""
    out = tmp_path / "out"
    out.mkdir()
    mine = {name: name.encode() for name in ("train-00000.bin", "train-notes.bin", "val-00007.bin", "all-tokens.tmp")}
    for name, data in mine.items():
        (out / name).write_bytes(data)
    meta = prepare([corpus[0]], tok, out, val_fraction=0.2)
    assert {name: data for name, data in contents(out).items() if name in mine} == mine
    assert meta["splits"]["train"]["files"] == ["train-00000-1.bin"]
    first = open_tokens(out)[:]
    prepare([corpus[0]], tok, out, val_fraction=0.2, force=True)
    assert {name: data for name, data in contents(out).items() if name in mine} == mine
    assert open_tokens(out)[:].tolist() == first.tolist()
    assert sorted(contents(out)) == sorted([*mine, *contents_of_meta(out), "meta.json"])


def contents_of_meta(out):
    meta = json.loads((out / "meta.json").read_text())
    return [name for split in meta["splits"].values() for name in split["files"]]


def test_force_keeps_the_old_shards_until_the_new_are_whole(tmp_path, tok, corpus, monkeypatch):
    """Law: whatever fails, at whatever write, the folder reads as before; when nothing fails, it holds the new alone."""
    out = tmp_path / "out"
    prepare([corpus[0]], tok, out, val_fraction=0.2)
    before = contents(out)
    (tmp_path / "b.txt").write_text("the other cat sat there. " * 50)
    (tmp_path / "empty.txt").write_text(EOT)
    with pytest.raises(ValueError, match="hold no document"):
        prepare([tmp_path / "empty.txt"], tok, out, force=True)
    assert contents(out) == before
    for name in ("choose", "_write_split", "_move_shards", "write_json", "flush"):
        monkeypatch.setattr(shards, name, lambda *rest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare([tmp_path / "b.txt"], tok, out, force=True)
        monkeypatch.undo()
        assert {key: value for key, value in contents(out).items() if key in before} == before, name
    prepare([tmp_path / "b.txt"], tok, out, force=True)
    assert open_tokens(out).n_documents + open_tokens(out, "val").n_documents <= 2
    fresh = tmp_path / "fresh"
    prepare([tmp_path / "b.txt"], tok, fresh)
    assert open_tokens(out)[:].tolist() == open_tokens(fresh)[:].tolist()


def test_a_refused_preparation_leaves_no_folder(tmp_path, tok, corpus):
    (tmp_path / "empty.txt").write_text(EOT)
    with pytest.raises(ValueError, match="hold no document"):
        prepare([tmp_path / "empty.txt"], tok, tmp_path / "new/out")
    assert not (tmp_path / "new").exists()
    with pytest.raises(NotADirectoryError, match="is a file; expected a folder"):
        prepare([corpus[0]], tok, tmp_path / "empty.txt")


SHORT = """
import resource, sys
from graft.base.data.shards import prepare
from graft.base.tokenizer.tokenizer import Tokenizer
tok, file, out, limit = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    prepare([file], Tokenizer.load(tok), out, workers=1, force=True)
except OSError as error:
    print("OSError", error)
"""


@pytest.mark.parametrize("share", [0.3, 0.98, 1.0])
def test_a_full_disk_is_an_error(tmp_path, tok, corpus, share):
    """Law: with a limit on file size in place of a full disk (the last 4 KiB may be missing too), preparing fails with a
    line that names the file, and the old shards stay."""
    tok.save(tmp_path / "tok")
    (tmp_path / "big.txt").write_text(EOT.join(corpus[1] * 40))
    prepare([corpus[0]], tok, tmp_path / "out")
    before = contents(tmp_path / "out")
    prepare([tmp_path / "big.txt"], tok, tmp_path / "whole", val_fraction=0.0)
    size = (tmp_path / "whole/train-00000.bin").stat().st_size
    limit = int(size * share) - (share == 1.0)
    command = [
        sys.executable,
        "-c",
        SHORT,
        *map(str, (tmp_path / "tok", tmp_path / "big.txt", tmp_path / "out", limit)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("OSError"), done.stdout + done.stderr
    assert "can't write" in done.stdout
    assert ".tokens." in done.stdout
    assert contents(tmp_path / "out") == before


def test_bos_where_the_tokenizer_asks_for_it(tmp_path, tok, corpus):
    """Law: each document is BOS, its ids, EOS when the tokenizer's file asks for BOS, in one piece or several."""
    definition = replace(tok.definition, bos=EOT, add_bos=True)
    asks = graft.Tokenizer(definition)
    meta = prepare([corpus[0]], asks, tmp_path / "out", val_fraction=0.2)
    plain = prepare([corpus[0]], tok, tmp_path / "plain", val_fraction=0.2)
    assert (meta["bos_token_id"], plain["bos_token_id"]) == (tok.eos_token_id, None)
    for split in ("train", "val"):
        ids, without = open_tokens(tmp_path / "out", split), open_tokens(tmp_path / "plain", split)
        # BOS is EOS here: each border has it twice, and the row begins with it
        expected = np.insert(without[:], np.flatnonzero(without[:] == tok.eos_token_id) + 1, tok.eos_token_id)
        assert ids[:].tolist() == [tok.eos_token_id, *expected[:-1].tolist()]
        assert ids.n_bytes == without.n_bytes


def test_bos_of_a_document_in_pieces(tmp_path, tok, monkeypatch):
    """Law: a document that is read in several pieces has one BOS; one long text's validation bytes leave both out."""
    monkeypatch.setattr(shards, "PIECE_BYTES", 300)
    text = "the cat sat on the mat. " * 400
    (tmp_path / "a.txt").write_text(text)
    asks = graft.Tokenizer(replace(tok.definition, bos=EOT, add_bos=True))
    prepare([tmp_path / "a.txt"], asks, tmp_path / "out", val_fraction=0.1)
    train, val = open_tokens(tmp_path / "out"), open_tokens(tmp_path / "out", "val")
    eos = tok.eos_token_id
    assert np.concatenate([train[:], val[:]]).tolist() == [eos, *tok.encode(text).tolist(), eos]
    assert train.n_bytes + val.n_bytes == len(text)


def test_the_unicode_versions_are_a_note(tmp_path, tok, corpus):
    """meta.json names the tables that split and normalized the text; shards without the note, or with another, are read."""
    meta = prepare([corpus[0]], tok, tmp_path / "out")
    expected = {"regex": version("regex"), "unicodedata": unicodedata.unidata_version}
    assert json.loads((tmp_path / "out/meta.json").read_text())["unicode"] == expected
    ids = open_tokens(tmp_path / "out")[:].tolist()
    older = {key: value for key, value in meta.items() if key != "unicode"}
    for changed in (older, older | {"unicode": {"regex": "1", "unicodedata": "1"}}):
        (tmp_path / "out/meta.json").write_text(json.dumps(changed))
        assert open_tokens(tmp_path / "out")[:].tolist() == ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"dtype": 3}, "dtype is a whole number \\(3\\); expected a string"),
        ({"splits": {"train": {"files": [3], "n_tokens": 1, "n_bytes": 1, "n_documents": 1}}}, "expected names"),
        (
            {"splits": {"train": {"files": [], "n_tokens": "1", "n_bytes": 1, "n_documents": 1}}},
            "n_tokens is a string \\('1'\\)",
        ),
        ({"tokenizer": None}, "tokenizer is null; expected a string"),
    ],
)
def test_an_index_of_wrong_types(tmp_path, tok, corpus, change, message):
    prepare([corpus[0]], tok, tmp_path / "out")
    meta = tmp_path / "out/meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    with pytest.raises(ValueError, match=rf"meta\.json is damaged .*{message}"):
        open_tokens(tmp_path / "out")
