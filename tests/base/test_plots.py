"""Pictures of a run: the smoothing by hand, the file, what can't be drawn."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from graft.base.plots import plot_run, running_mean


def write(folder: Path, steps: int, **extra: float) -> None:
    lines = [{"step": i + 1, "loss": 5.0 - i, "lr": 0.1, "grad_norm": 1.0, **extra} for i in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_running_mean_by_hand() -> None:
    """Worked by hand, weight 1/2: 4; (4/4 + 2/2) / (3/4) = 8/3; a constant stays itself."""
    assert running_mean([4, 2], 0.5) == pytest.approx([4, 8 / 3])
    assert running_mean([3.0] * 5) == pytest.approx([3.0] * 5)
    assert running_mean([]) == []


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: training loss, validation and the reference lines are drawn at the log's values."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    write(tmp_path, 3, val_loss=4.5)
    assert plot_run(tmp_path, lines={"bigram model": 4.25}, title="a title") == tmp_path / "loss.png"
    upper, lower = drawn[0].axes[:2]
    curves = {str(line.get_label()): list(line.get_ydata()) for line in upper.lines}
    assert curves["training"] == [5.0, 4.0, 3.0]
    assert curves["validation"] == [4.5] * 3
    assert curves["bigram model 4.25"] == [4.25, 4.25]
    assert upper.get_title() == "a title"
    assert list(lower.lines[0].get_ydata()) == [0.1] * 3
    picture = imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (720, 960)
    assert picture.std() > 0.01


def test_one_step_without_validation(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert plot_run(tmp_path).stat().st_size > 1000


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no metrics\.jsonl; give the folder of a training run"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"metrics\.jsonl is empty; the run has made no step yet"):
        plot_run(tmp_path)
