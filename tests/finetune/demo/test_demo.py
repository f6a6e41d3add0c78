"""The whole demo at a size that takes seconds."""

import json
from pathlib import Path

import pytest

from graft.base.runlog import read_metrics
from graft.finetune.demo import run
from graft.finetune.demo.report import tables
from graft.finetune.demo.scores import SAMPLED


@pytest.mark.slow
def test_the_whole_demo_small(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: it leaves the files that the README names, prints every table, and refuses a folder that is not empty."""
    monkeypatch.setattr(run, "TEXT_BYTES", 60_000)
    monkeypatch.setattr(run, "VOCAB_SIZE", 320)
    small = {"n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64}
    monkeypatch.setattr(run, "MODEL", run.MODEL | small)
    monkeypatch.setattr(run, "PRETRAIN", run.PRETRAIN | {"steps": 4, "batch_size": 2})
    monkeypatch.setattr(run, "TASK_SETTINGS", {name: own | {"steps": 2} for name, own in run.TASK_SETTINGS.items()})
    monkeypatch.setattr(run, "N_TRAIN", 24)
    monkeypatch.setattr(run, "N_EVAL", 4)
    monkeypatch.setenv("COLUMNS", "200")
    assert library.exists()
    out = tmp_path / "demo"
    report = run.run_demo(out, device="cpu")
    for name in ("tokenizer/tokenizer.json", "base/model.safetensors", "report.md", "loss.png", "memory.png"):
        assert (out / name).stat().st_size > 0
    for task in ("spam", "sentiment", "translation", "chat"):
        assert (out / "adapters" / task / "adapter_model.safetensors").exists()
        assert len(read_metrics(out / "adapters" / task / "metrics.jsonl")) == 2
    assert len(read_metrics(out / "base/metrics.jsonl")) == 4
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert [task["name"] for task in report["tasks"]] == list(run.TASK_SETTINGS)
    assert [row["adapter"] for row in report["mixed_batch"]] == 2 * list(run.TASK_SETTINGS)
    assert [row["method"] for row in report["memory"]] == ["full", "LoRA", "QLoRA", "QLoRA, single"]
    assert report["base"]["bigram_loss"] > 0
    by_name = {task["name"]: task for task in report["tasks"]}
    assert by_name["translation"]["majority"] is by_name["translation"]["base_likelihood"] is None
    assert by_name["spam"]["majority"] == 0.5  # two labels in equal parts
    assert all(task["n"] == 4 and task["low"] <= task["accuracy"] <= task["high"] for task in report["tasks"])
    assert report["seconds"] == pytest.approx(sum(report["stage_seconds"].values()), abs=0.1)
    assert [one["prompt"] for one in report["samples"]] == list(SAMPLED)
    assert by_name["chat"]["base_likelihood"] is not None
    assert min(report["first_token_ms"].values()) > 0
    said = capsys.readouterr().out
    for title in tables(report):
        assert title in said
    assert "What to try next" in said
    with pytest.raises(FileExistsError, match=r"is not empty; use --force to run the demo there again"):
        run.run_demo(out, device="cpu")
    graft_json = [json.loads((out / "adapters" / name / "graft.json").read_text()) for name in ("chat", "spam")]
    assert [one["prompt_format"] for one in graft_json] == ["chat", "text"]
    assert graft_json[1]["prompt_shape"] == {"before": "Message: ", "after": "\nLabel:"}
