"""Parity with transformers and tokenizers, both ways: what graft writes they read alike, what they write graft does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import graft
from graft.base.tokenizer import files as tokenizer_files

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "Hello world, it's 12345 o'clock! DON'T we'LL",
    "  two  blanks\n\n\tand a tab \n",
    "<|im_start|>user\nhi<|im_end|> <think>no</think>",
    "naïve café 日本語テキスト e\u0301 Å 😀\u00a0x",
    "",
    " ",
    "a" * 300,
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    lines = "".join(f"It's line {n}: the café's naïve 日本語 text, {n * n}\n" for n in range(300))
    file.write_text("".join(TEXTS) * 5 + lines)
    return file


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "llama3", "qwen2", r"\w+|[^\w\s]+|\s+"])
def test_transformers_reads_what_graft_writes(corpus, tmp_path, pattern):
    transformers = pytest.importorskip("transformers")
    tok = graft.Tokenizer.train([corpus], vocab_size=360, pattern=pattern, special_tokens=SPECIAL)
    tok.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tok.save(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids = tok.encode(text, allowed_special="all").tolist()
        assert ids == auto(text)["input_ids"] == peer.encode(text).ids, text
        assert tok.decode(ids) == auto.decode(ids) == text
    assert auto.eos_token_id == tok.eos_token_id
    assert len(auto) == tok.vocab_size
    assert auto.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|im_start|>x<|im_end|>"
    again = graft.Tokenizer.load(tmp_path)
    assert again.fingerprint() == tok.fingerprint()
    assert (again.vocab, again.merges, again.special_tokens) == (tok.vocab, tok.merges, tok.special_tokens)
    assert again.chat_template == tok.chat_template


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_transformers_keeps_the_ids_beside_a_model(corpus, tmp_path, model_type):
    """transformers may choose the tokenizer's class by config.json's model type."""
    transformers = pytest.importorskip("transformers")
    tok = graft.Tokenizer.train([corpus], vocab_size=450, pattern="llama3", special_tokens=SPECIAL)
    tok.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 450}))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tok.encode(text, allowed_special="all").tolist() == auto(text)["input_ids"]


def peer_tokenizer(corpus, pre_tokenizer, *, normalizer=None, special=SPECIAL, **options):
    """A tokenizer trained by the tokenizers library."""
    from tokenizers import AddedToken, decoders, models, trainers

    peer = tokenizers.Tokenizer(models.BPE(**options))
    peer.pre_tokenizer = pre_tokenizer
    peer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        peer.normalizer = normalizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    peer.train([str(corpus)], trainer)
    peer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return peer


def styles():
    """The pre-tokenizers of GPT-2, Llama 3, Qwen 2/3, SmolLM, and GPT-2 with a space in front."""
    from tokenizers import Regex, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    llama = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    plain = ByteLevel(add_prefix_space=False, use_regex=False)

    def split(pattern, behavior="isolated", **more):
        return Sequence([Split(Regex(pattern), behavior=behavior, **more), plain])

    return {
        "gpt2": (ByteLevel(add_prefix_space=False), {}),
        "prefix": (ByteLevel(add_prefix_space=True), {}),
        "llama3": (split(llama), {"ignore_merges": True}),
        "qwen2": (split(llama.replace("{1,3}", "")), {"normalizer": normalizers.NFC()}),
        "removed": (split(llama, "removed", invert=True), {}),
        "smollm": (Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]), {}),
        "none": (plain, {}),
    }


@pytest.mark.parametrize("style", ["gpt2", "prefix", "llama3", "qwen2", "removed", "smollm", "none"])
def test_graft_reads_what_tokenizers_writes(corpus, tmp_path, style):
    pre_tokenizer, options = styles()[style]
    peer = peer_tokenizer(corpus, pre_tokenizer, **options)
    peer.save(str(tmp_path / "tokenizer.json"))
    tok = graft.Tokenizer.load(tmp_path)
    for text in TEXTS:
        expected = peer.encode(text).ids
        assert tok.encode(text, allowed_special="all").tolist() == expected, text
        assert tok.decode_bytes(expected).decode() == peer.decode(expected, skip_special_tokens=False)
    tok.save(tmp_path / "again")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    assert [again.encode(text).ids for text in TEXTS] == [peer.encode(text).ids for text in TEXTS]
    assert graft.Tokenizer.load(tmp_path / "again").fingerprint() == tok.fingerprint()


def test_bos_is_reported_and_never_added(corpus, tmp_path):
    """Llama 3's post-processor puts BOS before each text; graft leaves that to who builds the prompt."""
    from tokenizers import processors

    peer = peer_tokenizer(corpus, styles()["llama3"][0], special=["<|begin|>", "<|end|>"])
    template = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", peer.token_to_id("<|begin|>"))]
    )
    peer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    peer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<|begin|>"},
        "eos_token": "<|end|>",
        "chat_template": [{"name": "default", "template": "T"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = graft.Tokenizer.load(tmp_path)
    assert tok.add_bos
    assert tok.bos_token_id == peer.token_to_id("<|begin|>")
    assert tok.eos_token_id == peer.token_to_id("<|end|>")
    assert tok.chat_template == "T"
    assert [tok.bos_token_id, *tok.encode("hello").tolist()] == peer.encode("hello").ids
    tok.save(tmp_path / "again")
    again = graft.Tokenizer.load(tmp_path / "again")
    assert (again.add_bos, again.bos_token_id, again.chat_template) == (True, tok.bos_token_id, "T")


def test_gpt2s_own_files(gpt2, shared):
    assert (gpt2.vocab_size, len(gpt2.merges), gpt2.eos_token_id) == (50257, 50000, 50256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]


def spoil(main, change):
    """A byte-level tokenizer.json with one thing changed."""
    main = json.loads(json.dumps(main))
    change(main)
    return main


BAD = [
    (lambda m: m["model"].update(type="WordPiece"), "the model is WordPiece; graft reads byte-level BPE only"),
    (lambda m: m["model"].update(type="Unigram"), "the model is Unigram; graft reads byte-level BPE only"),
    (lambda m: m.pop("model"), "has no 'model'"),
    (lambda m: m["model"].update(byte_fallback=True), "BPE with byte_fallback"),
    (lambda m: m["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix='</w>'"),
    (lambda m: m["model"]["vocab"].update({"▁the": 999}), "'▁the' isn't spelt in bytes"),
    (
        lambda m: (m["model"]["vocab"].pop("z"), m["model"].update(unk_token="a")),
        "lacks 1 of 256 bytes and puts unk_token",
    ),
    (lambda m: m["model"]["merges"].append(["a", "zzz"]), r"merge 4 \['a', 'zzz'\] joins or makes a token"),
    (lambda m: m["model"]["merges"].append("a b c"), "merge 4 is 'a b c'; two tokens are expected"),
    (lambda m: m.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase is unknown to graft"),
    (lambda m: m.update(pre_tokenizer={"type": "Metaspace"}), "pre-tokenizer Metaspace is unknown to graft"),
    (lambda m: m.update(pre_tokenizer=None), "no ByteLevel pre-tokenizer"),
    (
        lambda m: m.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
                ],
            }
        ),
        "Split with behavior Removed, invert False is unknown",
    ),
    (
        lambda m: m.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel", "add_prefix_space": True}],
            }
        ),
        "add_prefix_space after a split is not supported",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_files_of_another_kind(tmp_path, change, message):
    text = tmp_path / "text.txt"
    text.write_text("abcde")
    graft.Tokenizer.train([text], vocab_size=261).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(spoil(json.loads(file.read_text()), change)))
    with pytest.raises(ValueError, match=message):
        graft.Tokenizer.load(tmp_path)


def test_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent does not exist; give a folder"):
        graft.Tokenizer.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        graft.Tokenizer.load(tmp_path)
    file = tmp_path / "tokenizer.json"
    for content, message in (
        (b"{", "not JSON"),
        (b"\xff", r"not UTF-8 at byte 0"),
        (b"[]", "holds a list"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            graft.Tokenizer.load(file)
    text = tmp_path / "text.txt"
    text.write_text("abcde")
    with pytest.raises(NotADirectoryError, match=r"text\.txt is a file; give a folder"):
        graft.Tokenizer.train([text], vocab_size=260).save(text)


def test_byte_characters_are_gpt2s():
    table = tokenizer_files.byte_characters()
    assert set(table) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert (table[ord(" ")], table[ord("\n")], table[ord("a")]) == ("Ġ", "Ċ", "a")


def test_without_a_writable_cache_folder(monkeypatch):
    """Numba refuses to decorate when it finds no folder to write; the loops are then compiled in each process."""
    from graft.kernels import numba_jit as jit

    real = jit.numba.njit

    def njit(*args, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(jit.numba, "njit", njit)
    assert jit.compiled(lambda x: x + 1)(1) == 2


def test_a_changed_file_makes_the_compiled_loops_stale():
    """Numba's own stamp covers one file; ours, all of the folder. A newer numba that ignores it is noticed here."""
    from graft.base.tokenizer.compiled import encode as encode_module
    from graft.kernels import numba_jit as jit

    stamp = jit._stamp(Path(encode_module.__file__).parent)
    assert encode_module.encode_text._cache._cache_file._source_stamp == stamp
    assert "pair_index.py" in stamp


def test_without_a_writable_cache_folder_each_process_compiles(tmp_path):
    """Numba's folders are taken away as it finds them when the user may write none."""
    code = "from numba.core import caching; caching.FunctionCache._impl_class._locator_classes = []; "
    code += "import numpy as np; from graft.base.tokenizer.compiled.pair_index import new_index; "
    code += "print(new_index(np.ones(1, np.int32), np.ones(1, np.int32), 1).any())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert "in each process, for want of a cache folder (NUMBA_CACHE_DIR can name one)" in done.stderr


def test_importing_compiles_nothing_and_the_compiling_is_announced(tmp_path):
    """In fresh processes with an empty cache folder: the first says it once, the second not at all."""
    code = "import sys; import graft.base.tokenizer.tokenizer as t; print('imported', file=sys.stderr); "
    code += "import numpy as np; "
    code += "from graft.base.tokenizer.compiled.pair_index import new_index; "
    code += "new_index(np.zeros(1, np.int32), np.zeros(1, np.int32), 1)"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stderr
        for _ in range(2)
    ]
    assert said[0].splitlines()[0] == "imported"
    assert said[0].count("graft: compiling the tokenizer's loops, once per machine") == 1
    assert said[1] == "imported\n"


def test_two_bytes_with_one_id(tmp_path):
    """A vocabulary that gives two bytes the same id has lost one of them."""
    tok = graft.Tokenizer.train([Path(__file__)], vocab_size=260)
    tok.save(tmp_path)
    main = json.loads((tmp_path / "tokenizer.json").read_text())
    main["model"]["vocab"]["b"] = main["model"]["vocab"]["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(main))
    with pytest.raises(ValueError, match="'a' and 'b' both have id 97; each token needs its own"):
        graft.Tokenizer.load(tmp_path)
    main["model"]["vocab"]["b"] = 1 << 21
    (tmp_path / "tokenizer.json").write_text(json.dumps(main))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the id of 'b' is 2,097,152; .* room for 0 to 2,097,151"):
        graft.Tokenizer.load(tmp_path)
