"""Law and worked by hand: adapters compared on held-out pairs and by a reward model."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from graft.finetune.align.arena import Battle
from graft.finetune.align.compare import battles_between, compare_by_reward, compare_on_pairs
from graft.finetune.align.run_dpo import dpo
from graft.finetune.align.run_reward import RewardModel, reward

PAIRS = [("the cat", " sat on the mat", " slept"), ("a bird", " sang", " flew into the sea")]


@pytest.fixture(scope="module")
def folders(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pairs, an adapter that learned them, one that learned them swapped, and a reward model."""
    folder = tmp_path_factory.mktemp("compare")
    for name, (first, second) in {"rows": ("chosen", "rejected"), "swapped": ("rejected", "chosen")}.items():
        rows = [{"prompt": p, first: a, second: b} for p, a, b in PAIRS]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    rate = {"steps": 8, "batch_size": 2, "learning_rate": 1e-2, "rank": 4, "device": "cpu"}
    dpo(base=base_dir, data=folder / "rows.jsonl", out=folder / "good", **rate)
    dpo(base=base_dir, data=folder / "swapped.jsonl", out=folder / "bad", **rate)
    reward(base=base_dir, data=folder / "rows.jsonl", out=folder / "judge", **rate)
    return {path.stem: path for path in folder.iterdir()}


def test_battles_between() -> None:
    """Worked by hand: higher wins, equal ties, every pair of players on every row."""
    scores = {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([0.5, 0.0]), "z": torch.tensor([2.0, -1.0])}
    found = [(b.first, b.second, b.score) for b in battles_between(scores)]
    assert found == [
        ("x", "y", 1.0),
        ("x", "y", 0.5),
        ("x", "z", 0.0),
        ("x", "z", 1.0),
        ("y", "z", 0.0),
        ("y", "z", 1.0),
    ]


def test_on_held_out_pairs(base_dir: Path, folders: dict[str, Path]) -> None:
    """Law: who learned the preference beats the base, who learned its opposite loses to both."""
    players, battles = compare_on_pairs(base_dir, [folders["good"], folders["bad"]], folders["rows"])
    assert [(p.name, p.accuracy) for p in players] == [("good", 1.0), ("bad", 0.0)]
    assert players[0].margin > 0 > players[1].margin
    scores = {(b.first, b.second): b.score for b in battles}
    assert scores == {("base", "good"): 0.0, ("base", "bad"): 1.0, ("good", "bad"): 1.0}


def test_by_a_reward_model(base_dir: Path, folders: dict[str, Path]) -> None:
    """Law: every pair of players battles on every prompt; two that answer alike tie."""
    twin = folders["good"].parent / "twin"
    if not twin.exists():
        twin.symlink_to(folders["good"])
    battles = compare_by_reward(base_dir, [folders["good"], twin], folders["rows"], folders["judge"], max_new_tokens=4)
    assert len(battles) == 3 * len(PAIRS)
    assert [b.score for b in battles if b.first == "good"] == [0.5] * len(PAIRS)
    assert all(isinstance(b, Battle) for b in battles)


def test_answers_that_the_judge_reads_in_part_are_counted(
    base_dir: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Law: an answer beyond the reward model's length is scored by its beginning, and counted; whole ones are not."""
    judge = RewardModel(folders["judge"])
    judge("the cat", " sat on the mat", {})
    assert judge.n_cut == 0
    long = " sat on the mat" * judge.about["max_seq_len"]
    assert judge("the cat", long, {}) == judge("the cat", long + " or not", {})
    assert judge.n_cut == 2
    shutil.copytree(folders["judge"], tmp_path / "judge")
    about = json.loads((tmp_path / "judge/graft.json").read_text(encoding="utf-8"))
    (tmp_path / "judge/graft.json").write_text(json.dumps(about | {"max_seq_len": 6}), encoding="utf-8")
    notes: list[str] = []
    options = {"max_new_tokens": 24, "notes": notes}
    compare_by_reward(base_dir, [folders["good"]], folders["rows"], tmp_path / "judge", **options)
    assert len(notes) == 1
    assert "answers were scored by their first 6 tokens" in notes[0]
    compare_by_reward(base_dir, [folders["good"]], folders["rows"], folders["judge"], **options)
    assert len(notes) == 1


def test_a_judge_of_another_tokenizer_is_refused(base_dir: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Law: scores of other tokens are no scores; refused before anything is sampled."""
    other = tmp_path / "other"
    shutil.copytree(base_dir, other)
    with (other / "tokenizer.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="was trained with another tokenizer than"):
        compare_by_reward(other, [folders["good"]], folders["rows"], folders["judge"], max_new_tokens=4)


def test_names_must_differ(base_dir: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"adapters good, good: names must differ"):
        compare_on_pairs(base_dir, [folders["good"], folders["good"]], folders["rows"])


def test_rows_left_out_are_counted(
    base_dir: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: a row without a preference plays no battle, and the screen says so."""
    rows = tmp_path / "rows.jsonl"
    equal = json.dumps({"prompt": "x", "chosen": "same", "rejected": "same"})
    rows.write_text(folders["rows"].read_text(encoding="utf-8") + "\n" + equal, encoding="utf-8")
    _, battles = compare_on_pairs(base_dir, [folders["good"]], rows)
    assert len(battles) == len(PAIRS)
    assert "note: 1 rows have equal answers and were left out" in capsys.readouterr().err
