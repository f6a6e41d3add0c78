"""Parity with tiktoken and tokenizers, and laws of encoding and decoding."""

import json

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

import graft
from graft.base.tokenizer import definition, patterns, reference, split
from graft.base.tokenizer.compiled import encode as encode_module
from graft.base.tokenizer.compiled.decode import Decoder
from graft.base.tokenizer.compiled.words import WordCounter

ANY = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aabbe tionshe'' \n\t1234")), max_size=200
)


def test_ids_equal_tiktokens_on_many_scripts(gpt2, tiktoken_gpt2, scripts):
    for name, text in scripts.items():
        ids = gpt2.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == tiktoken_gpt2.encode_ordinary(text), name
        assert gpt2.decode(ids) == text


def test_ids_equal_tiktokens_on_code(gpt2, tiktoken_gpt2, code):
    assert len(code) == 10_000_000
    ids = gpt2.encode(code)
    assert ids.tolist() == tiktoken_gpt2.encode_ordinary(code)
    assert gpt2.decode(ids) == code


def test_ids_equal_tokenizers_on_many_scripts(gpt2, scripts, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    gpt2.save(tmp_path)
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for name, text in scripts.items():
        assert gpt2.encode(text).tolist() == peer.encode(text).ids, name


@settings(max_examples=300, deadline=None)
@given(text=ANY)
def test_ids_equal_tiktokens_on_any_text(trained, tiktoken_trained, text):
    assert trained.encode(text).tolist() == tiktoken_trained.encode_ordinary(text)


@pytest.mark.parametrize("pattern", ["gpt2", "llama3", r"\w+|\s+"])
def test_ids_equal_the_references(pattern):
    text = "the other mother's brother, then the ether: 12345 then! thé thé\n\n  the" * 3
    tok = graft_tokenizer(text, pattern)
    ranks = {pair: rank for rank, pair in enumerate(tok.merges)}
    words = reference.split_words(text, tok.definition.splits[0])
    expected = [symbol for word in words for symbol in reference.encode_word(word.encode(), ranks)]
    assert [tok.token_bytes(index) for index in tok.encode(text).tolist()] == expected


def isolated(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


DIGITS = {"type": "Digits", "individual_digits": True}
WHOLE_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTE_LEVEL = WHOLE_GPT2 | {"use_regex": False}
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GENERAL = {
    "deepseek-v3": [*map(isolated, DEEPSEEK), BYTE_LEVEL],
    "gpt-4o": [isolated(GPT4O, "Removed", True), BYTE_LEVEL],
    "smollm2": [DIGITS, WHOLE_GPT2],
    "words only": [isolated(r"\w+"), BYTE_LEVEL],  # leaves text between its matches
}
MIXED = (
    "I'll  pay 12345 €, don't!\r\n\n 漢字とカナ123ひらがな  x\t٣٤٥٦ naïve Ünï\u0301 "
    "(foo)/bar\n\n  \u3000 HelloWORLD's 😀👍🏽 ไทย "
)


@pytest.fixture(scope="module", params=GENERAL)
def general(request, trained, tmp_path_factory):
    """The same tokenizer here and in tokenizers, its text split as one of GENERAL."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("general")
    trained.save(folder)
    main = json.loads((folder / "tokenizer.json").read_text())
    main["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": GENERAL[request.param]}
    (folder / "tokenizer.json").write_text(json.dumps(main))
    return graft.Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_general_patterns_equal_tokenizers(general, trained):
    """Parity with tokenizers for patterns that only the regex package can cut by, in one text and in a batch."""
    tok, peer = general
    texts = [MIXED * 3, "", "12", "a", " ", "  \n", "日本語1234", *MIXED.split(" ")]
    expected = [peer.encode(text, add_special_tokens=False).ids for text in texts]
    assert [tok.encode(text).tolist() for text in texts] == expected
    assert [ids.tolist() for ids in tok.encode_batch(texts)] == expected
    assert expected[0] != trained.encode(texts[0]).tolist()  # the patterns do change the ids
    assert not tok.can_stream


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("aBé 漢かカ1٣\n\r\t\u3000.'s(😀\u0301ไ"), max_size=40))
def test_general_patterns_equal_tokenizers_on_any_text(general, text):
    tok, peer = general
    assert tok.encode(text).tolist() == peer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("splits", [DEEPSEEK, (GPT4O,), (r"\w+",), (r"\p{N}", r"(?<=x)y+|^a|z$|\bq")])
def test_the_cuts_equal_the_references(splits):
    """Parity with reference.py; in the last case the patterns look behind and at the edges of their piece."""
    text = MIXED * 2 + "xyy1a2xz3yq 4ab" * 2
    pieces = [text]
    for pattern in splits:
        pieces = [word for piece in pieces for word in reference.split_words(piece, pattern)]
    ends = split.cut(text, text.encode(), [regex.compile(pattern) for pattern in splits])
    assert ends.tolist() == np.cumsum([len(piece.encode()) for piece in pieces]).tolist()


def graft_tokenizer(text, pattern="gpt2", n_merges=40):
    """A tokenizer trained by the reference."""
    from graft.base.tokenizer.definition import new_definition
    from graft.base.tokenizer.patterns import resolve

    counts = reference.count_words([text], resolve(pattern))
    return graft.Tokenizer(new_definition(reference.train(counts, n_merges), ["<|endoftext|>"], resolve(pattern)))


@pytest.mark.parametrize("letters", ["a", "ab", "=", "日"])
def test_long_words_go_through_the_heap(trained, tiktoken_trained, letters):
    for n in (127, 128, 129, 130, 5000):
        text = (letters * n)[:n]
        assert trained.encode(text).tolist() == tiktoken_trained.encode_ordinary(text)


def test_a_full_cache_gives_way_to_another(monkeypatch, trained):
    """Law: how often the cache is renewed changes no id."""
    text = " ".join(f"{n}x{n * 7}" for n in range(3000)) + " a-word-of-more-than-fifteen-bytes-twice" * 2
    whole = graft.Tokenizer(trained.definition).encode(text)
    monkeypatch.setattr(encode_module, "FIRST_SLOTS", 64)
    monkeypatch.setattr(encode_module, "LAST_SLOTS", 256)
    assert graft.Tokenizer(trained.definition).encode(text).tolist() == whole.tolist()
    ranks = {pair: rank for rank, pair in enumerate(trained.merges)}
    words = reference.split_words(text, trained.definition.splits[0])
    expected = [symbol for word in words for symbol in reference.encode_word(word.encode(), ranks)]
    assert [trained.token_bytes(index) for index in whole.tolist()] == expected


def test_texts_in_a_batch_do_not_touch(trained):
    """The first text ends in the midst of what would be one word, a contraction, a run of white space."""
    texts = ["don'", "t", "", "can'l", "l", "a ", " b", "x\n", "\n", "12", "3", "don't"]
    assert [ids.tolist() for ids in trained.encode_batch(texts)] == [trained.encode(text).tolist() for text in texts]
    assert trained.encode_batch([]) == []
    assert trained.encode("").tolist() == []


def test_special_tokens_must_be_asked_for(trained):
    text = "a<|endoftext|>b"
    end = trained.eos_token_id
    assert end not in trained.encode(text)
    assert trained.encode(text, allowed_special="all").tolist() == [97, end, 98]
    assert trained.encode(text, allowed_special={"<|endoftext|>"}).tolist() == [97, end, 98]
    assert trained.decode(trained.encode(text)) == trained.decode([97, end, 98]) == text
    with pytest.raises(ValueError, match=r"allowed_special names \['<\|x\|>'\]; this tokenizer has"):
        trained.encode(text, allowed_special={"<|x|>"})
    with pytest.raises(ValueError, match=r"allowed_special is the string '<\|endoftext\|>'; give a set"):
        trained.encode(text, allowed_special="<|endoftext|>")
    with pytest.raises(TypeError, match="text is bytes, not str; decode bytes first"):
        trained.encode(b"x")


def test_the_longest_special_token_wins():
    tok = graft_tokenizer("abab")
    from dataclasses import replace

    from graft.base.tokenizer.definition import AddedToken

    added = (AddedToken("<a>", 500), AddedToken("<a><b>", 501), AddedToken("<l>", 502, lstrip=True, rstrip=True))
    tok = graft.Tokenizer(replace(tok.definition, added=added, eos=None))
    assert tok.encode("<a><b><a>", allowed_special="all").tolist() == [501, 500]
    assert tok.encode("a  <l> \nb", allowed_special="all").tolist() == [97, 502, 98]
    assert tok.vocab_size == 503


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=100))
def test_any_bytes_come_back(trained, data):
    """Law: the bytes' own tokens decode to the bytes; as text, invalid UTF-8 is replaced as Python replaces it."""
    byte_ids = {token: index for index, token in trained.vocab.items() if len(token) == 1}
    ids = [byte_ids[bytes([byte])] for byte in data]
    assert trained.decode_bytes(ids) == data
    assert trained.decode(ids) == data.decode("utf-8", "replace")
    text = data.decode("utf-8", "replace")
    assert trained.decode(trained.encode(text)) == text


def test_invalid_utf8_can_be_raised(trained):
    index = next(index for index, token in trained.vocab.items() if token == b"\xff")
    assert trained.decode([index]) == "\ufffd"
    with pytest.raises(UnicodeDecodeError, match="0xff in position 0"):
        trained.decode([index], errors="strict")


def test_tokens_of_any_size_come_back():
    """The first buffer has 16 bytes an id; tokens of hundreds of bytes make decoding start a larger one, again and again."""
    vocab = {byte: bytes([byte]) for byte in range(256)} | {256 + size: b"x" * size for size in range(14, 600, 3)}
    decoder = Decoder(vocab)
    ids = np.random.default_rng(0).choice(sorted(vocab), 5000).astype(np.int32)
    expected = b"".join(vocab[index] for index in ids.tolist())
    assert decoder.decode(ids).tobytes() == expected
    assert decoder.decode(ids[:1]).tobytes() == vocab[int(ids[0])]
    for bad in (256, 271, -1, 2**31 - 1):  # two in the vocabulary's gaps
        with pytest.raises(ValueError, match=f"id {bad} is not in the vocabulary"):
            decoder.decode(np.append(ids, np.int32(bad)))


def test_an_id_that_a_merge_cannot_hold(monkeypatch):
    """A merge's two ids share 64 bits with its rank; the limit is far above any vocabulary, and said when met."""
    monkeypatch.setattr(definition, "ID_BITS", 8)
    with pytest.raises(ValueError, match="ids below 256"):
        graft_tokenizer("aaaa bbbb", n_merges=2).encode("a")


@pytest.mark.parametrize("bad", [-1, 900, 10**12])
def test_ids_out_of_range(trained, bad):
    with pytest.raises(ValueError, match=rf"id {bad} is not in the vocabulary \(0 to 899\)"):
        trained.decode([1, bad, 2])
    with pytest.raises(ValueError, match=rf"id {bad} is not in the vocabulary"):
        trained.token_bytes(bad)


def test_ids_of_another_kind(trained):
    assert trained.decode(np.array([72, 105], np.uint16)) == trained.decode((72, 105)) == "Hi"
    assert trained.decode([]) == ""
    with pytest.raises(ValueError, match=r"ids are float64 of shape \(1,\); give a flat sequence of whole numbers"):
        trained.decode([1.5])
    with pytest.raises(ValueError, match=r"ids are int64 of shape \(1, 2\)"):
        trained.decode(np.array([[1, 2]]))


def test_lone_surrogates_are_replaced(trained):
    assert trained.decode(trained.encode("a\ud800b")) == "a\ufffdb"
    assert trained.decode(trained.encode("\ud83d\ude00")) == "😀"


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("aé日😀\u0301 "), max_size=40))
def test_the_stream_never_shows_half_a_character(trained, text):
    byte_ids = {token: index for index, token in trained.vocab.items() if len(token) == 1}
    stream = trained.stream_decoder()
    pushed = [stream.push(byte_ids[bytes([byte])]) for byte in text.encode()]
    assert "".join(pushed) == text
    assert all(len(part) <= 1 and part != "\ufffd" for part in pushed)
    assert stream.flush() == ""
    stream.push(byte_ids[b"\xe6"])
    assert stream.flush() == "\ufffd"
    assert stream.push(byte_ids[b"a"]) == "a"


def hash_long(chunks, size):
    """words.py's hash of a long word whose size is a multiple of eight, on Python's own integers."""
    mix, mix_2, low = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, (1 << 64) - 1
    value = size * mix & low
    states = []
    for chunk in chunks[:-1]:
        value = (value ^ chunk) * mix_2 & low
        value ^= value >> 32
        states.append(value)
    value = (value ^ chunks[-1]) * mix & low
    return value ^ value >> 32, states


def test_two_words_with_one_hash_stay_apart(trained):
    """Worked by hand: the second eight bytes of b are chosen so that after them its hash is what a's is; 24 bytes each."""
    a = [int.from_bytes(part, "little") for part in (b"the word", b" that is", b" counted")]
    b = [int.from_bytes(b"a differ", "little"), 0, a[2]]
    b[1] = a[1] ^ hash_long(a, 24)[1][0] ^ hash_long(b, 24)[1][0]
    assert a != b
    assert hash_long(a, 24)[0] == hash_long(b, 24)[0]
    words = [b"".join(chunk.to_bytes(8, "little") for chunk in chunks) for chunks in (a, b)]
    counter = WordCounter()
    data, ends = b"".join(words) + words[1], np.array([24, 48, 72])
    counter.add_text(data, ends - 24, ends, patterns.WHOLE)
    flat, sizes, counts = counter.words()
    found = {flat[24 * i : 24 * i + 24].tobytes(): n for i, n in enumerate(counts.tolist())}
    assert (sizes.tolist(), found) == ([24, 24], {words[0]: 1, words[1]: 2})
    ids, id_ends = encode_module.Encoder(trained.definition).encode_bytes(data, ends, patterns.WHOLE)
    assert trained.decode_bytes(ids[: id_ends[1]]) == words[0] + words[1]


def test_what_changes_ids_changes_the_fingerprint(trained):
    """Law: each part that decides the ids counts, the order of the merges too; the chat template doesn't."""
    from dataclasses import replace

    whole = trained.definition
    swapped = [whole.merges[1], whole.merges[0], *whole.merges[2:]]
    others = [
        replace(whole, merges=swapped),
        replace(whole, merges=whole.merges[:-1]),
        replace(whole, splits=(patterns.LLAMA3,)),
        replace(whole, normalizer="NFC"),
        replace(whole, prefix_space=True),
        replace(whole, ignore_merges=True),
        replace(whole, added=()),
        *(replace(whole, added=(replace(whole.added[0], **{flag: True}),)) for flag in FLAGS),
        replace(whole, vocab=whole.vocab | {97: b"b", 98: b"a"}),
    ]
    prints = {one.fingerprint() for one in [whole, *others]}
    assert len(prints) == 1 + len(others)
    assert replace(whole, chat_template="x").fingerprint() == whole.fingerprint()


FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
