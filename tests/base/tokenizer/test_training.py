"""Worked by hand, and law: the fast trainer equals the readable one; bad input."""

import gzip
import os
from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graft
from graft.base.text.parallel import run_blocks
from graft.base.tokenizer import patterns, reference, training
from graft.base.tokenizer.compiled import merges
from graft.base.tokenizer.compiled.words import WordCounter


def counted(counts):
    """A Counter of words in the trainer's form."""
    sizes = np.array([len(word) for word in counts], np.int64)
    return np.frombuffer(b"".join(counts), np.uint8), sizes, np.array(list(counts.values()), np.int64)


def test_worked_by_hand():
    """Sennrich et al.'s words: low 5, lower 2, widest 3, newest 6.

    Pairs: es 9, st 9, we 8 (2 + 6), lo 7, ow 7. Of the two with 9 (s, t) is the greater: st. Then e st 9; then lo and
    ow with 7: (o, w) is the greater, so ow; then l ow 7; then, with 6, n e, e w, w est: (w, est) is the greatest.
    """
    counts = Counter({b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6})
    expected = [(b"s", b"t"), (b"e", b"st"), (b"o", b"w"), (b"l", b"ow"), (b"w", b"est"), (b"n", b"e")]
    assert reference.train(counts, 6) == expected
    assert merges.train(counted(counts), 6) == expected


@settings(max_examples=200, deadline=None)
@given(
    counts=st.dictionaries(
        st.one_of(st.text("ab", min_size=1, max_size=12).map(str.encode), st.binary(min_size=1, max_size=20)),
        st.integers(1, 4),
        max_size=30,
    )
)
def test_equals_the_reference_on_any_words(counts):
    """Few letters and small counts: ties and runs such as aaaa are the rule."""
    counts = Counter(counts)
    assert merges.train(counted(counts), 60) == reference.train(counts, 60)


@pytest.mark.parametrize("pattern", ["gpt2", "llama3"])
@pytest.mark.parametrize("file", ["mars_german.utf8.txt.gz", "mars_chinese.utf8.txt.gz", "blns.txt"])
def test_equals_the_reference_on_text(shared, pattern, file):
    raw = (shared / "multiscript" / file).read_bytes()
    text = (gzip.decompress(raw) if file.endswith("gz") else raw).decode()[:12_000]
    counter = WordCounter()
    data = text.encode()
    pattern = patterns.resolve(pattern)
    counter.add_text(data, np.array([0]), np.array([len(data)]), patterns.kind_of(pattern))
    counts = reference.count_words([text], pattern)
    flat, sizes, numbers = counter.words()
    ends = np.cumsum(sizes)
    found = {flat[a:b].tobytes(): n for a, b, n in zip(ends - sizes, ends, numbers.tolist(), strict=True)}
    assert found == counts
    n = 150
    assert merges.train(counter.words(), n) == reference.train(counts, n)


def test_the_table_of_words_grows():
    """More different words than the first table holds, short and long, counted twice."""
    words = [f"w{n}" for n in range(70_000)] + [f"a-long-word-number-{n}-" * (1 + n % 40) for n in range(2000)]
    data = "".join(words).encode()
    ends = np.cumsum([len(word) for word in words])
    counter = WordCounter()
    for _ in range(2):
        counter.add_text(data, np.concatenate([[0], ends[:-1]]), ends, patterns.WHOLE)
    flat, sizes, counts = counter.words()
    assert len(sizes) == len(set(words))
    assert int(sizes.sum()) == len(flat) == len(data)
    assert set(counts.tolist()) == {2}


def test_files_become_a_tokenizer(tmp_path):
    """Special tokens are neither split nor merged across; ids are bytes, merges, special tokens."""
    file = tmp_path / "a.txt"
    file.write_text("abab<|endoftext|>abab<|im_end|>ab")
    tok = graft.Tokenizer.train([file], vocab_size=260, special_tokens=["<|endoftext|>", "<|im_end|>"])
    assert tok.merges == [(b"a", b"b"), (b"ab", b"ab")]
    assert tok.vocab[97] == b"a"
    assert tok.vocab[257] == b"abab"
    assert tok.special_tokens == {"<|endoftext|>": 258, "<|im_end|>": 259}
    assert (tok.eos_token_id, tok.bos_token_id, tok.pad_token_id, tok.vocab_size) == (258, None, None, 260)


@pytest.mark.parametrize("pattern", ["gpt2", "qwen2", r"[a-z]+"])
def test_the_number_of_workers_changes_nothing(tmp_path, monkeypatch, pattern):
    """Small pieces, so that each worker gets some; a file without any place to cut; a gzipped one."""
    monkeypatch.setattr(training, "PIECE_BYTES", 3000)
    (tmp_path / "a.txt").write_text("the cat's hat, 12 cats\n\nand  more.\n" * 400)
    (tmp_path / "b.txt").write_text("x" * 20_000)
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("日本語、テキスト。" * 900)
    made = [graft.Tokenizer.train([tmp_path], vocab_size=290, pattern=pattern, workers=n) for n in (1, 2)]
    assert made[0].merges == made[1].merges
    assert made[0].fingerprint() == made[1].fingerprint()


def test_progress_is_told(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("the cat sat on the mat " * 9)
    told = []
    graft.Tokenizer.train([file], vocab_size=262, progress=lambda *state: told.append(state))
    assert ("reading", file.stat().st_size, file.stat().st_size) in told
    assert told[-1] == ("merging", 5, 5)


BAD = [
    ({"vocab_size": 256}, "vocab_size=256 is too small; 256 bytes and 1 special tokens need 257"),
    ({"vocab_size": 5000}, r"vocab_size=5000 is more than this text can fill: after 4 merges .* at vocabulary 261"),
    ({"vocab_size": 260, "special_tokens": ["<a>", ""]}, "special token number 2 is empty"),
    ({"vocab_size": 260, "special_tokens": ["<a>", "<a>"]}, "special token '<a>' is given twice"),
    ({"vocab_size": 260, "special_tokens": "<a>"}, "special_tokens is the string '<a>'; give a list"),
    ({"vocab_size": 260, "pattern": "gpt3"}, "unknown pattern 'gpt3'"),
    ({"vocab_size": 260, "workers": 0}, "workers=0 is less than 1; give at least 1"),
    ({"vocab_size": 260, "workers": -1}, "workers=-1 is less than 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_requests(tmp_path, options, message):
    file = tmp_path / "a.txt"
    file.write_text("abcde")
    with pytest.raises(ValueError, match=message):
        graft.Tokenizer.train([file], **options)


def test_bad_files(tmp_path):
    empty, latin, tokens = tmp_path / "empty.txt", tmp_path / "latin.txt", tmp_path / "tokens.txt"
    empty.write_bytes(b"")
    latin.write_bytes(b"good text caf\xe9 here")
    tokens.write_text("<|endoftext|>" * 3)
    with pytest.raises(ValueError, match=r"empty\.txt is empty; give files with text"):
        graft.Tokenizer.train([empty], vocab_size=300)
    with pytest.raises(FileNotFoundError, match=r"absent\.txt does not exist"):
        graft.Tokenizer.train([tmp_path / "absent.txt"], vocab_size=300)
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: byte 0xe9 at byte offset 13; .* --errors replace"):
        graft.Tokenizer.train([latin], vocab_size=300)
    assert graft.Tokenizer.train([latin], vocab_size=260, errors="replace").vocab_size == 260
    with pytest.raises(ValueError, match="the files hold no text to train on"):
        graft.Tokenizer.train([tokens], vocab_size=300)
    with pytest.raises(ValueError, match="no files were given"):
        graft.Tokenizer.train([], vocab_size=300)


def test_a_worker_that_dies_is_reported():
    """The handler that the workers are asked to make is os._exit(3)."""
    with pytest.raises(OSError, match=r"a worker process ended \(exit code 3\); out of memory"):
        list(run_blocks(partial(os._exit, 3), [1], 2))
