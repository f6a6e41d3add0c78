"""A standard library of a few files."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from graft.finetune.demo import text

LONG = "a docstring of more than forty characters, which is kept"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of a few files; pydoc's topics stay the real ones."""
    folder = tmp_path / "lib"
    for name, content in {
        "b.py": f'"""{LONG} b."""\n\n\ndef f():\n    """{LONG} f."""\n\n\ndef g():\n    """short"""\n',
        "a.py": f'class C:\n    """{LONG} C."""\n',
        "broken.py": "def (\n",
        "latin.py": "x = 'caf\u00e9'",
        "test/t.py": f'"""{LONG} test."""',
        "site-packages/s.py": f'"""{LONG} installed."""',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="latin-1")
    monkeypatch.setattr(text, "sysconfig", SimpleNamespace(get_path=lambda name: str(folder)))
    return folder
