"""graft dpo: starts at the reference, learns, resumes to the bit, keeps adapters apart, says what is wrong with rows."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.base.runlog import read_metrics
from graft.base.training.signals import Interrupted
from graft.finetune.adapters.bank import AdapterBank
from graft.finetune.align import run, run_dpo
from graft.finetune.align.run_dpo import FallWatch, dpo
from graft.finetune.data.chat import encode_record
from graft.finetune.data.records import Record
from graft.finetune.loading import load_model
from graft.finetune.sft import run_sft

PAIRS = [
    ("the cat", " sat", " flew over it"),
    ("a bird", " sang", " sat on the cat"),
    ("the tree", " stood", " ran"),
    ("rivers", " run", " sleep"),
]
METHODS = ("lora", "full", "qlora")
RATE = {"lora": 5e-3, "qlora": 5e-3, "full": 2e-3}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS])


def train(base: Path, rows: Path, out: Path, method: str = "lora", **settings: Any) -> list[dict[str, Any]]:
    defaults = {"steps": 4, "batch_size": 4, "learning_rate": RATE[method], "device": "cpu"}
    dpo(base=base, data=rows, out=out, method=method, **(defaults | settings))
    return read_metrics(out / "metrics.jsonl")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("packing", [True, False])
def test_starts_at_the_reference_and_learns(
    method: str, packing: bool, base_dir: Path, rows: Path, tmp_path: Path
) -> None:
    """Worked by hand: before the first update margin 0, loss log 2. Learning: 4 pairs are told apart after 30 steps."""
    lines = train(base_dir, rows, tmp_path / "out", method, steps=30, packing=packing)
    # The reference is computed with other neighbours in the row than the policy: rounding of float32 sums, about 30 nats.
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert lines[-1]["accuracy"] == 1.0
    assert lines[-1]["loss"] < 0.5
    assert lines[-1]["margin"] == pytest.approx(lines[-1]["chosen_gain"] - lines[-1]["rejected_gain"], abs=1e-4)


def test_figures_are_those_of_the_answers(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Worked out apart: chosen_logp of the first line is the cross entropy of the chosen answers' tokens and EOS, negated."""
    line = train(base_dir, rows, tmp_path / "out", steps=1)[0]
    model, tokenizer = load_model(base_dir), graft.Tokenizer.load(base_dir)
    totals = []
    for prompt, chosen, _ in PAIRS:
        encoded = encode_record(Record("row", prompt=prompt, completion=chosen), tokenizer, None, 96)
        ids = torch.from_numpy(encoded.ids).long()[None]
        with torch.no_grad():
            logp = model(ids)[0].log_softmax(-1)
        totals.append(sum(float(logp[t - 1, ids[0, t]]) for t in range(1, ids.shape[1]) if encoded.loss_mask[t]))
    assert line["chosen_logp"] == pytest.approx(sum(totals) / 4, abs=1e-4)  # float32 sums of about 30 nats
    assert line["n_labels"] == 4


@pytest.mark.parametrize("loss", ["ipo", "robust", "hinge", "kto", "orpo", "simpo"])
def test_each_loss_learns(loss: str, base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Learning: with every loss the held-out pairs (the same ones here) are told apart in the end."""
    lines = train(base_dir, rows, tmp_path / "out", loss=loss, steps=30, eval_data=rows, eval_every=10)
    assert lines[-1]["val_accuracy"] == 1.0
    assert lines[-1]["loss"] < lines[0]["loss"]
    if loss == "kto":
        assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-5)  # 1 - s(0): policy and reference agree, z_0 = 0


def test_accumulation_changes_nothing(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: micro-batches of one pair give the loss curve of one batch of four."""
    whole = train(base_dir, rows, tmp_path / "a", micro_batch=4)
    parts = train(base_dir, rows, tmp_path / "b", micro_batch=1)
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["chosen_logp"] == pytest.approx(b["chosen_logp"], abs=1e-3)  # 1e-5 of 30 nats, after an update


@pytest.mark.parametrize("method", METHODS)
def test_resumes_to_the_bit(
    method: str, base_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: a run killed in step 3, and resumed, ends with the very weights of one that was not; the reference stays the
    base, not what the checkpoint holds."""
    settings = {"steps": 6, "checkpoint_every": 2, "batch_size": 2, "dropout": 0.1 if method != "full" else None}
    settings = {k: v for k, v in settings.items() if v is not None}
    straight = train(base_dir, rows, tmp_path / "straight", method, **settings)
    original, calls = run_dpo.PreferenceObjective.loss, [0]

    def dies(self: run_dpo.PreferenceObjective, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(run, "print_prediction", lambda *_, **__: 0)  # it calls the loss too
    monkeypatch.setattr(run_dpo.PreferenceObjective, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train(base_dir, rows, tmp_path / "resumed", method, **settings)
    monkeypatch.undo()
    for file in (tmp_path / "resumed" / "checkpoints").glob("reference-*"):
        file.unlink()  # it must come out the same when it is computed again
    resumed = train(base_dir, rows, tmp_path / "resumed", method, resume=True, **settings)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in straight]
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    a, b = load_file(tmp_path / "straight" / name), load_file(tmp_path / "resumed" / name)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_goes_on_from_an_sft_adapter(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: with --adapter the policy starts as base + adapter (loss log 2, not the base's log-probabilities), the SFT folder
    stays as it is, and the result is one adapter for the same base, loadable beside it."""
    sft_rows = write(tmp_path / "sft.jsonl", [{"prompt": p, "completion": c} for p, c, _ in PAIRS])
    run_sft(
        base=base_dir, data=sft_rows, out=tmp_path / "sft", method="lora", progress=False, device="cpu",
        settings={"steps": 10, "batch_size": 4, "rank": 4, "alpha": 8.0, "learning_rate": 5e-3},
    )  # fmt: skip
    before = (tmp_path / "sft" / "adapter_model.safetensors").read_bytes()
    plain = train(base_dir, rows, tmp_path / "plain", steps=1)
    lines = train(base_dir, rows, tmp_path / "dpo", steps=20, adapter=tmp_path / "sft")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["chosen_logp"] > plain[0]["chosen_logp"] + 1  # SFT has taught the chosen answers
    assert lines[-1]["accuracy"] == 1.0
    assert (tmp_path / "sft" / "adapter_model.safetensors").read_bytes() == before
    bank = AdapterBank(load_model(base_dir))
    bank.load("sft", tmp_path / "sft")
    bank.load("dpo", tmp_path / "dpo")
    config = json.loads((tmp_path / "dpo" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    with pytest.raises(ValueError, match=r"rank=8 was requested, adapter .* has 4"):
        train(base_dir, rows, tmp_path / "other", adapter=tmp_path / "sft", rank=8)
    with pytest.raises(ValueError, match="use method lora or qlora"):
        train(base_dir, rows, tmp_path / "other", "full", adapter=tmp_path / "sft")


def test_kto_takes_labelled_rows(base_dir: Path, tmp_path: Path) -> None:
    """Learning: rows with one answer and a label, TRL's layout, without pairs."""
    labelled = [{"prompt": p, "completion": c, "label": True} for p, c, _ in PAIRS]
    labelled += [{"prompt": p, "completion": r, "label": False} for p, _, r in PAIRS[:2]]
    rows = write(tmp_path / "kto.jsonl", labelled)
    lines = train(base_dir, rows, tmp_path / "out", loss="kto", steps=30, batch_size=6)
    assert lines[-1]["accuracy"] == 1.0
    assert lines[-1]["desirable_gain"] > 0 > lines[-1]["undesirable_gain"]
    paired = dpo(base=base_dir, data=rows, out=tmp_path / "pairs", steps=1, batch_size=2, device="cpu")
    assert (paired["n_pairs"], paired["n_single"]) == (2, 2)  # two prompts have an answer of each kind
    with pytest.raises(ValueError, match="none of 3 labelled answers has a partner with the other label"):
        train(base_dir, write(tmp_path / "good.jsonl", labelled[:3]), tmp_path / "other")


def test_both_falling_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """Worked by hand: ten lines in which chosen lost 1 nat and rejected 3 warn once; nine, or a chosen that gained, don't."""
    watch = FallWatch()
    for step in range(1, 10):
        watch.see({"step": step, "chosen_gain": -1.0, "rejected_gain": -3.0})
    assert watch.warned_at is None
    for step in range(10, 20):
        watch.see({"step": step, "chosen_gain": -1.0, "rejected_gain": -3.0})
    assert watch.warned_at == 10
    assert capsys.readouterr().err.count("both answers fell below the reference (chosen by 1.00 nats") == 1
    watch = FallWatch()
    for step in range(20):
        watch.see({"step": step, "chosen_gain": 0.1, "rejected_gain": -3.0})
    assert watch.warned_at is None


def test_rows_without_a_preference(base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Worked by hand: equal answers are counted and left out; when all are, that is the error; a prompt that fills the
    context names its row."""
    equal = {"prompt": "a", "chosen": " b", "rejected": " b"}
    good = {"prompt": "the cat", "chosen": " sat", "rejected": " flew"}
    mixed = write(tmp_path / "mixed.jsonl", [equal, good, equal])
    summary = dpo(base=base_dir, data=mixed, out=tmp_path / "mixed", steps=1, batch_size=1, device="cpu")
    assert (summary["n_pairs"], summary["n_equal"]) == (1, 2)
    assert "2 rows have equal answers and were left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="chosen equals rejected in all 1 rows"):
        train(base_dir, write(tmp_path / "equal.jsonl", [equal]), tmp_path / "x")
    long = {"prompt": "the cat sat " * 60, "chosen": " sat", "rejected": " flew"}
    with pytest.raises(ValueError, match=r"long.jsonl line 2: no label is left after truncation to max_seq_len=96"):
        train(base_dir, write(tmp_path / "long.jsonl", [good, long]), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dpoo"}, "unknown preference loss 'dpoo'; choose sigmoid, ipo"),
        ({"beta": -1.0}, "beta=-1.0 must be > 0"),
        ({"label_smoothing": 0.7}, "label_smoothing=0.7 must lie in"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing=0.1 is for the losses sigmoid and robust, got ipo"),
        ({"epochs": 0}, "epochs=0.0 must be a positive number"),
        ({"method": "half"}, "unknown method 'half'; choose full, lora, qlora"),
        ({"bata": 0.1}, "unknown config key 'bata'; did you mean beta"),
        ({"patience": 1}, "patience=1 needs a validation loss"),
        ({"method": "full", "rank": 4}, "rank=4 is about an adapter"),
    ],
)
def test_settings_that_cannot_work(
    settings: dict[str, Any], message: str, base_dir: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        dpo(base=base_dir, data=rows, out=tmp_path / "out", device="cpu", **({"steps": 1} | settings))
    assert not (tmp_path / "out").exists()


def test_a_signal_stops_after_the_step(
    base_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: SIGTERM in a step ends with a checkpoint of that step."""
    import os
    import signal

    original = run_dpo.PreferenceObjective.loss

    def signals(self: run_dpo.PreferenceObjective, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(run, "print_prediction", lambda *_, **__: 0)  # it calls the loss too
    monkeypatch.setattr(run_dpo.PreferenceObjective, "loss", signals)
    with pytest.raises(Interrupted, match="stopped after step 1 of 4"):
        train(base_dir, rows, tmp_path / "out")
    assert (tmp_path / "out" / "checkpoints" / "step-00000001").is_dir()


def test_command(base_dir: Path, rows: Path, tmp_path: Path, graft: Callable[..., Any]) -> None:
    """Law: the command trains; a bad loss is one line on standard error."""
    out = graft("dpo", "--base", base_dir, "--data", rows, "--out", tmp_path / "out", "--steps", 2, "--loss", "ipo")
    assert out.returncode == 0, out.stderr
    assert "written to" in out.stdout
    bad = graft("dpo", "--base", base_dir, "--data", rows, "--out", tmp_path / "bad", "--loss", "nope")
    assert bad.returncode == 1
    assert bad.stderr.strip().startswith("graft: unknown preference loss 'nope'")
