"""The demo's text: what is taken from a standard library, and in which order."""

from pathlib import Path

import pytest

from graft.finetune.demo.run import TEXT_BYTES
from graft.finetune.demo.text import stdlib_documents

LONG = "a docstring of more than forty characters, which is kept"


def test_the_text_by_hand(library: Path) -> None:
    """Worked by hand: topics by name; docstrings file by file, the short one left out; sources block by block; no tests,
    no installed packages, nothing that does not parse or is not UTF-8."""
    found = list(stdlib_documents(10**9))
    topics = [name for name, _ in found if name.startswith("topic ")]
    assert topics == sorted(topics)
    assert "topic if" in topics
    assert found[len(topics) :] == [
        ("docstring in a.py", f"{LONG} C."),
        ("docstring in b.py", f"{LONG} b."),
        ("docstring in b.py", f"{LONG} f."),
        ("source a.py", f'class C:\n    """{LONG} C."""'),
        ("source b.py", f'"""{LONG} b."""'),
        ("source b.py", f'def f():\n    """{LONG} f."""'),
    ]
    few = list(stdlib_documents(100_000))
    assert few == found[: len(few)]
    size = [len(text.encode()) for _, text in few]
    assert sum(size[:-1]) < 100_000 <= sum(size)


@pytest.mark.slow
def test_there_is_enough_text() -> None:
    """Law: as much as the demo asks for, with docstrings and sources in it, none of it from tests or installed packages."""
    documents = list(stdlib_documents(TEXT_BYTES))
    assert sum(len(text.encode()) for _, text in documents) >= TEXT_BYTES
    kinds = {name.split()[0] for name, _ in documents}
    assert kinds == {"topic", "docstring", "source"}
