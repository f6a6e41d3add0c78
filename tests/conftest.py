"""What several test files share: a tiny tokenizer, a tiny base on disk, a way to run the command line.

Before any test module is imported, Triton's interpreter is switched on where there is no GPU: Triton reads
TRITON_INTERPRET when it is imported and when a kernel is decorated, and other packages import Triton too.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    assert "triton" not in sys.modules, "triton was imported before TRITON_INTERPRET was set"
    os.environ["TRITON_INTERPRET"] = "1"

from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import save_model
from graft.base.model.transformer import Transformer, initialize_
from graft.base.pretrain import with_special_ids
from graft.base.tokenizer.tokenizer import Tokenizer

SENTENCES = [
    "the cat sat on the mat and looked at the bird",
    "a bird sang in the tree while the cat slept",
    "the tree stood by the river where birds drink",
    "rivers run to the sea and the sea is wide",
]
Command = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure() -> None:
    """One line instead of a hundred failures where the interpreter can't run."""
    if torch.cuda.is_available() or find_spec("triton") is None:
        return
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        raise pytest.UsageError("Triton 3.6's interpreter doesn't run with numpy 2.4; pip install 'numpy<2.4'")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two xdist workers on two cores: more threads only fight each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand words with a grammar of their own."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [SENTENCES[(i * 7 + i // 3) % 4] + "." for i in range(400)]
    path.write_text("<|endoftext|>".join("\n".join(lines[i : i + 20]) for i in range(0, 400, 20)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_dir(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer of 300 ids with the three special tokens that graft's command line gives."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tok"
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    Tokenizer.train([text_file], vocab_size=300, pattern="gpt2", special_tokens=specials).save(folder)
    return folder


@pytest.fixture(scope="session")
def base_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base of two layers with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "base"
    tokenizer = Tokenizer.load(tokenizer_dir)
    config = ModelConfig(
        tokenizer.vocab_size, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_ff=128, max_seq_len=96
    )
    model = Transformer(with_special_ids(config, tokenizer))
    initialize_(model, seed=0)
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def graft() -> Command:
    """Run the command line in its own process: graft("pretrain", "--data", ...) -> CompletedProcess."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        return subprocess.run(
            [sys.executable, "-m", "graft", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=240,
            **options,  # pyright: ignore
        )

    return run
