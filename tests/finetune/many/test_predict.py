"""What many jobs will need, said before they run: bytes against the allocator, seconds against the clock, how many fit."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import graft
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer
from graft.finetune.adapters.lora import LoraConfig
from graft.finetune.many.batch import together, weighted_loss, worth_packing
from graft.finetune.many.predict import (
    Load,
    Plan,
    Shared,
    attach_all,
    micro_batch_of,
    predict_bytes,
    say_seconds,
    step_seconds,
    update_all,
)
from graft.finetune.many.run import fit_jobs
from graft.finetune.memory.measure import cpu_allocations
from graft.quant.linear import quantize_linears_

CONFIG = ModelConfig(
    vocab_size=512, d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, d_head=32, d_ff=256, max_seq_len=64
)
EQUAL = [Load(LoraConfig(rank=8), 1, 64)] * 8
UNLIKE = [Load(LoraConfig(rank=2 + i, targets=("q_proj", "down_proj")), 1 + i, 20 + 9 * i) for i in range(4)]
CASES = {
    "8 equal jobs": (EQUAL, Shared("lora")),
    "4 unlike jobs, packed": (UNLIKE, Shared("lora")),
    "NF4": (EQUAL, Shared("qlora")),
    "checkpointing": (EQUAL, Shared("lora", checkpointing=True)),
    "one job": (EQUAL[:1], Shared("lora")),
}


def real_step(config: ModelConfig, loads: list[Load], shared: Shared) -> None:
    """From nothing to one update."""
    model = Transformer(config)
    if shared.method == "qlora":
        quantize_linears_(model)
    model.checkpointing = shared.checkpointing
    stack, rows = attach_all(model, loads, [str(i) for i in range(len(loads))])
    parts = [micro_batch_of(load) for load in loads]
    batch, counts = together(parts, packed=worth_packing(parts, "cpu"))
    with stack.training(counts):
        weighted_loss(model, batch, torch.full((sum(counts),), 1e-3))[0].backward()
    update_all(stack, rows)


@pytest.mark.parametrize("name", CASES)
def test_bytes_meet_the_allocator(name: str) -> None:
    """Parity: PyTorch's CPU allocator in the same step, within 1%."""
    loads, shared = CASES[name]
    predicted = predict_bytes(CONFIG, loads, shared, device="cpu")
    with cpu_allocations() as peak:
        real_step(CONFIG, loads, shared)
    assert predicted == pytest.approx(peak[0], rel=0.01)


def test_a_job_that_joins_later_may_be_the_peak() -> None:
    """Parity: a job that takes another's place needs the stack's old buffers and the new ones for a moment."""
    loads = [Load(LoraConfig(rank=64), 1, 2)] * 4
    predicted = [
        predict_bytes(CONFIG, loads, Shared("lora"), device="cpu", joins_later=later) for later in (False, True)
    ]
    with cpu_allocations() as peak:
        stack, _ = attach_all(Transformer(CONFIG), loads, list("0123"))
        stack.set_jobs(list("0123"), stack.generators)
    assert predicted[1] == pytest.approx(peak[0], rel=0.01)
    assert predicted[1] > 1.2 * predicted[0]


def test_extrapolation_over_layers_is_exact() -> None:
    """Law: from 3 and 4 layers to 7, the bytes are those of all 7."""
    config = replace(CONFIG, n_layers=7)
    short = [replace(load, length=24) for load in EQUAL[:3]]
    found = [predict_bytes(config, short, Shared("lora"), device="cpu", whole=whole) for whole in (False, True)]
    assert found[0] == found[1]


def test_one_more_job_costs_its_adapter_and_its_rows() -> None:
    """Worked by hand: four buffers of rank * (in + out) float32 for each linear, and no second base."""
    predicted = [predict_bytes(CONFIG, EQUAL[:n], Shared("lora"), device="cpu") for n in (7, 8)]
    layer = 4 * 128 + 2 * (128 + 64) + 3 * (128 + 256)  # in + out of q, o (128 + 128), k, v, and the three of d_ff
    adapter = 16 * 8 * 3 * layer
    more = predicted[1] - predicted[0]
    assert adapter < more < adapter + (predicted[0] - 7 * adapter) / 4


def test_seconds_meet_the_clock() -> None:
    """Law: the time of a step of 5 layers, out of 1 and 2, is near the clock's; a loaded machine's jumps: 2.5x."""
    config = replace(CONFIG, n_layers=5, d_model=256, d_ff=1024)
    taken = []
    model = Transformer(config)
    stack, rows = attach_all(model, EQUAL, [str(i) for i in range(8)])
    parts = [micro_batch_of(load) for load in EQUAL]
    for _ in range(4):
        began = time.perf_counter()
        batch, counts = together(parts, packed=True)
        with stack.training(counts):
            weighted_loss(model, batch, torch.full((sum(counts),), 1e-3))[0].backward()
        update_all(stack, rows)
        taken.append(time.perf_counter() - began)
    predicted = step_seconds(config, EQUAL, Shared("lora"), device="cpu")
    assert min(taken) / 2.5 < predicted < max(taken) * 2.5


def test_what_is_said() -> None:
    plan = Plan(
        n_jobs=4, at_once=4, device="cpu", peak_bytes=3 << 30, seconds=200.4, step_s=0.5, budget=2 << 30, n_fit=2
    )
    lines = plan.lines()
    assert lines[0] == "predicted peak memory of tensors: 3.00 GiB on cpu, 4 jobs at once"
    assert lines[1] == "predicted time: about 3 min 20 s, 0.5 s a step of 4 jobs"
    assert lines[2] == "2 of 4 jobs fit into 2.00 GiB at a time: --at-once 2"
    assert lines[3].startswith("warning: predicted peak 3.00 GiB is more than the 2.00 GiB free on cpu; train fewer")
    assert len(replace(plan, peak_bytes=1, n_fit=None).lines()) == 2
    assert [say_seconds(s) for s in (8.23, 75, 7500)] == ["8.2 s", "1 min 15 s", "2 h 5 min"]


def test_how_many_fit(base_dir: Path, tmp_path: Path) -> None:
    """Law: the most jobs whose prediction is within the budget, and nothing is written; the summary has both predictions."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"the {w}", "completion": " cat"}) for w in "abcdef"))
    jobs = [{"data": rows, "out": tmp_path / f"out{i}", "rank": 4, "steps": 2, "batch_size": 2} for i in range(4)]
    every = fit_jobs(base=base_dir, jobs=jobs, device="cpu")
    assert every.n_fit == every.at_once == 4
    fewer = fit_jobs(base=base_dir, jobs=jobs, device="cpu", budget=every.peak_bytes - 1)
    assert fewer.n_fit is not None
    assert 1 <= fewer.n_fit < 4
    assert fewer.peak_bytes <= every.peak_bytes - 1
    none = fit_jobs(base=base_dir, jobs=jobs, device="cpu", budget=1000)
    assert none.n_fit == 0
    assert "0 of 4 jobs fit into 1000 B at a time: none" in none.lines()
    assert not list(tmp_path.glob("out*"))
    [summary] = graft.sft_many(base=base_dir, jobs=jobs[:1], device="cpu")
    assert summary["predicted_peak_bytes"] > 0
    assert summary["predicted_seconds"] > 0
    held = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = fit_jobs(base=base_dir, jobs=jobs, device="cpu")  # over a finished run, as before it
    assert (again.n_jobs, again.peak_bytes) == (4, every.peak_bytes)
    assert fit_jobs(base=base_dir, jobs=jobs[:2], device="cpu", resume=True).n_jobs == 1  # what is left
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == held
    with pytest.raises(ValueError, match="--resume and --force exclude each other"):
        fit_jobs(base=base_dir, jobs=jobs[1:], device="cpu", resume=True, force=True)


def test_when_rows_are_packed() -> None:
    """Worked by hand, on a GPU: rows of 8 and 6 would be padded by 2 of 16, rows of 8 and 2 by 6 of 16."""
    parts = {n: {"ids": torch.zeros(1, n, dtype=torch.int64)} for n in (8, 6, 2)}
    assert worth_packing([parts[8], parts[6]], "cpu")
    assert not worth_packing([parts[8], None, parts[6]], "cuda")
    assert worth_packing([parts[8], parts[2]], "cuda")
