"""K adapters trained at once on a GPU, for K = 1 to 64: `python bench/gpu_many.py [--quick]`, or a part of bench/gpu.sh.

A step is forward, backward, clipping and AdamW of rank-16 adapters on every linear of a base of 1.1B parameters in bfloat16 with
random weights, one row of 128 tokens a job. Beside it: one adapter on all K rows (the ceiling), and K steps of one adapter.
Without a GPU, or with --quick, the shapes are tiny.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from graft.base.loss import next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer
from graft.base.optim.adamw import AdamW
from graft.base.optim.clip import clip_gradients_
from graft.base.precision import autocast
from graft.finetune.adapters.lora import LoraConfig, attach_lora
from graft.finetune.many.batch import together, weighted_loss, worth_packing
from graft.finetune.many.predict import Load, Shared, attach_all, micro_batch_of, predict_bytes, update_all
from graft.finetune.memory.step import place_, shaped_model

ONE_B = ModelConfig(32_000, 2048, 22, 32, 4, 64, 5632, 2048, qk_norm=False, tie_embeddings=False)
TINY = ModelConfig(512, 64, 2, 4, 2, 16, 128, 128, qk_norm=False, tie_embeddings=False)
LORA, LENGTH, ROUNDS = LoraConfig(rank=16, alpha=32), 128, 12


def frozen_base(config: ModelConfig, device: str) -> Transformer:
    """A base in bfloat16 with random weights."""
    model = shaped_model(config, Shared("lora", "bfloat16").settings(), bare=True)
    place_(model, device)
    return model.train()


def one_adapter(config: ModelConfig, device: str, n_rows: int) -> Callable[[], None]:
    """A step of one adapter on n_rows rows, as `graft sft` makes it."""
    model = frozen_base(config, device)
    attach_lora(model, LORA)
    optimizer = AdamW([(name, p) for name, p in model.named_parameters() if p.requires_grad])
    batch = {key: tensor.to(device) for key, tensor in micro_batch_of(Load(LORA, n_rows, LENGTH)).items()}

    def step() -> None:
        with autocast("bfloat16", device):
            loss = next_token_loss(model, batch) / (n_rows * LENGTH)
        loss.backward()
        float(clip_gradients_([p for _, p in optimizer.named], 1.0))
        optimizer.step(1e-4)
        optimizer.zero_grad()

    return step


def many_adapters(config: ModelConfig, device: str, n_jobs: int) -> Callable[[], None]:
    """A step of n_jobs adapters on a row each, as `graft sft --jobs` makes it."""
    model = frozen_base(config, device)
    loads = [Load(LORA, 1, LENGTH)] * n_jobs
    stack, rows = attach_all(model, loads, [str(i) for i in range(n_jobs)])
    parts = [micro_batch_of(load) for load in loads]

    def step() -> None:
        batch, counts = together(parts, packed=worth_packing(parts, device))
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with stack.training(counts):
            with autocast("bfloat16", device):
                total, _ = weighted_loss(model, moved, torch.full((sum(counts),), 1 / LENGTH, device=device))
            total.backward()
        update_all(stack, rows)

    return step


def milliseconds(step: Callable[[], None], device: str, rounds: int) -> float:
    """The median of some steps, after two to warm up."""
    times = []
    for turn in range(rounds + 2):
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if turn >= 2:
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def bench(quick: bool) -> list[dict[str, Any]]:
    """Rows of name, value, unit, bar and ok, as bench/gpu.sh collects them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = quick or device == "cpu"
    config, rounds, counts = (TINY, 2, (1, 4)) if small else (ONE_B, ROUNDS, (1, 2, 4, 8, 16, 32, 64))
    alone = milliseconds(one_adapter(config, device, 1), device, rounds)
    rows: list[dict[str, Any]] = []
    for n_jobs in counts:
        ceiling = milliseconds(one_adapter(config, device, n_jobs), device, rounds)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        many = milliseconds(many_adapters(config, device, n_jobs), device, rounds)
        rows += [
            {"name": f"many: K = {n_jobs}, step over the ceiling's", "value": many / ceiling, "unit": "x", "bar": "", "ok": None},
            {"name": f"many: K = {n_jobs}, separate steps over it", "value": n_jobs * alone / many, "unit": "x", "bar": "",
             "ok": None},
        ]  # fmt: skip
        said = f"K = {n_jobs}: {many:.1f} ms, ceiling {ceiling:.1f} ms, {n_jobs} separate steps {n_jobs * alone:.1f} ms"
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated() - before
            loads = [Load(LORA, 1, LENGTH)] * n_jobs
            error = 100 * (predict_bytes(config, loads, Shared("lora", "bfloat16"), device="cuda") / peak - 1)
            rows.append({"name": f"many: K = {n_jobs}, predicted memory's error", "value": abs(error), "unit": "%",
                         "bar": "<= 1", "ok": abs(error) <= 1})  # fmt: skip
            said += f", {peak / 2**20:.0f} MiB, predicted {error:+.2f}%"
        print(said, flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    bench(parser.parse_args().quick)
