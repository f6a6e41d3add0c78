"""Many adapters at once: each equals its own run, whatever its rank, rate, length and fate, and whatever happens to the others."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.base.runlog import read_metrics
from graft.finetune.adapters.stacked import Segment, segments_of
from graft.finetune.many import read_jobs, together
from graft.finetune.quantize import run_quantize

WORDS = "the cat sat on a mat and looked at bird in tree while river runs to sea".split()


def write_rows(path: Path, n: int, longest: int, seed: int) -> Path:
    """Prompts and completions of random words."""
    rng = random.Random(seed)
    rows = [
        {
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, longest))),
            "completion": " " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest))),
        }
        for _ in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("data")
    return [write_rows(folder / f"{i}.jsonl", 9 + 4 * i, 3 + 4 * i, i) for i in range(3)]


@pytest.fixture(scope="module")
def nf4_base(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4") / "base"
    run_quantize(base=base_dir, out=folder)
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def job(data: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return {"data": data, "out": out, "steps": 4, "batch_size": 2, "rank": 4, "warmup_steps": 0} | settings


def different_jobs(data: list[Path], out: Path) -> list[dict[str, Any]]:
    """Nothing alike: data, lengths, ranks, rates, seeds, batches, schedules, targets, steps."""
    return [
        job(data[0], out / "a", steps=32, rank=4, learning_rate=3e-3, seed=1, batch_size=4),
        job(data[1], out / "b", steps=35, rank=8, alpha=16.0, learning_rate=1e-3, seed=2, batch_size=3, micro_batch=1,
            weight_decay=0.1, schedule="linear", eval_data=data[0], eval_every=10),
        job(data[2], out / "c", steps=38, rank=2, learning_rate=5e-3, seed=3, batch_size=1, grad_clip=0.1,
            targets=["q_proj", "down_proj"], rank_stabilized=True, schedule="constant", max_seq_len=20,
            on_too_long="drop", warmup_steps=5),
        job(data[0], out / "d", steps=30, rank=3, learning_rate=2e-3, seed=4, batch_size=5, packing=True),
    ]  # fmt: skip


def solo(base: Path, one: dict[str, Any], out: Path, method: str) -> dict[str, Any]:
    return graft.sft(base=base, method=method, **(one | {"out": out}))


# --- equal to solo runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "qlora", "stored in 4 bits"])
def test_each_job_is_its_solo_run(
    method: str, base_dir: Path, nf4_base: Path, data: list[Path], tmp_path: Path
) -> None:
    """Law: losses of every step equal those of `graft.sft` alone to 1e-4, the weights follow, the files are the same."""
    base = nf4_base if method == "stored in 4 bits" else base_dir
    method = "lora" if method == "stored in 4 bits" else method
    jobs = different_jobs(data, tmp_path / "many")
    summaries = graft.sft_many(base=base, jobs=jobs, method=method)
    for one, summary in zip(jobs, summaries, strict=True):
        alone = tmp_path / "alone" / one["out"].name
        expected = solo(base, one, alone, method)
        assert len(losses(alone)) == one["steps"]
        assert losses(one["out"]) == pytest.approx(losses(alone), abs=1e-4)
        theirs = weights(alone)
        ours = weights(one["out"])
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            # float32 sums in another order, through 30 AdamW steps whose size is the sign's where gradients are tiny
            assert (tensor - theirs[name]).norm() <= 2e-3 * theirs[name].norm() + 1e-6, name
        figures = ("steps", "n_trained_params", "weight_bytes", "method", "n_skipped_steps")
        assert {key: summary[key] for key in figures} == {key: expected[key] for key in figures}
        names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*")) for f in (one["out"], alone)]
        assert names[0] == names[1]
        for name in ("adapter_config.json", "graft.json"):
            assert json.loads((one["out"] / name).read_text()) == json.loads((alone / name).read_text())
        configs = [json.loads((folder / "run.json").read_text()) for folder in (one["out"], alone)]
        assert configs[0]["config"] == configs[1]["config"]
        assert configs[0]["status"] == "finished"
        keys = [[set(line) for line in read_metrics(folder / "metrics.jsonl")] for folder in (one["out"], alone)]
        assert keys[0] == keys[1]
    vals = [[line["val_loss"] for line in read_metrics(f / "metrics.jsonl") if "val_loss" in line]
            for f in (tmp_path / "many/b", tmp_path / "alone/b")]  # fmt: skip
    assert len(vals[0]) == 4
    assert vals[0] == pytest.approx(vals[1], abs=1e-4)
