"""Parity with tiktoken and tokenizers, and laws of encoding and decoding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graft
from graft.base.tokenizer import reference
from graft.base.tokenizer.compiled import encode as encode_module
from graft.base.tokenizer.compiled.decode import Decoder

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
def test_ids_equal_tiktokens_on_any_text(gpt2, tiktoken_gpt2, text):
    assert gpt2.encode(text).tolist() == tiktoken_gpt2.encode_ordinary(text)


@pytest.mark.parametrize("pattern", ["gpt2", "llama3", r"\w+|\s+"])
def test_ids_equal_the_references(pattern):
    text = "the other mother's brother, then the ether: 12345 then! thé thé\n\n  the" * 3
    tok = graft_tokenizer(text, pattern)
    ranks = {pair: rank for rank, pair in enumerate(tok.merges)}
    words = reference.split_words(text, tok.definition.splits[0])
    expected = [symbol for word in words for symbol in reference.encode_word(word.encode(), ranks)]
    assert [tok.token_bytes(index) for index in tok.encode(text).tolist()] == expected


def graft_tokenizer(text, pattern="gpt2", n_merges=40):
    """A tokenizer trained by the reference."""
    from graft.base.tokenizer.definition import new_definition
    from graft.base.tokenizer.patterns import resolve

    counts = reference.count_words([text], resolve(pattern))
    return graft.Tokenizer(new_definition(reference.train(counts, n_merges), ["<|endoftext|>"], resolve(pattern)))


@pytest.mark.parametrize("letters", ["a", "ab", "=", "日"])
def test_long_words_go_through_the_heap(gpt2, tiktoken_gpt2, letters):
    for n in (127, 128, 129, 130, 5000):
        text = (letters * n)[:n]
        assert gpt2.encode(text).tolist() == tiktoken_gpt2.encode_ordinary(text)


def test_a_full_cache_gives_way_to_another(monkeypatch, shared):
    """Law: how often the cache is renewed changes no id."""
    text = " ".join(f"{n}x{n * 7}" for n in range(3000)) + " a-word-of-more-than-fifteen-bytes-twice" * 2
    whole = graft.Tokenizer.load(shared / "gpt2_bpe").encode(text)
    monkeypatch.setattr(encode_module, "FIRST_SLOTS", 64)
    monkeypatch.setattr(encode_module, "LAST_SLOTS", 256)
    assert graft.Tokenizer.load(shared / "gpt2_bpe").encode(text).tolist() == whole.tolist()


def test_texts_in_a_batch_do_not_touch(gpt2):
    """The first text ends in the midst of what would be one word, a contraction, a run of white space."""
    texts = ["don'", "t", "", "can'l", "l", "a ", " b", "x\n", "\n", "12", "3", "don't"]
    assert [ids.tolist() for ids in gpt2.encode_batch(texts)] == [gpt2.encode(text).tolist() for text in texts]
    assert gpt2.encode_batch([]) == []
    assert gpt2.encode("").tolist() == []


def test_special_tokens_must_be_asked_for(gpt2):
    text = "a<|endoftext|>b"
    assert 50256 not in gpt2.encode(text)
    assert gpt2.encode(text, allowed_special="all").tolist() == [64, 50256, 65]
    assert gpt2.encode(text, allowed_special={"<|endoftext|>"}).tolist() == [64, 50256, 65]
    assert gpt2.decode(gpt2.encode(text)) == gpt2.decode([64, 50256, 65]) == text
    with pytest.raises(ValueError, match=r"allowed_special names \['<\|x\|>'\]; this tokenizer has"):
        gpt2.encode(text, allowed_special={"<|x|>"})
    with pytest.raises(ValueError, match=r"allowed_special is the string '<\|endoftext\|>'; give a set"):
        gpt2.encode(text, allowed_special="<|endoftext|>")
    with pytest.raises(TypeError, match="text is bytes, not str; decode bytes first"):
        gpt2.encode(b"x")


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
def test_any_bytes_come_back(gpt2, data):
    """Law: the bytes' own tokens decode to the bytes; as text, invalid UTF-8 is replaced as Python replaces it."""
    byte_ids = {token: index for index, token in gpt2.vocab.items() if len(token) == 1}
    ids = [byte_ids[bytes([byte])] for byte in data]
    assert gpt2.decode_bytes(ids) == data
    assert gpt2.decode(ids) == data.decode("utf-8", "replace")
    text = data.decode("utf-8", "replace")
    assert gpt2.decode(gpt2.encode(text)) == text


def test_invalid_utf8_can_be_raised(gpt2):
    index = next(index for index, token in gpt2.vocab.items() if token == b"\xff")
    assert gpt2.decode([index]) == "\ufffd"
    with pytest.raises(UnicodeDecodeError, match="0xff in position 0"):
        gpt2.decode([index], errors="strict")


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
    monkeypatch.setattr(encode_module, "ID_BITS", 8)
    with pytest.raises(ValueError, match="ids below 256"):
        graft_tokenizer("aaaa bbbb", n_merges=2).encode("a")


@pytest.mark.parametrize("bad", [-1, 50257, 10**12])
def test_ids_out_of_range(gpt2, bad):
    with pytest.raises(ValueError, match=rf"id {bad} is not in the vocabulary \(0 to 50256\)"):
        gpt2.decode([1, bad, 2])
    with pytest.raises(ValueError, match=rf"id {bad} is not in the vocabulary"):
        gpt2.token_bytes(bad)


def test_ids_of_another_kind(gpt2):
    assert gpt2.decode(np.array([15496, 995], np.uint16)) == gpt2.decode((15496, 995)) == "Hello world"
    assert gpt2.decode([]) == ""
    with pytest.raises(ValueError, match=r"ids are float64 of shape \(1,\); give a flat sequence of whole numbers"):
        gpt2.decode([1.5])
    with pytest.raises(ValueError, match=r"ids are int64 of shape \(1, 2\)"):
        gpt2.decode(np.array([[1, 2]]))


def test_lone_surrogates_are_replaced(gpt2):
    assert gpt2.decode(gpt2.encode("a\ud800b")) == "a\ufffdb"
    assert gpt2.decode(gpt2.encode("\ud83d\ude00")) == "😀"


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("aé日😀\u0301 "), max_size=40))
def test_the_stream_never_shows_half_a_character(gpt2, text):
    byte_ids = {token: index for index, token in gpt2.vocab.items() if len(token) == 1}
    stream = gpt2.stream_decoder()
    pushed = [stream.push(byte_ids[bytes([byte])]) for byte in text.encode()]
    assert "".join(pushed) == text
    assert all(len(part) <= 1 and part != "\ufffd" for part in pushed)
    assert stream.flush() == ""
    stream.push(byte_ids[b"\xe6"])
    assert stream.flush() == "\ufffd"
    assert stream.push(byte_ids[b"a"]) == "a"
