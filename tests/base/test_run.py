"""One config: what a run reads is known by content, and what a resumption may change is written once."""

from pathlib import Path

import pytest

from graft.base.pretrain import check_size, resolve
from graft.base.run import Input, Run, TrainConfig, check_same_inputs, resumed_settings
from graft.base.settings import check_settings


def saved(**inputs: Input) -> dict:
    return Run(TrainConfig(steps=5), inputs=inputs).saved()


def test_an_input_is_its_content(tmp_path: Path) -> None:
    """Law: the same bytes elsewhere are the same input; one other byte, or the files in another order, are not."""
    for name, text in (("a", "one"), ("b", "one"), ("c", "onE"), ("d", "two")):
        (tmp_path / name).write_text(text)
    a, b, c = (Input.of(tmp_path / name).sha256 for name in "abc")
    assert a == b != c
    files = [tmp_path / "a", tmp_path / "d"]
    assert Input.of(tmp_path, files).sha256 != Input.of(tmp_path, files[::-1]).sha256


def test_other_inputs_are_refused_by_name(tmp_path: Path) -> None:
    one, other = Input(tmp_path / "x", "1" * 64), Input(tmp_path / "y", "2" * 64)
    check_same_inputs(saved(data=one), {"data": Input(tmp_path / "moved", "1" * 64)})
    with pytest.raises(ValueError, match=r"--resume: data .*y is not what the run was started with \(.*x, sha256 1111"):
        check_same_inputs(saved(data=one), {"data": other})
    with pytest.raises(ValueError, match=r"the run was started with --eval-data .*x; give it again"):
        check_same_inputs(saved(data=one, eval_data=one), {"data": one})
    with pytest.raises(ValueError, match=r"the run was started without --eval-data, got .*y"):
        check_same_inputs(saved(data=one), {"data": one, "eval_data": other})
    with pytest.raises(ValueError, match=r"run\.json is damaged: inputs\.data is 3"):
        check_same_inputs({"inputs": {"data": 3}}, {"data": one})
    with pytest.raises(ValueError, match="doesn't say which data"):
        check_same_inputs({}, {"data": one})


def test_what_a_resumption_may_change() -> None:
    """Law: steps, intervals and which checkpoints stay; nothing else, and the same value is no change."""
    before = saved()
    changes = {"steps": 9, "eval_every": 1, "eval_batches": 2, "checkpoint_every": 3, "keep": "best", "patience": 4}
    found = resumed_settings(changes | {"batch_size": 32}, before)
    assert {key: found[key] for key in changes} == changes
    assert TrainConfig(**check_settings(found, TrainConfig)) == TrainConfig(**changes)  # JSON has lists
    with pytest.raises(ValueError, match=r"--resume goes on with learning_rate=0\.001, got 0\.002; leave it out"):
        resumed_settings({"learning_rate": 0.002}, before)


def test_a_model_that_cannot_be_built() -> None:
    """Law: refused from its sizes alone, before a tensor is made."""
    with pytest.raises(ValueError, match="n_layers=9223372036854775808 is more than 10,000, beyond any model"):
        resolve({"n_layers": 2**63}, preset_name=None, vocab_size=300)
    large = resolve({"d_model": 2**20, "n_heads": 2**10, "n_layers": 9999}, preset_name=None, vocab_size=300).model
    assert large is not None
    with pytest.raises(ValueError, match=r"parameters take .* bytes in float32, cpu has .*; lower d_model"):
        check_size(large, "cpu")
