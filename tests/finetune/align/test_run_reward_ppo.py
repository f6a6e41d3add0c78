"""graft reward and graft ppo: learning, resuming, the reward model as a reward, another tokenizer."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.base.model.huggingface import save_model
from graft.base.runlog import read_metrics
from graft.finetune.align.rewards import parse_rewards
from graft.finetune.align.rollouts import Rollouts
from graft.finetune.align.run_grpo import grpo
from graft.finetune.align.run_ppo import PPO, ppo
from graft.finetune.align.run_reward import RewardModel, RewardObjective, reward
from graft.finetune.loading import load_model

PAIRS = [("the cat", " sat", " flew over it"), ("a bird", " sang", " sat"), ("the tree", " stood", " ran")]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in PAIRS))
    return path


@pytest.fixture
def loud_base(base_dir: Path, tmp_path: Path) -> Path:
    model = load_model(base_dir, dtype=None)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 3
    save_model(model, tmp_path / "loud")
    graft.Tokenizer.load(base_dir).save(tmp_path / "loud")
    return tmp_path / "loud"


def train(base: Path, rows: Path, out: Path, method: str = "lora", **settings: Any) -> list[dict[str, Any]]:
    rate = 1e-2 if method != "full" else 2e-3
    reward(
        base=base,
        data=rows,
        out=out,
        method=method,
        device="cpu",
        **({"steps": 25, "batch_size": 3, "learning_rate": rate} | settings),
    )
    return read_metrics(out / "metrics.jsonl")


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
@pytest.mark.parametrize("packing", [True, False])
def test_a_reward_model_learns_and_scores(
    method: str, packing: bool, base_dir: Path, rows: Path, tmp_path: Path
) -> None:
    """Learning: three pairs are told apart; the saved folder gives each answer the score that training logged."""
    lines = train(base_dir, rows, tmp_path / "out", method, packing=packing, eval_data=rows)
    assert lines[-1]["accuracy"] == 1.0
    assert lines[-1]["loss"] < 0.3 < lines[0]["loss"]
    model = RewardModel(tmp_path / "out")
    scores = torch.tensor([[model(p, c, {}), model(p, r, {})] for p, c, r in PAIRS])
    if method != "qlora":  # its adapter is scored on the full-precision base here
        assert float((scores[:, 0] - scores[:, 1]).mean()) == pytest.approx(lines[-1]["val_margin"], abs=1e-3)
    assert (scores[:, 0] > scores[:, 1]).all()


def test_reward_model_resumes_to_the_bit(
    base_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 5, "checkpoint_every": 2}
    train(base_dir, rows, tmp_path / "straight", **settings)
    original, calls = RewardObjective.loss, [0]

    def dies(self: RewardObjective, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(RewardObjective, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train(base_dir, rows, tmp_path / "resumed", **settings)
    monkeypatch.undo()
    train(base_dir, rows, tmp_path / "resumed", resume=True, **settings)
    for name in ("adapter_model.safetensors", "reward_head.safetensors"):
        a, b = load_file(tmp_path / "straight" / name), load_file(tmp_path / "resumed" / name)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_reward_model_is_a_reward(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: model:DIR gives its score; one of another tokenizer is refused, and so is a folder without a head."""
    train(base_dir, rows, tmp_path / "reward", steps=2)
    [term] = parse_rewards(f"0.5 * model:{tmp_path / 'reward'}")
    assert math.isfinite(term.function("the cat", " sat", {}))
    common: dict[str, Any] = {"data": rows, "rewards": f"model:{tmp_path / 'reward'}", "device": "cpu", "steps": 1}
    common |= {"batch_size": 4, "group_size": 4, "max_new_tokens": 2}
    grpo(base=base_dir, out=tmp_path / "out", **common)
    other = tmp_path / "other"
    save_model(load_model(base_dir, dtype=None), other)
    tokenizer = graft.Tokenizer.load(base_dir)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save(other)
    with pytest.raises(ValueError, match=r"reward was trained with another tokenizer than .*other"):
        grpo(base=other, out=tmp_path / "refused", **common)
    with pytest.raises(ValueError, match=r"has no reward_head\.safetensors; train one with graft reward"):
        grpo(base=base_dir, out=tmp_path / "refused", **(common | {"rewards": f"model:{base_dir}"}))
    assert not (tmp_path / "refused").exists()


# --- PPO -----------------------------------------------------------------------------------------------------------


def run_ppo(base: Path, rows: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    defaults = {"steps": 4, "batch_size": 16, "max_new_tokens": 4, "learning_rate": 5e-3, "rewards": "regex:e"}
    ppo(base=base, data=rows, out=out, device="cpu", **(defaults | settings))
    return read_metrics(out / "metrics.jsonl")


def test_ppo_earns_more(loud_base: Path, rows: Path, tmp_path: Path) -> None:
    """Learning: more answers hold an e after 20 rollouts than before, fewer with the sign flipped; the first update of each
    rollout has ratio 1; the value head is not in the folder."""
    settings = {"steps": 40, "updates_per_rollout": 2, "batch_size": 64, "method": "full", "learning_rate": 2e-3}
    up = run_ppo(loud_base, rows, tmp_path / "up", **settings)
    down = run_ppo(loud_base, rows, tmp_path / "down", rewards="-1 * regex:e", **settings)
    before, after = (sum(line["reward"] for line in up[part]) / 8 for part in (slice(8), slice(-8, None)))
    assert after > before + 0.15
    assert -sum(line["reward"] for line in down[-8:]) / 8 < after - 0.15
    assert up[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert not any("value_head" in key for key in load_file(tmp_path / "up" / "model.safetensors"))


@pytest.mark.parametrize("where", ["update", "checkpoint"])
def test_ppo_resumes_to_the_bit(
    where: str, base_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: killed in the second update of a rollout or in a checkpoint, and resumed: the same weights in the end."""
    settings = {"steps": 6, "updates_per_rollout": 2, "checkpoint_every": 1}
    straight = run_ppo(base_dir, rows, tmp_path / "straight", **settings)
    target, name = {"update": (PPO, "loss"), "checkpoint": (Rollouts, "state")}[where]
    original, calls = getattr(target, name), [0]

    def dies(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(target, name, dies)
    with pytest.raises(KeyboardInterrupt):
        run_ppo(base_dir, rows, tmp_path / "resumed", **settings)
    monkeypatch.undo()
    resumed = run_ppo(base_dir, rows, tmp_path / "resumed", resume=True, **settings)
    assert [x["loss"] for x in resumed] == [x["loss"] for x in straight]
    file = "adapter_model.safetensors"
    a, b = load_file(tmp_path / "straight" / file), load_file(tmp_path / "resumed" / file)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, "clip=0.0 must be > 0"),
        ({"lam": 2.0}, "lam=2.0 must lie in"),
        ({"value_coef": -1.0}, "value_coef=-1.0 must be >= 0"),
        ({"kind": "grpo"}, "unknown config key 'kind'"),
    ],
)
def test_ppo_settings_that_cannot_work(
    settings: dict[str, Any], message: str, base_dir: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_ppo(base_dir, rows, tmp_path / "out", **settings)
    with pytest.raises(ValueError, match=r"center=-1\.0 must be >= 0"):
        train(base_dir, rows, tmp_path / "out", center=-1.0)


def test_commands(base_dir: Path, rows: Path, tmp_path: Path, graft: Callable[..., Any]) -> None:
    out = graft("reward", "--base", base_dir, "--data", rows, "--out", tmp_path / "reward", "--steps", 1)
    assert out.returncode == 0, out.stderr
    out = graft(
        "ppo", "--base", base_dir, "--data", rows, "--rewards", f"model:{tmp_path / 'reward'}", "--out", tmp_path / "ppo",
        "--steps", 1, "--batch-size", 4, "--max-new-tokens", 2,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
