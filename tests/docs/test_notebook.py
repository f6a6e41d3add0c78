"""The notebook runs from its first cell to its last, as plain Python: no Jupyter is needed."""

import json
from pathlib import Path

import pytest

import graft

NOTEBOOK = Path(graft.__file__).parent / "docs/notebook.ipynb"


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_only_small_text_is_saved() -> None:
    """Law: outputs are lines of standard output, a few of them; no picture, no traceback, no path of somebody's machine."""
    for cell in cells():
        for output in cell.get("outputs", []):
            assert output["output_type"] == "stream"
            assert output["name"] == "stdout"
            assert len("".join(output["text"])) < 2000
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 20_000
    assert "/home/" not in text
    assert "/root/" not in text


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: all cells run in one namespace without a warning, and their own asserts hold: the adapters answer, the base stays."""
    code = "\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")
    assert code.count("assert ") >= 3
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "notebook", "exec"), {})
    said = capsys.readouterr().out
    assert "capitals: 6 of 6 right" in said
    assert "opposites: 6 of 6 right" in said
