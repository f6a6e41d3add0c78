"""tokenizer.json with wrong contents: one line that names the file and the key, in every case, and never a signal."""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from graft.base.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def whole(tokenizer_dir: Path) -> dict[str, Any]:
    return json.loads((tokenizer_dir / "tokenizer.json").read_text())


def load(data: Any, folder: Path) -> Tokenizer:
    (folder / "tokenizer.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "vocab", "a"), -2, "the id of 'a' is -2; graft's tokenizer has room for 0 to"),
        (("model", "vocab", "a"), 10**9, "the id of 'a' is 1,000,000,000; graft's"),
        (("model", "vocab", "a"), "7", "the id of 'a' is '7'; expected a whole number"),
        (("model", "vocab", "a"), True, "the id of 'a' is True; expected a whole number"),
        (("model", "vocab", "a"), 66, "both have id 66; each token needs its own"),
        (("model", "vocab"), [], "vocab is a list .*; expected an object"),
        (("model", "merges"), {}, "merges is an object"),
        (("model", "merges", 0), 7, "merge 0 is 7; two tokens are expected"),
        (("model", "merges", 0), ["a"], "two tokens are expected"),
        (("model",), 3, "model is a whole number"),
        (("added_tokens",), 3, "added_tokens is a whole number"),
        (("added_tokens", 0), 3, "added token 0 is a whole number"),
        (("added_tokens", 0, "id"), 10**9, "1,000,000,000"),
        (("added_tokens", 0, "id"), -1, "is -1"),
        (("added_tokens", 0, "id"), 65, "both have id 65"),
        (("added_tokens", 0, "id"), None, "id is missing"),
        (("added_tokens", 0, "content"), None, "content is missing"),
        (("added_tokens", 0, "content"), "", "has the empty text"),
        (("added_tokens", 0, "lstrip"), "no", "lstrip is a string"),
        (("added_tokens", 1, "content"), "<|endoftext|>", "has two ids"),
        (("pre_tokenizer",), [1], "pre_tokenizer is a list"),
        (("pre_tokenizer", "type"), None, "type is missing"),
        (("normalizer",), {"type": "Sequence", "normalizers": [3]}, "a step is a whole number"),
        (("post_processor",), {"type": "TemplateProcessing", "single": [3]}, "single is a whole number"),
        (("post_processor",), {"type": "Sequence"}, "processors is missing"),
    ],
)
def test_each_wrong_value_is_one_line(
    path: tuple[Any, ...], value: Any, message: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    damaged = copy.deepcopy(whole)
    at = damaged
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ValueError, match=message) as caught:
        load(damaged, tmp_path)
    assert "tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_deep_nesting_and_other_kinds_of_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        load("[" * 100_000, tmp_path)
    with pytest.raises(ValueError, match="holds a list; expected an object"):
        load(list(range(99)), tmp_path)
    with pytest.raises(ValueError, match="not JSON"):
        load('{"a": ' + "9" * 5000 + "}", tmp_path)


CHILD = """
import sys
from pathlib import Path
from graft.base.tokenizer.tokenizer import Tokenizer
texts = ["the cat sat on the mat", "\\x00\\x01\\xe9\\U0001f600 " * 9, "a" * 300, "<|endoftext|>"]
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        tokenizer = Tokenizer.load(folder)
        for text in texts:
            ids = tokenizer.encode(text)
            assert ids.min(initial=0) >= 0 and ids.max(initial=0) < tokenizer.vocab_size, ids
            tokenizer.decode(ids)
    except ValueError as error:
        assert "\\n" not in str(error)
print("all done")
"""


def test_no_damage_ends_a_process(whole: dict[str, Any], tmp_path: Path) -> None:
    """Property: 300 seeded damages of values anywhere in the file; each loads rightly or is refused, and no signal comes."""
    rng = random.Random(0)
    junk = [-1, -(2**40), 2**31, 2**63, 10**9, 1.5, None, True, "", "x", [], {}, [[]], "\ud800"]
    for i in range(300):
        damaged = copy.deepcopy(whole)
        for _ in range(rng.choice((1, 1, 1, 3))):
            at: Any = damaged
            while True:
                keys = list(at) if isinstance(at, dict) else list(range(len(at)))
                if not keys:
                    break
                key = rng.choice(keys)
                if isinstance(at[key], dict | list) and rng.random() < 0.8:
                    at = at[key]
                    continue
                if rng.random() < 0.2:
                    del at[key]
                else:
                    at[key] = rng.choice([*junk, rng.randrange(400)])
                break
        (tmp_path / f"{i:03}").mkdir()
        (tmp_path / f"{i:03}/tokenizer.json").write_text(json.dumps(damaged))
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "all done\n"), done.stderr[-2000:]


def test_bytes_that_the_vocabulary_lacks_are_dropped_as_the_library_does(whole: dict[str, Any], tmp_path: Path) -> None:
    """Parity: SmolLM2's file lacks 21 bytes. Merges go over the gap: with x absent, `thxe` becomes the ids of `the`."""
    lacking = copy.deepcopy(whole)
    for letter in ("x", "Ģ", "à"):  # the letter x, and the characters that stand for bytes 0x80 + 0x22 and 0xe0
        lacking["model"]["vocab"].pop(letter, None)
    lacking["model"]["merges"] = [m for m in lacking["model"]["merges"] if not {"x", "Ģ", "à"} & set("".join(m))]
    ours = load(lacking, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (
        "thxe cat",
        "x",
        "xx x",
        "the x",
        "",
        "xthe xx birdx" * 90,
        "\u0800 sat\u0022",
        "x" * 500,
        "a" * 200 + "x",
    ):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids, text
    assert ours.encode("thxe").tolist() == ours.encode("the").tolist()


def test_the_real_smollm2(tmp_path: Path) -> None:
    """Parity: its vocabulary lacks bytes 04 06 13 14 16 1d c0 c1 f1 f2 f5-ff; the text holds each of them that UTF-8 can."""
    if "SMOLLM2_DIR" not in os.environ:
        pytest.skip("SMOLLM2_DIR names no folder with SmolLM2's tokenizer.json")
    folder = Path(os.environ["SMOLLM2_DIR"])
    ours, theirs = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "a\x04b\x06 \x13\x14\x16\x1d x\x04y \U00040000 \U00080000 the 1234 caf\u00e9\n" * 30
    assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode("\x04\x06").tolist() == []
