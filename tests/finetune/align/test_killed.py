"""Law: a run killed with SIGKILL at any moment, and resumed, ends with the weights of one that was not.

A real child process, ended in the middle of a rollout, an update, a checkpoint's files or the reference's pass. More moments
are tried with -m exhaustive.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

CHILD = """
import importlib, json, os, signal, sys
import torch
torch.set_num_threads(1)
stage, where, nth, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
module, _, path = where.partition(":")
*owners, name = path.split(".")
target = importlib.import_module(module)
for owner in owners:
    target = getattr(target, owner)
original, calls = getattr(target, name), [0]
def dies(*arguments, **keywords):
    calls[0] += 1
    if calls[0] == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **keywords)
setattr(target, name, dies)
getattr(importlib.import_module(f"graft.finetune.align.run_{stage}"), stage)(**options)
"""
ROLLOUT, REWARD = "graft.finetune.align.sampler:Sampler.text", "graft.finetune.align.rewards:_one"
UPDATE, CLIP = "graft.finetune.align.run_grpo:policy_loss", "graft.base.training.step:clip_gradients_"
STATE, FILES = "graft.finetune.align.rollouts:Rollouts.state", "graft.base.checkpoint:save_tensors"
STEPS = {
    "grpo": {"steps": 4, "batch_size": 8, "group_size": 4, "max_new_tokens": 3, "rewards": "regex:[aeiou]"},
    "ppo": {"steps": 4, "batch_size": 4, "max_new_tokens": 3, "rewards": "regex:[aeiou]", "updates_per_rollout": 2},
    "dpo": {"steps": 4, "batch_size": 2},
}
DPO_LOSS, REFERENCE = "graft.finetune.align.run_dpo:dpo_loss", "graft.finetune.align.reference:answer_logps"
FEW = [("grpo", ROLLOUT, 19), ("grpo", CLIP, 3), ("grpo", FILES, 4), ("dpo", DPO_LOSS, 3)]
MORE = {
    "grpo": [(REWARD, 1), (REWARD, 12), (UPDATE, 5), (STATE, 1), (STATE, 3), (FILES, 1), (FILES, 7)],
    "ppo": [(ROLLOUT, 6), (CLIP, 2), (CLIP, 4), (STATE, 2), (FILES, 5)],
    "dpo": [(REFERENCE, 1), (CLIP, 4), (FILES, 1), (FILES, 3)],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that serve as prompts and as pairs."""
    path = tmp_path_factory.mktemp("killed") / "rows.jsonl"
    texts = [("the cat", " sat", " slept"), ("a bird", " sang", " flew"), ("the tree", " stood", " fell")]
    path.write_text("\n".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), t, strict=True))) for t in texts))
    return path


def settings_of(stage: str, **options: Any) -> dict[str, Any]:
    return {"learning_rate": 5e-3, "checkpoint_every": 1, "rank": 4, "device": "cpu", **STEPS[stage], **options}


def run_here(stage: str, **options: Any) -> None:
    getattr(importlib.import_module(f"graft.finetune.align.run_{stage}"), stage)(**settings_of(stage, **options))


def child(stage: str, where: str, nth: int, **options: Any) -> int:
    return subprocess.run(
        [sys.executable, "-c", CHILD, stage, where, str(nth), json.dumps(settings_of(stage, **options), default=str)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).returncode


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def straight(
    base_dir: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of each method's run that nothing disturbed, made when first asked for."""
    folder = tmp_path_factory.mktemp("straight")

    class Runs(dict):
        def __missing__(self, stage: str) -> dict[str, torch.Tensor]:
            run_here(stage, base=base_dir, data=rows, out=folder / stage)
            self[stage] = weights(folder / stage)
            return self[stage]

    return Runs()


def check(stage: str, where: str, nth: int, base: Path, rows: Path, out: Path, wanted: dict[str, torch.Tensor]) -> None:
    assert child(stage, where, nth, base=base, data=rows, out=out) == -signal.SIGKILL, "it was never there"
    assert not (out / "adapter_model.safetensors").exists()
    run_here(stage, base=base, data=rows, out=out, resume=True)
    found = weights(out)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(("stage", "where", "nth"), FEW)
def test_killed_and_resumed(
    stage: str, where: str, nth: int, base_dir: Path, rows: Path, tmp_path: Path, straight: dict[str, Any]
) -> None:
    check(stage, where, nth, base_dir, rows, tmp_path / "out", straight[stage])


@pytest.mark.exhaustive
@pytest.mark.parametrize(("stage", "where", "nth"), [(stage, *at) for stage in MORE for at in MORE[stage]])
def test_killed_and_resumed_elsewhere(
    stage: str, where: str, nth: int, base_dir: Path, rows: Path, tmp_path: Path, straight: dict[str, Any]
) -> None:
    check(stage, where, nth, base_dir, rows, tmp_path / "out", straight[stage])
