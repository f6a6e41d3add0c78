"""Pictures of a run: the smoothing by hand, the file, what can't be drawn."""

import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from graft.base.plot_runs import plot_runs, spikes
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


def test_spikes_by_hand() -> None:
    """Worked by hand: after 2.0 and 2.2 in turn the median is 2.1, the mean distance 0.1: the limit is 2.1 + 5 * 0.12533 = 2.727.
    With 2.72 among them they are 2.2 and 2.52 / 21 = 0.12: 2.952. The first ten are none; a loss that is no number is one."""
    usual = [2.0, 2.2] * 10
    assert spikes([*usual, 2.72, 2.96, math.nan]) == [*[False] * 21, True, True]
    assert spikes([*usual, 2.73])[-1]
    assert spikes([9.0, *usual])[0] is False


def test_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: each run's five curves are drawn at its log's values; names tell folders apart."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    for name, speed in (("a/run", 10.0), ("b/run", 20.0)):
        (tmp_path / name).mkdir(parents=True)
        write(tmp_path / name, 4, tokens_per_s=speed, val_loss=4.5, skipped=True)
    target = plot_runs([tmp_path / "a/run", tmp_path / "b/run"], tmp_path / "pictures" / "both.png")
    assert imread(target).std() > 0.01
    axes = {axis.get_ylabel(): axis for axis in drawn[0].axes}
    smooth = {str(line.get_label()): list(line.get_ydata()) for line in axes["loss (nats a token)"].lines}
    assert smooth["a/run"] == smooth["b/run"] == pytest.approx(running_mean([5.0, 4.0, 3.0, 2.0]))
    assert [line.get_ydata()[-1] for line in axes["tokens a second"].lines] == pytest.approx([10, 20])
    assert [list(line.get_ydata()) for line in axes["spikes so far"].lines] == [[1, 2, 3, 4]] * 2
    assert [list(line.get_ydata()) for line in axes["learning rate"].lines] == [[0.1] * 4] * 2
    with pytest.raises(ValueError, match="a run is given twice; give each once"):
        plot_runs([tmp_path / "a/run"] * 2, target)
    with pytest.raises(FileNotFoundError, match=r"holds no metrics\.jsonl"):
        plot_runs([tmp_path / "a/run", tmp_path], target)
