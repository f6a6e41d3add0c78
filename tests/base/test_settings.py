"""Settings from TOML and --set: types, nearest known key."""

from pathlib import Path

import pytest

from graft.base.model.config import ModelConfig, RopeScaling
from graft.base.settings import check_settings, parse_assignments, read_toml, split_settings
from graft.base.train import TrainConfig


def test_toml_and_assignments_fill_the_same_keys(tmp_path: Path) -> None:
    """Law: tables only group, bare words are strings, whole numbers are accepted for floats."""
    (tmp_path / "c.toml").write_text('steps = 5\n[model]\nd_model = 64\n[train]\ndtype = "bfloat16"\n')
    found = read_toml(tmp_path / "c.toml")
    assert found == {"steps": 5, "d_model": 64, "dtype": "bfloat16"}
    assert parse_assignments(["d_model=64", "dtype=bfloat16", "learning_rate=1e-3", "qk_norm=false"]) == {
        "d_model": 64,
        "dtype": "bfloat16",
        "learning_rate": 1e-3,
        "qk_norm": False,
    }
    checked = check_settings(
        {"grad_clip": 1, "sliding_window": "none", "rope_scaling": {"rope_type": "linear"}}, ModelConfig, TrainConfig
    )
    assert checked == {"grad_clip": 1.0, "sliding_window": None, "rope_scaling": RopeScaling("linear")}
    assert split_settings(found, ModelConfig, TrainConfig) == [{"d_model": 64}, {"steps": 5, "dtype": "bfloat16"}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_modell": 3}, "unknown config key 'd_modell'; did you mean d_model?"),
        ({"zzz": 3}, "unknown config key 'zzz'; known are"),
        ({"steps": "many"}, "config key steps = 'many' is str; expected int"),
        ({"steps": 2.5}, "config key steps = 2.5 is float; expected int"),
        ({"steps": True}, "config key steps = True is bool; expected int"),
        ({"qk_norm": 1}, "config key qk_norm = 1 is int; expected bool"),
    ],
)
def test_refusals(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(settings, ModelConfig, TrainConfig)


def test_broken_files_and_assignments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="setting 'd_model' is not key=value"):
        parse_assignments(["d_model"])
    with pytest.raises(FileNotFoundError, match=r"c\.toml does not exist"):
        read_toml(tmp_path / "c.toml")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_toml(tmp_path)
    (tmp_path / "c.toml").write_text("steps =\n")
    with pytest.raises(ValueError, match=r"c\.toml: not TOML: .*line 1"):
        read_toml(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(ValueError, match="not UTF-8 at byte 5"):
        read_toml(tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("learning_rate", -1.0), ("grad_clip", float("nan")), ("dtype", "int8"), ("beta2", 1.0)],
)
def test_train_config_refuses(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{value}"):
        TrainConfig(**{field: value})
