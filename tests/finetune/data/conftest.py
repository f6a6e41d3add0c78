"""A tokenizer with the control tokens of several model families, and its twin in transformers."""

from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from graft.base.tokenizer.tokenizer import Tokenizer

TEXT = """The fox says hello to the user and the assistant. What is 2 + 2? It is 4. Who are you? I am a small model.
system user assistant model tool: be brief, think first; thank you, the quick brown fox jumps over the lazy dog.
"""
CONTROL = (
    "<|endoftext|>", "<|bos|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<think>", "</think>",
)  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "a.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = Tokenizer.train([path / "a.txt"], vocab_size=320, special_tokens=list(CONTROL))
    added = tuple(replace(token, special="think" not in token.content) for token in tokenizer.definition.added)
    Tokenizer(replace(tokenizer.definition, added=added, bos="<|bos|>", eos="<|endoftext|>")).save(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def theirs(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(folder)
