"""What looks at a pretraining run: samples, benchmarks, MFU and time left; the run itself is the same with them."""

import json
import os
from pathlib import Path

import pytest
import torch

from graft.base.data.shards import prepare
from graft.base.meter import Meter, peak_flops
from graft.base.pretrain import run_pretrain
from graft.base.pretrain_config import PretrainConfig
from graft.base.runlog import read_metrics
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.evaluation.during import open_benchmarks, spread
from graft.finetune.evaluation.tasks import read_benchmark

SIZES = {"n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_head": 16, "d_ff": 64, "max_seq_len": 16}
LOOP = {"steps": 4, "batch_size": 2, "micro_batch": 2, "eval_every": 2, "eval_batches": 1, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def tokens(text_file: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch") / "tokens"
    prepare([text_file], Tokenizer.load(tokenizer_dir), folder, val_fraction=0.1)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [{"sentence_good": f"a cat {i}", "sentence_bad": f"cat a {i}"} for i in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_samples_and_benchmarks(tokens: Path, tokenizer_dir: Path, pairs: Path, tmp_path: Path) -> None:
    """Law: samples every second step for each prompt, benchmarks with every evaluation, and the weights and losses of a run
    without them; a resumed run writes a killed one's samples again, once."""
    watched = {"sample_every": 2, "sample_prompts": ["the", ""], "sample_tokens": 5}
    watched |= {"benchmarks": [f"pairs={pairs}"], "benchmark_questions": 4, "best_by": "val_pairs_acc"}
    common = {"data": tokens, "tokenizer": tokenizer_dir, "progress": False, "device": "cpu"}
    summary = run_pretrain(out=tmp_path / "a", settings=SIZES | LOOP | watched, benchmarks=open_benchmarks, **common)
    run_pretrain(out=tmp_path / "b", settings=SIZES | LOOP, **common)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    lines = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert ["val_pairs_acc" in line for line in lines] == [False, True, False, True]
    assert summary["val_pairs_acc"] in (0, 0.25, 0.5, 0.75, 1)
    assert all(line["mfu"] > 0 for line in lines)
    assert "GFLOP/s" in summary["mfu_peak_is"]
    samples = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    assert [(one["step"], one["prompt"]) for one in samples] == [(2, "the"), (2, ""), (4, "the"), (4, "")]
    # as after a kill before any checkpoint was whole
    os.rename(tmp_path / "a" / "checkpoints" / "step-00000004", tmp_path / "gone")
    run_pretrain(out=tmp_path / "a", settings={}, resume=True, benchmarks=open_benchmarks, **common)
    again = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    assert again == samples


def test_refusals(tokens: Path, tokenizer_dir: Path, pairs: Path, tmp_path: Path) -> None:
    common = {"data": tokens, "tokenizer": tokenizer_dir, "out": tmp_path / "a", "progress": False, "device": "cpu"}
    for settings, message in (
        ({"benchmarks": [f"pairs={pairs}"]}, "benchmarks need a reader of their files"),
        (
            {"sample_every": 1, "sample_tokens": 16},
            "sample_prompts: '' has 1 tokens and sample_tokens=16, more than max_seq",
        ),
        ({"sample_every": -1}, "sample_every=-1 must be >= 0"),
        ({"sample_every": 1, "sample_prompts": []}, "sample_every=1 has no sample_prompts"),
        ({"sample_tokens": 0}, "sample_tokens=0 must be >= 1"),
        ({"soap_every": 3}, "soap_every=3 is of SOAP"),
    ):
        with pytest.raises(ValueError, match=message):
            run_pretrain(settings=SIZES | LOOP | settings, **common)
    too_long = tmp_path / "long.jsonl"
    too_long.write_text(json.dumps({"sentence_good": "a cat " * 40, "sentence_bad": "cat a " * 40}))
    for file, message in (
        (too_long, "long.jsonl line 1: the continuation has .* but the model reads 16"),
        ("", "benchmarks pairs=: the name or the file is empty"),
    ):  # before the first step, not at the first evaluation
        with pytest.raises(ValueError, match=message):
            run_pretrain(
                settings=SIZES | LOOP | {"benchmarks": [f"pairs={file}"]}, benchmarks=open_benchmarks, **common
            )
    assert not (tmp_path / "a").exists()


def test_questions_are_spread(pairs: Path) -> None:
    """Worked by hand: 4 of 10 are numbers 0, 2, 5 and 7; 20 of 10 are all."""
    benchmark = read_benchmark(pairs, name="pairs")
    assert [q.continuations[0] for q in spread(benchmark, 4).questions] == [
        benchmark.questions[i].continuations[0] for i in (0, 2, 5, 7)
    ]
    assert spread(benchmark, 20) is benchmark


def test_meter_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked by hand: 100 tokens a second of 50 FLOPs each are 5,000 FLOP/s, half of 10,000. At 2 s a step, 8 steps are 16 s
    away; then a step of 12 s makes the pace 0.9 * 2 + 0.1 * 12 = 3 s, 7 steps 21 s."""
    meter = Meter(steps=10, flops_per_token=50, peak=10_000)
    assert meter.figures({"step": 2, "step_s": 2.0, "tokens_per_s": 100}) == {"mfu": 0.5, "left_s": 16.0}
    assert meter.figures({"step": 3, "step_s": 12.0, "tokens_per_s": 100})["left_s"] == pytest.approx(21.0)
    assert "mfu" not in Meter(steps=10, flops_per_token=50, peak=None).figures(
        {"step": 3, "step_s": 1.0, "tokens_per_s": 100}
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops("cuda:0")[0] == 989.5e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unknown 1")
    assert peak_flops("cuda") == (None, "Unknown 1 is not in graft's table of peaks")
    assert PretrainConfig().sample_every == 0
