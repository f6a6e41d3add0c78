"""Law: pieces put together are the documents, and cutting changes no word; bad input."""

import gzip
import io
import json

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.base.text.documents import ReadCounts, batch_pieces, find_cut, list_files, read_documents
from graft.base.tokenizer.patterns import NAMED

EOT = "<|endoftext|>"


def documents(pieces):
    """The pieces of each document put together."""
    out, open_document = [], b""
    for piece in pieces:
        open_document += piece.data
        if piece.ends:
            out.append(open_document.decode())
            open_document = b""
    assert open_document == b""
    return out


def test_every_format(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "a.txt").write_text(f"one{EOT}two{EOT}{EOT}three\n")
    (tmp_path / "b.jsonl").write_text('{"text": "four", "n": 1}\n\n{"text": "five\\n"}\n')
    (tmp_path / "c.json").write_text(json.dumps([{"text": "six"}, {"text": ""}, "seven"]))
    parquet.write_table(pa.table({"text": ["eight", "nine"], "n": [1, 2]}), tmp_path / "d.parquet")
    with gzip.open(tmp_path / "e.txt.gz", "wt") as file:
        file.write("ten")
    with gzip.open(tmp_path / "f.jsonl.gz", "wt") as file:
        file.write('{"text": "eleven"}')
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"text": ["twelve"]}), buffer)
    (tmp_path / "g.parquet.gz").write_bytes(gzip.compress(buffer.getvalue()))
    (tmp_path / "h.json").write_text('{"text": "thirteen"}\n{"text": "fourteen"}\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "i.py").write_text("fifteen = 15")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    found = documents(read_documents([tmp_path], separators=[EOT]))
    first = ["one", "two", "three\n", "four", "five\n", "six", "seven", "eight", "nine"]
    assert found == [*first, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen = 15"]


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("abé日 ,.'\n\t\r1!\u3000。<|endoftext|>"), max_size=300),
    size=st.integers(1, 40),
    name=st.sampled_from(sorted(NAMED)),
)
def test_pieces_are_the_document_and_keep_its_words(tmp_path_factory, text, size, name):
    file = tmp_path_factory.mktemp("pieces") / "a.txt"
    file.write_bytes((text or "x").encode())
    pieces = list(read_documents([file], separators=[EOT], piece_bytes=size))
    assert documents(pieces) == [part for part in (text or "x").split(EOT) if part]
    words = [word for piece in pieces for word in regex.findall(NAMED[name], piece.data.decode())]
    whole = [word for document in documents(pieces) for word in regex.findall(NAMED[name], document)]
    assert words == whole


def test_find_cut_by_hand():
    """Before a blank; after a lone line break; between a letter and a stop; nowhere in a run of letters."""
    assert find_cut(b"ab cd ef", 8) == 5
    assert find_cut(b"ab cd ef", 4) == 2
    assert find_cut("日本。語".encode(), 12) == 6
    assert find_cut(b"ab\ncdef", 7) == 3
    assert find_cut(b"ab\n\ncdef", 8) == 0
    assert find_cut(b"abcdef", 6) == 0


def test_batches_hold_everything(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in range(1, 60)))
    pieces = list(read_documents([tmp_path / "a.jsonl"]))
    batches = list(batch_pieces(pieces, 100))
    assert [piece for batch in batches for piece in batch] == pieces
    assert all(sum(len(piece.data) for piece in batch[:-1]) < 100 for batch in batches)


def test_invalid_utf8_is_named_or_replaced(tmp_path):
    """The offset is that in the file, over pieces and separators."""
    raw = b"good text. " * 20 + EOT.encode() + b"bad \xff here"
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"a\.txt is not UTF-8: byte 0xff at byte offset {raw.index(0xFF)};"):
        list(read_documents([tmp_path / "a.txt"], separators=[EOT], piece_bytes=50))
    replaced = documents(read_documents([tmp_path / "a.txt"], separators=[EOT], piece_bytes=50, errors="replace"))
    assert replaced == ["good text. " * 20, "bad \ufffd here"]


BAD = [
    ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl line 2: not JSON \(.* at column"),
    ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl line 1: no text in the field 'text'; the row has 'body'; name one with"),
    ("a.jsonl", b"[1]\n", r"a\.jsonl line 1: expected an object with the field 'text', got list"),
    ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl is not UTF-8: byte 0xff at byte offset 10"),
    ("a.json", b'[{"text": 1}]', r"a\.json row 1: no text in the field 'text'"),
    ("a.json", b"[", r"a\.json line 1: not JSON"),
    ("a.txt.gz", b"not gzip", r"a\.txt\.gz is not a whole gzip file"),
    ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"a\.txt\.gz is not a whole gzip file"),
    ("a.parquet", b"PAR0 nothing", r"a\.parquet is not a parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents([tmp_path / name]))


def test_parquet_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    assert documents(read_documents([tmp_path / "a.parquet"], field="body")) == ["x"]
    with pytest.raises(ValueError, match="no column 'text'; it has 'body', 'n'"):
        list(read_documents([tmp_path / "a.parquet"]))
    with pytest.raises(ValueError, match="row 1: the column 'n' holds int, not text"):
        list(read_documents([tmp_path / "a.parquet"], field="n"))


def test_what_is_left_out_is_counted(tmp_path):
    """Bad rows stop the reading, or are counted and told; empty and null documents and replaced bytes are counted always."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\nno JSON\n{"text": ""}\n{"text": null}\n{"body": 1}\n'
        b'{"text": "caf\xe9"}\n{"text": "two"}'
    )
    parquet.write_table(pa.table({"text": [*map(str, range(1500)), None]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_bytes(f"{EOT}x{EOT}{EOT}y\xe9{EOT}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl line 2: not JSON"):
        list(read_documents([tmp_path / "a.jsonl"]))
    counts = ReadCounts()
    found = documents(read_documents([tmp_path / "a.jsonl"], on_bad="skip", counts=counts))
    assert found == ["one", "two"]
    assert (counts.n_documents, counts.n_empty, counts.n_bad, counts.n_replaced) == (2, 2, 3, 0)
    kinds = (
        "line 2: not JSON",
        "line 5: no text in the field 'text'; the row has 'body'",
        "not UTF-8: byte 0xe9 at byte offset",
    )
    for said, expected in zip(counts.shown, kinds, strict=True):
        assert expected in said
    assert counts.lines()[0] == "2 empty documents were left out"
    assert counts.lines()[1].startswith("3 rows that give no text were left out: ")
    counts = ReadCounts()
    found = documents(read_documents([tmp_path], separators=[EOT], on_bad="skip", errors="replace", counts=counts))
    assert found == ["one", "caf\ufffd", "two", *map(str, range(1500)), "x", "y\ufffd"]
    assert counts.figures() == {"n_empty": 4, "n_bad": 2, "n_replaced": 2}
    assert counts.n_documents == 1505
    bad = pa.table({"text": [*range(1500), 7]})
    parquet.write_table(bad, tmp_path / "d.parquet")
    counts = ReadCounts()
    assert not list(read_documents([tmp_path / "d.parquet"], on_bad="skip", counts=counts))
    assert (counts.n_bad, len(counts.shown)) == (1501, 5)
    assert "(and 1,496 more)" in counts.lines()[0]
    with pytest.raises(ValueError, match="row 1: the column 'text' holds int"):
        list(read_documents([tmp_path / "d.parquet"]))


def test_paths_that_cannot_be_read(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="holds no text, JSON, JSONL or parquet files"):
        list_files([tmp_path])
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        list_files([tmp_path / "empty.txt"])
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        list_files([tmp_path / "absent"])
    with pytest.raises(ValueError, match="no files were given"):
        list_files([])
