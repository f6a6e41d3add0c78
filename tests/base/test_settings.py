"""Settings from TOML and --set: types, nearest known key."""

from dataclasses import fields
from pathlib import Path

import pytest

from graft.base.model.config import ModelConfig
from graft.base.model.rope_scaling import RopeScaling
from graft.base.pretrain import PARTS
from graft.base.run import TrainConfig
from graft.base.settings import (
    USUAL_NAMES,
    Key,
    check_settings,
    combine,
    describe,
    parse_assignments,
    read_toml,
    split_settings,
)
from graft.finetune.adapters.lora import LoraConfig
from graft.finetune.sft import PARTS as SFT_PARTS


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


def test_a_key_in_two_places_is_refused(tmp_path: Path) -> None:
    """Law: tables only group keys, so one key in two of them, or at the top and in one, has no one value."""
    path = tmp_path / "c.toml"
    path.write_text("[model]\nd_model = 64\n[train]\nd_model = 32\n")
    with pytest.raises(ValueError, match=r"c\.toml: d_model stands in \[model\] and in \[train\]; keep one"):
        read_toml(path)
    path.write_text("steps = 3\n[train]\nsteps = 3\n")
    with pytest.raises(ValueError, match=r"steps stands in the top level and in \[train\]"):
        read_toml(path)
    path.write_text("[model]\nsteps = 3\n[model.rope_scaling]\nrope_type = 'linear'\n")
    assert read_toml(path) == {"steps": 3, "rope_scaling": {"rope_type": "linear"}}
    path.write_text("x = " + "[" * 100_000)
    with pytest.raises(ValueError, match=r"c\.toml: "):
        read_toml(path)


def test_flags_over_set_over_toml(tmp_path: Path) -> None:
    """Law: the file gives way to --set and to flags; a flag and --set that differ are refused, and a key given twice."""
    path = tmp_path / "c.toml"
    path.write_text("steps = 1\nseed = 1\nd_model = 1\n")
    found = combine(path, ["seed=2", "beta1=0.5"], {"steps": 3, "batch_size": None, "beta1": 0.5})
    assert found == {"steps": 3, "seed": 2, "d_model": 1, "beta1": 0.5}
    with pytest.raises(ValueError, match="--batch-size 4 and --set batch_size=5 contradict each other; give one"):
        combine(None, ["batch_size=5"], {"batch_size": 4})
    with pytest.raises(ValueError, match="--set steps is given twice; keep one"):
        combine(None, ["steps=5", "steps = 6"], {})


@pytest.mark.parametrize(
    ("usual", "ours"),
    [
        *(
            ("max_lr", "learning_rate"),
            ("num_train_epochs", "epochs"),
            ("max_length", "max_seq_len"),
            ("lora_r", "rank"),
        ),
        *(("lora_alpha", "alpha"), ("target_modules", "targets"), ("per_device_train_batch_size", "micro_batch")),
        *(("lr_scheduler_type", "schedule"), ("gradient_checkpointing", "checkpointing"), ("use_rslora", "rank_stab")),
        *(("LR", "learning_rate"), ("early-stopping-patience", "patience")),
    ],
)
def test_names_of_other_libraries_are_understood(usual: str, ours: str) -> None:
    """Law: the message for a key that transformers, PEFT or axolotl has names ours."""
    with pytest.raises(ValueError, match=f"unknown config key '{usual}'; did you mean {ours}"):
        check_settings({usual: 1}, *SFT_PARTS.values())


def test_usual_names_name_keys_that_exist() -> None:
    """Law: every name that a message can suggest is a key of one of the commands."""
    known = {key.name for kind in (*PARTS.values(), *SFT_PARTS.values()) for key in describe(kind)}
    assert {name for names in USUAL_NAMES.values() for name in names} <= known
    assert not USUAL_NAMES.keys() & {key.name for kind in PARTS.values() for key in describe(kind)}
    with pytest.raises(ValueError, match=r"unknown config key 'epochs'; did you mean steps\?"):
        check_settings({"epochs": 1}, *PARTS.values())


def test_every_key_is_described() -> None:
    """Law: type, default and meaning of each key, from the field's own line; spot checks by hand."""
    for kind in {*PARTS.values(), *SFT_PARTS.values()}:
        keys = describe(kind)
        assert [key.name for key in keys] == [field.name for field in fields(kind)]
        if kind is not ModelConfig:  # its ids follow from the tokenizer
            assert all(key.meaning for key in keys), [key.name for key in keys if not key.meaning]
    by_name = {key.name: key for key in describe(TrainConfig)}
    assert by_name["grad_clip"] == Key("grad_clip", "float", "1.0", "global 2-norm; 0: never clip")
    assert by_name["checkpointing"].default == "false"
    by_name = {key.name: key for key in describe(ModelConfig)}
    assert (by_name["sliding_window"].type, by_name["sliding_window"].default) == ("int or none", "none")
    assert by_name["vocab_size"].default == "required"
    by_name = {key.name: key for key in describe(LoraConfig)}
    assert (by_name["targets"].type, by_name["targets"].default) == ("list of str", "all-linear")


def test_words_and_lists_fill_tuples() -> None:
    """Law: `targets=q_proj,v_proj`, a TOML list and a tuple are the same; a list of other things is refused."""
    for value in ("q_proj, v_proj", ["q_proj", "v_proj"], ("q_proj", "v_proj")):
        assert check_settings({"targets": value}, LoraConfig) == {"targets": ("q_proj", "v_proj")}
    with pytest.raises(ValueError, match=r"targets = \[1\] is list; expected list of str"):
        check_settings({"targets": [1]}, LoraConfig)
    with pytest.raises(ValueError, match=r"alpha = 1000000000\d\d\.\.\. is too large for a float"):
        check_settings({"alpha": 10**400}, LoraConfig)
