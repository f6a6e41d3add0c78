"""The hand-written pages as the tests read them, and the generators of docs/ as modules."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import graft

DOCS = Path(graft.__file__).parent / "docs"
# In the guide's order: later pages use what earlier ones leave in runs/.
GUIDE = ("install", "tokenizer", "pretrain", "sft", "lora", "many", "evaluate", "use", "memory", "resume")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    kind: str  # bash, python, toml, console, text
    text: str
    in_guide: bool  # its lines run one after the other in a small copy of the demo's results


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    in_guide = path.parent.name == "guide"
    return [
        Block(path.name, kind, body, in_guide)
        for kind, body in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.M)
    ]


@pytest.fixture(scope="session")
def pages() -> dict[str, str]:
    """Path below docs/ -> text, of every page that is written by hand."""
    return {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}


@pytest.fixture(scope="session")
def blocks() -> list[Block]:
    """The blocks of all pages and the README, the guide's first, in its order."""
    guide = [DOCS / "guide" / f"{name}.md" for name in GUIDE]
    others = [path for path in sorted(DOCS.rglob("*.md")) if path not in guide]
    others.append(DOCS.parent / "README.md")
    return [block for path in (*guide, *others) for block in blocks_of(path)]


@pytest.fixture(scope="session")
def generator() -> Callable[[str], ModuleType]:
    """Import a module of docs/ by name: command_pages, api_page, ...."""

    def load(name: str) -> ModuleType:
        sys.path.insert(0, str(DOCS))
        try:
            return import_module(name)
        finally:
            sys.path.remove(str(DOCS))

    return load
