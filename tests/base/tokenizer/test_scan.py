"""Parity with the regex package: the scanner cuts every text where the patterns do."""

from itertools import pairwise

import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.base.tokenizer import patterns
from graft.base.tokenizer.compiled.scan import BLOCK, word_starts

FOUR = ["gpt2", "gpt4", "llama3", "qwen2"]


def scan(text, name):
    """The words of a text, by the scanner."""
    data = text.encode()
    edges = [*word_starts(data, patterns.kind_of(patterns.NAMED[name])).tolist(), len(data)]
    return [data[a:b].decode() for a, b in pairwise(edges)]


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("context", ["{}", "a{}b {} 1{}!{}\n", "'{}s'L{} \n {}  '{}{}"])
def test_every_code_point_in_three_contexts(name, context):
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    text = "".join(context.replace("{}", c) for c in points) if len(context) > 2 else "".join(points)
    if len(context) > 2:
        points = points[:0x3200] + points[0x3200::29]  # the varied part, then a sample
        text = "".join(context.replace("{}", c) for c in points)
    assert scan(text, name) == regex.findall(patterns.NAMED[name], text)


PIECES = [
    "a",
    "Z",
    "é",
    "ß",
    "日",
    "ſ",
    "1",
    "٣",
    "²",
    "!",
    "'",
    "’",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\xa0",
    "\u3000",
    "\x85",
]
PIECES += [
    "'s",
    "'LL",
    "'re",
    "'ve",
    "'ſ",
    "'l",
    "'v",
    "😀",
    "\u0301",
    "\u200b",
    "\x1c",
    "_",
    "\u2028",
    "don't",
    "12345",
    "\n\n ",
]


@pytest.mark.parametrize("name", FOUR)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=st.lists(st.sampled_from(PIECES), max_size=30))
def test_mixtures_of_hard_pieces(name, parts):
    text = "".join(parts)
    assert scan(text, name) == regex.findall(patterns.NAMED[name], text)


@pytest.mark.parametrize("name", FOUR)
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text(name, text):
    assert scan(text, name) == regex.findall(patterns.NAMED[name], text)


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("edge", ["don't", " we'll", "  x", " \u3000y", "日本", "é's", "\n\n a", "12 34", "x\xa0 z"])
def test_where_two_blocks_meet(name, edge):
    """Law: where a block ends changes nothing; the hard place is moved over the block's edge byte by byte."""
    for shift in range(12):
        text = "ab " * ((BLOCK - 6) // 3) + "c" * shift + edge + " tail" * 3
        assert scan(text, name) == regex.findall(patterns.NAMED[name], text)


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("run", ["a", " ", "\n", "!", "7", "é", "\u3000", " \n"])
def test_runs_longer_than_a_block(name, run):
    for before, behind in (("", ""), ("x ", " y"), ("'s", "'s"), ("9", "z")):
        text = before + run * (2 * BLOCK + 5) + behind
        assert scan(text, name) == regex.findall(patterns.NAMED[name], text)


def test_a_misspelt_or_broken_pattern_is_refused():
    with pytest.raises(ValueError, match="unknown pattern 'gtp2'; choose gpt2, gpt4"):
        patterns.resolve("gtp2")
    with pytest.raises(ValueError, match=r"pattern '\(a' is not a valid regular expression"):
        patterns.resolve("(a")
    with pytest.raises(ValueError, match=r"pattern 'a\*' matches the empty string"):
        patterns.resolve("a*")


def test_tiktokens_spellings_are_known():
    public = pytest.importorskip("tiktoken_ext.openai_public")
    assert patterns.resolve(public.r50k_pat_str) == patterns.GPT2
    source = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    source += r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    assert patterns.resolve(source) == patterns.GPT4
    for text in ("x \n  ", "a\n\n b \n", "'S it’s 1234567\r\n\r\n  x"):
        assert regex.findall(source, text) == regex.findall(patterns.GPT4, text)
