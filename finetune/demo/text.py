"""The demo's text: what every Python has beside its interpreter, documentation first."""

import ast
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path


def stdlib_documents(limit: int) -> Iterator[tuple[str, str]]:
    """(name, text) of the standard library: pydoc's topics and every docstring first, then sources, to about `limit` bytes.

    In a fixed order; the same Python gives the same text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in root.rglob("*.py") if not {"site-packages", "test", "tests", "idlelib"} & set(path.parts)
    )
    size = 0
    for name, text in chain(_topics(), _docstrings(files), _sources(files)):
        if size >= limit:
            return
        size += len(text.encode())
        yield name, text


def _topics() -> Iterator[tuple[str, str]]:
    """The language reference that `help('if')` shows."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name].strip()


def _docstrings(files: list[Path]) -> Iterator[tuple[str, str]]:
    for path in files:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # a test file for the parser itself
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) > 40:
                yield f"docstring in {path.name}", text


def _sources(files: list[Path]) -> Iterator[tuple[str, str]]:
    """Cut at the blank lines between top-level blocks: short documents teach the model where a text ends."""
    for path in files:
        try:
            blocks = path.read_text(encoding="utf-8").split("\n\n\n")
        except UnicodeDecodeError:
            continue
        for block in blocks:
            if len(block) > 40:
                yield f"source {path.name}", block.strip("\n")
