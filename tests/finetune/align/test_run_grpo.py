"""graft grpo: rollouts, what the objective computes from them, bit-identical resume, rewards that fail."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.base.generate.engine import Engine
from graft.base.generate.sampling import Sampling
from graft.base.model.huggingface import save_model
from graft.base.runlog import read_metrics
from graft.finetune.align import rollout_task, run
from graft.finetune.align.prompts import Prompt
from graft.finetune.align.rollout_task import RolloutOptions
from graft.finetune.align.rollouts import Rollouts, collate_rollout
from graft.finetune.align.run_grpo import GRPO, GRPOOptions, grpo
from graft.finetune.align.sampler import Sampler
from graft.finetune.loading import load_model

WORDS = ["the cat", "a bird", "the tree", "rivers run"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": word, "answer": "x"}) for word in WORDS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def loud_base(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with three times the embedding: logits that a small update can turn, and samples that still differ."""
    folder = tmp_path_factory.mktemp("loud")
    model = load_model(base_dir, dtype=None)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 3
    save_model(model, folder)
    graft.Tokenizer.load(base_dir).save(folder)
    return folder


def train(base: Path, prompts: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    defaults = {"steps": 4, "batch_size": 16, "group_size": 4, "max_new_tokens": 4, "learning_rate": 5e-3}
    grpo(base=base, data=prompts, out=out, **({"rewards": "regex:[aeiou]", "device": "cpu"} | defaults | settings))
    return read_metrics(out / "metrics.jsonl")


def sampler_of(base: Path, *, max_batch: int = 16) -> Sampler:
    return Sampler(load_model(base), graft.Tokenizer.load(base), None, max_batch=max_batch)


def prompts_of(sampler: Sampler, texts: list[str]) -> list[Prompt]:
    return [Prompt(sampler.tokenizer.encode(text).tolist(), text, {}, text, False) for text in texts]


# --- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [16, 3])
def test_equal_prompts_are_read_once(base_dir: Path, max_batch: int) -> None:
    """Law: sharing a prompt's keys and values gives each sample what it gives alone, and the model reads each prompt once."""
    sampler = sampler_of(base_dir, max_batch=max_batch)
    texts = ["the cat sat on", "the cat sat on", "a bird", "the cat sat on", "a bird"]
    prompts = prompts_of(sampler, texts)
    read: list[int] = []
    original = type(sampler.model).hidden_states

    def counts(self: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        if ids.shape[1] > 1:
            read.append(ids.shape[0])
        return original(self, ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(sampler.model), "hidden_states", counts)
        together = sampler.answers(prompts, Sampling(1.0, max_new_tokens=6, seed=3))
    assert max_batch != 16 or read == [2]
    for i, prompt in enumerate(prompts):
        alone = sampler.answers([prompt], Sampling(1.0, max_new_tokens=6, seed=3 + i))[0]
        assert alone.ids == together[i].ids
        assert alone.logp == pytest.approx(together[i].logp, abs=1e-5)


def test_the_sampler_reports_its_own_probabilities(base_dir: Path) -> None:
    """Law: the sampler's log-probabilities are the trainer's, at the temperature, up to float32 rounding."""
    sampler = sampler_of(base_dir)
    prompts = prompts_of(sampler, WORDS)
    answers = sampler.answers(prompts, Sampling(0.7, max_new_tokens=5, seed=0))
    batch = collate_rollout(prompts, answers)
    with torch.no_grad():
        logp = (sampler.model(batch["ids"]) / 0.7).log_softmax(-1)
    wanted = torch.zeros_like(batch["sampler_logp"])
    wanted[:, 1:] = logp[:, :-1].gather(2, batch["ids"][:, 1:, None])[..., 0]
    assert torch.allclose(batch["sampler_logp"], wanted.where(batch["mask"], 0.0), atol=1e-4)
    assert batch["mask"].sum(1).tolist() == [len(answer.ids) for answer in answers]


def test_engine_hands_out_logits(base_dir: Path) -> None:
    """Law: on_choice sees every request once for each token that it gets."""
    model = load_model(base_dir)
    seen: list[int] = []
    engine = Engine(model, max_batch=2, on_choice=lambda requests, logits, tokens: seen.extend(r.id for r in requests))
    for n in (1, 2, 3):
        engine.add([5, 6], Sampling(max_new_tokens=n))
    while engine.n_running or engine.n_waiting:
        engine.step()
    assert sorted(seen) == [0, 1, 1, 2, 2, 2]


# --- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_each_kind_earns_more(kind: str, loud_base: Path, prompts: Path, tmp_path: Path) -> None:
    """Learning: a reward for an e in the answer is earned more often after 20 updates; with the sign flipped it is not."""
    rates = {"learning_rate": 1e-2, "steps": 16, "batch_size": 64, "group_size": 16}
    up = train(loud_base, prompts, tmp_path / "up", kind=kind, rewards="regex:e", **rates)
    down = train(loud_base, prompts, tmp_path / "down", kind=kind, rewards="-1 * regex:e", **rates)
    before, after = (sum(line["reward"] for line in up[part]) / 4 for part in (slice(4), slice(-4, None)))
    assert after > before + 0.15
    assert sum(-line["reward"] for line in down[-4:]) / 4 < before + 0.02
    assert all(line["ratio"] == pytest.approx(1.0, abs=1e-5) for line in up)  # each rollout is used once


def test_several_updates_move_away_from_the_sampler(base_dir: Path, prompts: Path, tmp_path: Path) -> None:
    """Law: with three updates a rollout the first has ratio 1 and later ones don't; the answers stay the same."""
    lines = train(base_dir, prompts, tmp_path / "out", updates_per_rollout=3, steps=6, kl_coef=0.1)
    assert [line["old_kl"] < 1e-6 for line in lines] == [True, False, False] * 2
    assert lines[0]["reward"] == lines[1]["reward"] == lines[2]["reward"]
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # the adapter is still zero: the policy is the reference
    assert lines[-1]["kl"] > 1e-5
    rows = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 4, 4]
    assert rows[0].keys() == {"step", "where", "prompt", "completion", "reward"}


@pytest.mark.parametrize("normalize", ["sequence", "token", "constant:4"])
def test_micro_batches_add_up(normalize: str, base_dir: Path, prompts: Path, tmp_path: Path) -> None:
    """Law: the first update of 16 answers at once and of 4 times 4 has the same loss, figures and gradient norm."""
    whole = train(base_dir, prompts, tmp_path / "a", steps=1, normalize=normalize)[0]
    parts = train(base_dir, prompts, tmp_path / "b", steps=1, normalize=normalize, micro_batch=4)[0]
    for name in ("loss", "grad_norm", "reward", "reward_std", "no_signal", "answer_tokens"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6)


def test_full_fine_tuning_with_a_reference(base_dir: Path, prompts: Path, tmp_path: Path) -> None:
    """Law: with every weight in training the reference is the base a second time, and stays it."""
    lines = train(base_dir, prompts, tmp_path / "out", method="full", kl_coef=0.05, steps=3, learning_rate=1e-3)
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[-1]["kl"] > 1e-6
    assert graft.load_model(tmp_path / "out").config.vocab_size == graft.load_model(base_dir).config.vocab_size


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["rollout", "logged", "update", "checkpoint"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_resumes_to_the_bit(
    where: str, method: str, base_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: killed in the middle of a rollout, after its examples were logged, in an update on an old rollout, or in a
    checkpoint, and resumed, a run ends with the weights, the log and the examples of one that was not."""
    settings = {"steps": 7, "updates_per_rollout": 2, "checkpoint_every": 1, "kl_coef": 0.1, "method": method}
    straight = train(base_dir, prompts, tmp_path / "straight", **settings)
    target, name = {
        "rollout": (Sampler, "answers"),
        "logged": (GRPO, "loss"),
        "update": (GRPO, "loss"),
        "checkpoint": (Rollouts, "state"),
    }[where]
    original, calls = getattr(target, name), [0]

    def dies(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        # In step 3 (the first half of rollout 2), in step 4 (its second half), or in rollout 3.
        if calls[0] == (3 if where in ("rollout", "logged") else 4):
            if where == "rollout":
                original(self, *arguments)
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(run, "print_prediction", lambda *_, **__: 0)  # it calls the loss too
    monkeypatch.setattr(target, name, dies)
    with pytest.raises(KeyboardInterrupt):
        train(base_dir, prompts, tmp_path / "resumed", **settings)
    monkeypatch.undo()
    resumed = train(base_dir, prompts, tmp_path / "resumed", resume=True, **settings)
    assert [(x["loss"], x["reward"]) for x in resumed] == [(x["loss"], x["reward"]) for x in straight]
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    a, b = load_file(tmp_path / "straight" / file), load_file(tmp_path / "resumed" / file)
    assert all(torch.equal(a[key], b[key]) for key in a)
    logs = [(tmp_path / one / "rollouts.jsonl").read_bytes() for one in ("straight", "resumed")]
    assert logs[0] == logs[1]


# --- rewards that give nothing ------------------------------------------------------------------------------------------


def test_equal_rewards_end_the_run_if_asked(
    base_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Worked by hand: a reward that is always 0 leaves all groups without signal; the run warns after 5 rollouts, ends after
    6 when asked to, and keeps what it has."""
    lines = train(base_dir, prompts, tmp_path / "out", rewards="regex:ZZZ", steps=9, stop_without_signal=6)
    assert len(lines) == 5
    assert all(line["no_signal"] == 1.0 and line["loss"] == 0.0 for line in lines)
    said = capsys.readouterr().err
    assert "all rewards were equal within their groups in 5 rollouts in a row" in said
    assert "stopped early" in said
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["stopped_early"]


FADING = """
calls = {"train": 0, "held": 0}
def score(prompt, completion, row):
    kind = row["answer"]
    calls[kind] += 1
    if kind == "held":
        return -float(calls["held"])
    return float(len(completion)) if calls["train"] <= 32 else 0.0
"""


def test_a_run_that_ends_early_keeps_the_best(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: keep=best holds when a run ends for lack of signal. Here training moves the weights in steps 1 and 2, and the
    held-out reward only falls: the result is step 1's weights, with keep=last step 2's and later ones."""
    for kind in ("train", "held"):
        (tmp_path / f"{kind}.jsonl").write_text(json.dumps({"prompt": "the cat", "answer": kind}), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    weights = {}
    for keep in ("best", "last"):
        (tmp_path / f"fading_{keep}.py").write_text(FADING, encoding="utf-8")
        options = {"eval_data": tmp_path / "held.jsonl", "eval_every": 1, "keep": keep, "stop_without_signal": 3}
        out = tmp_path / keep
        train(base_dir, tmp_path / "train.jsonl", out, rewards=f"fading_{keep}:score", steps=9, **options)
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        assert summary["stopped_early"]
        assert summary["steps"] == 4
        assert summary.get("best_step") == (1 if keep == "best" else None)
        weights[keep] = load_file(out / "adapter_model.safetensors")
    assert any(not torch.equal(tensor, weights["last"][name]) for name, tensor in weights["best"].items())


REWARD = """
import time
calls = [0]
def raises(prompt, completion, row):
    calls[0] += 1
    if calls[0] > 40:
        raise RuntimeError("boom")
    return float(len(completion))
def nan(prompt, completion, row):
    return float("nan")
def hangs(prompt, completion, row):
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "raises",
            r"step 3: prompts.jsonl line \d: reward rewarding:raises failed on .*RuntimeError: boom; the last good checkpoint is "
            r".*step-00000002; to go on from it, fix it",
        ),
        ("nan", r"step 1: prompts.jsonl line \d: reward rewarding:nan gave nan.*; no checkpoint was written yet"),
        ("hangs", r"step 1: prompts.jsonl line \d: reward rewarding:hangs failed on .*no result within 0.5 s"),
    ],
)
def test_a_reward_that_fails_stops_cleanly(
    name: str, message: str, base_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: the row and the reward are named, earlier checkpoints stay, run.json says why it stopped."""
    (tmp_path / "rewarding.py").write_text(REWARD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    limit = {"reward_timeout_s": 0.5} if name == "hangs" else {}
    with pytest.raises(ValueError, match=message):
        train(base_dir, prompts, tmp_path / "out", rewards=f"rewarding:{name}", checkpoint_every=1, **limit)
    state = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert state["status"] == "stopped"
    assert "rewarding" in state["reason"]
    kept = [path.name for path in (tmp_path / "out" / "checkpoints").glob("step-*")]
    assert kept == (["step-00000002"] if name == "raises" else [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ppoo"}, "unknown policy loss 'ppoo'; choose grpo"),
        ({"group_size": 1}, "group_size=1 must be >= 2"),
        ({"batch_size": 10}, "batch_size=10 answers are not whole groups of group_size=4; use batch_size 8"),
        ({"max_new_tokens": 95}, r"prompts.jsonl line 1: the prompt has \d+ tokens; with max_new_tokens=95"),
        ({"rewards": "exactly"}, "unknown reward 'exactly'"),
        ({"rewards": "nowhere_at_all:f"}, "reward nowhere_at_all:f can't be imported"),
        ({"temperature": 0.0}, "temperature=0.0 must be > 0"),
        ({"clip_low": -1.0}, "clip_low=-1.0"),
        ({"normalize": "words"}, "normalize='words'; choose sequence"),
        ({"importance_cap": 0.5}, "cap=0.5 must be >= 1"),
        ({"kl": "k9"}, "unknown kl estimator 'k9'"),
        ({"updates_per_rollout": 0}, "updates_per_rollout=0 must be >= 1"),
        ({"keep": "best"}, "keep=best needs a validation loss"),
    ],
)
def test_settings_that_cannot_work(
    settings: dict[str, Any], message: str, base_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(base_dir, prompts, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_rewards_that_begin_as_json() -> None:
    """Law: a mapping that is cut off is said to be one, by the option's name."""
    assert [term.name for term in RolloutOptions(rewards='{"exact": 0.5}').terms()] == ["exact"]
    with pytest.raises(ValueError, match=r"rewards='\{\"exact\": ' begins as JSON and is none"):
        RolloutOptions(rewards='{"exact": ').terms()


def test_rows_without_a_prompt(base_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "hello"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"texts.jsonl line 1: no prompt to answer"):
        train(base_dir, path, tmp_path / "out")


def test_conversations_and_evaluation(base_dir: Path, tmp_path: Path) -> None:
    """Law: messages go through the chat template; the row's own answer is the rewards', not the prompt's; greedy held-out
    answers give val_reward, and keep=best takes the best of them."""
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    lines = train(
        base_dir, path, tmp_path / "out", rewards="exact + 0.1 * regex:a", eval_data=path, eval_every=1, keep="best"
    )
    assert all(math.isfinite(line["val_reward"]) and line["val_loss"] == -line["val_reward"] for line in lines)
    assert "reward.exact" in lines[0]
    assert json.loads((tmp_path / "out" / "graft.json").read_text())["prompt_format"] == "chat"


def test_options_of_the_kinds() -> None:
    """Worked by hand: what each kind's loss is a mean over."""
    found = {kind: GRPOOptions(kind=kind).averaged(7) for kind in ("grpo", "dr_grpo", "dapo", "gspo", "cispo")}  # pyright: ignore
    assert found == {
        "grpo": "sequence", "dr_grpo": "constant:7", "dapo": "token", "gspo": "sequence", "cispo": "token",
    }  # fmt: skip
    assert rollout_task.RolloutOptions(rewards='{"regex:a + b": 0.5}').terms()[0].weight == 0.5


def test_command(base_dir: Path, prompts: Path, tmp_path: Path, graft: Callable[..., Any]) -> None:
    out = graft(
        "grpo", "--base", base_dir, "--data", prompts, "--rewards", "regex:a", "--out", tmp_path / "out", "--steps", 1,
        "--batch-size", 8, "--group-size", 4, "--max-new-tokens", 3,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "written to" in out.stdout
    assert "step 1: reward" in out.stderr
