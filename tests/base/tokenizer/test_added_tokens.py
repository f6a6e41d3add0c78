"""Parity with the tokenizers library: added tokens with every combination of flags, under every normalizer."""

import json
import random
from pathlib import Path

import pytest

from graft.base.text.documents import read_documents
from graft.base.text.utf8 import to_utf8
from graft.base.tokenizer.tokenizer import Tokenizer

CONTENTS = ["<a>", "ce\u0301", "\ufb01", " x", "<a><b>", "\u212b", "zing", "\u65e5", "\u00a0y"]
PIECES = [
    *CONTENTS,
    "c\u00e9",
    " ",
    "  ",
    "\n",
    "\u00a0",
    "_",
    "s",
    "1",
    "the",
    "A\u030a",
    "\u0301",
    "\u200d",
    "-",
    "fi",
    "\u0345",
]
PIECES += ["\u1e9b\u0323", "\u00b2", "\x1c", "\x85", "\u2160", "\u24b6", "b>"]


def test_flags_of_added_tokens_act_as_in_the_library(tokenizer_dir: Path, tmp_path: Path) -> None:
    """400 seeded files of one to three tokens, eight texts each. The ids must be equal, prefix space or not."""
    tokenizers = pytest.importorskip("tokenizers")
    base = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    for token in base["added_tokens"]:
        base["model"]["vocab"].pop(token["content"], None)
    rng = random.Random(0)
    n_matched = 0
    for _ in range(400):
        first = len(base["model"]["vocab"])
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        base["added_tokens"] = [
            {"id": first + i, "content": content} | {flag: rng.random() < 0.4 for flag in flags}
            for i, content in enumerate(rng.sample(CONTENTS, rng.choice([1, 2, 3])))
        ]
        form = rng.choice([None, "NFC", "NFD", "NFKC", "NFKD"])
        base["normalizer"] = form and {"type": form}
        base["pre_tokenizer"]["add_prefix_space"] = rng.random() < 0.2
        (tmp_path / "tokenizer.json").write_text(json.dumps(base))
        peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        own = Tokenizer.load(tmp_path)
        for _ in range(8):
            text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 9)))
            expected = peer.encode(text, add_special_tokens=False).ids
            assert own.encode(text, allowed_special="all").tolist() == expected, (text, form, base["added_tokens"])
            n_matched += max(expected) >= first
    assert n_matched > 200


def test_half_surrogates_become_the_replacement_character(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Worked by hand: a lone half is U+FFFD in encode and in every record that is read; two halves are their character."""
    assert to_utf8("a\ud800b") == "a\ufffdb".encode()
    assert to_utf8("\udc00\ud83d\ude00\ud83d") == "\ufffd\U0001f600\ufffd".encode()
    tokenizer = Tokenizer.load(tokenizer_dir)
    assert tokenizer.encode("a\ud800b").tolist() == tokenizer.encode("a\ufffdb").tolist()
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert [piece.data for piece in read_documents([tmp_path / "a.jsonl"])] == ["a\ufffdb".encode()]


def test_a_removed_and_inverted_split_that_matches_all_text_is_isolated(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Parity on GPT-4o's pattern; without its alternative for capitals it would drop text, so it is refused."""
    tokenizers = pytest.importorskip("tokenizers")
    base = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    suffix = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    upper, lower = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
    cased = [rf"[^\r\n\p{{L}}\p{{N}}]?[{upper}]*[{lower}]+", rf"[^\r\n\p{{L}}\p{{N}}]?[{upper}]+[{lower}]*"]
    rest = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

    def write(pattern: str) -> None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        base["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(base))

    write("|".join([*(one + suffix for one in cased), rest]))
    own, peer = Tokenizer.load(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (
        "HELLO thE cat's 12345 \n\n/x  CAT'S \u65e5\u672c e\u0301",
        "the cat sat\n" * 9,
        "\u01c5\u02b0 ABC abc",
    ):
        assert own.encode(text).tolist() == peer.encode(text, add_special_tokens=False).ids
    write("|".join([cased[0] + suffix, rest]))
    with pytest.raises(ValueError, match="Split with behavior Removed, invert True is unknown"):
        Tokenizer.load(tmp_path)
