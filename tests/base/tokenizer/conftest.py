"""Text, GPT-2's files and peers for the tokenizer's tests."""

import gzip
import sys
from pathlib import Path

import pytest

import graft

SHARED = Path(__file__).resolve().parents[3] / "../shared/data"


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def gpt2(shared):
    return graft.Tokenizer.load(shared / "gpt2_bpe")


@pytest.fixture(scope="session")
def tiktoken_gpt2(gpt2):
    """tiktoken's GPT-2, built from the same files with tiktoken's own pattern, so that nothing is fetched."""
    tiktoken = pytest.importorskip("tiktoken")
    public = pytest.importorskip("tiktoken_ext.openai_public")
    ranks = {token: index for index, token in gpt2.definition.vocab.items()}
    return tiktoken.Encoding(
        "gpt2", pat_str=public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


@pytest.fixture(scope="session")
def scripts(shared):
    """Name -> text of every file in shared/data/multiscript."""
    texts = {}
    for file in sorted((shared / "multiscript").glob("*.txt*")):
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        texts[file.name] = raw.decode()
    return texts


@pytest.fixture(scope="session")
def code():
    """10 MB of Python code: the standard library's, over again if it is short of that."""
    files = sorted(Path(sys.modules["os"].__file__).parent.glob("**/*.py"))
    parts, size = [], 0
    for file in files:
        parts.append(file.read_text(encoding="utf-8", errors="replace"))
        size += len(parts[-1])
        if size > 10_000_000:
            break
    text = "".join(parts)
    return (text * (10_000_000 // len(text) + 1))[:10_000_000]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A tokenizer of 900 ids trained on the standard library's text and a few scripts: laws need nothing but this."""
    file = tmp_path_factory.mktemp("trained") / "text.txt"
    scripts = "naïve café, don't we'll 12345 日本語テキスト Ελληνικά русский 😀 " * 20
    library = Path(sys.modules["os"].__file__).parent
    file.write_text(
        "".join((library / f"{name}.py").read_text() for name in ("argparse", "textwrap", "this")) + scripts
    )
    return graft.Tokenizer.train([file], vocab_size=900)


@pytest.fixture(scope="session")
def tiktoken_trained(trained):
    """The same vocabulary in tiktoken: the merges' rank is the id."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: index for index, token in trained.definition.vocab.items()}
    return tiktoken.Encoding(
        "trained", pat_str=trained.definition.splits[0], mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 899}
    )
