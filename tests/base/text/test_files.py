"""Which files the arguments name: folders, globs, several inputs, Hugging Face ids; and what they may not."""

import os
from pathlib import Path

import pytest

from graft.base.text import files
from graft.base.text.files import list_files


def test_globs_and_several_inputs(tmp_path: Path) -> None:
    """Law: the order is that of the arguments, and by name within a folder or a glob."""
    for name in ("b.txt", "a.txt", "c.jsonl.zst", "d.ndjson", "notes.png", "sub/e.txt", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else "x")

    def found(*paths: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in list_files([str(tmp_path / path) for path in paths])]

    assert found("*.txt") == ["a.txt", "b.txt"]
    assert found("**/*.txt", "d.ndjson") == ["a.txt", "b.txt", "sub/e.txt", "d.ndjson"]
    assert found("sub", "[ab].txt") == ["sub/e.txt", "a.txt", "b.txt"]
    assert found("") == ["a.txt", "b.txt", "c.jsonl.zst", "d.ndjson", "sub/e.txt"]
    with pytest.raises(FileNotFoundError, match=r"\*\.md matches no file with text"):
        found("*.md")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe, socket or device, not a file; write its content to a file"):
        list_files([tmp_path / "pipe"])


def test_ids_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies here wins over an id; what has a known suffix is a missing file, not an id. (The cache: tests/base/test_hub.py.)"""
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(files, "dataset_files", lambda name: asked.append(name) or [Path("x.arrow")])
    assert list_files(["org/stories:test@v1"]) == [Path("x.arrow")]
    (tmp_path / "org").mkdir()
    (tmp_path / "org/stories").write_text("here")
    assert list_files(["org/stories"]) == [Path("org/stories")]
    assert list_files(["hf://org/other"]) == [Path("x.arrow")]
    assert asked == ["org/stories:test@v1", "hf://org/other"]
    for name in ("far/a.txt", "far/a.jsonl.gz", "org/other"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            list_files([name])
