"""A pretraining step on one GPU: MFU and peak memory, dense and with experts: `python bench/gpu_pretrain.py [--quick]`, or a part
of bench/gpu.sh.

A step is forward, backward, clipping and AdamW in bfloat16 (float32 weights, gradients and moments) on 2,048 tokens a sequence,
with nothing recomputed. MFU is of the device's bfloat16 rate in base/plan.py; its FLOPs are 6 for each parameter that multiplies
and the attention's products, of a mixture those of the experts that read the token. Without a GPU, or with --quick, the shapes
are tiny and nothing is held to a bar.
"""

import argparse
import gc
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from graft.base.meter import peak_flops
from graft.base.model.config import ModelConfig
from graft.base.plan import flops_per_token
from graft.finetune.memory.measure import measure
from graft.finetune.memory.settings import MemorySettings
from graft.finetune.memory.step import make_optimizer, place_, run_training_step, shaped_model
from graft.kernels.measure import Row, row

DENSE = ModelConfig(32_000, 1280, 24, 20, 4, 64, 3456, 2048)  # 0.45B parameters
MIXTURE = replace(DENSE, n_layers=12, n_experts=16, n_experts_per_token=2, d_expert=1728)
TINY = ModelConfig(512, 64, 2, 4, 2, 16, 128, 128)
TINY_MIXTURE = replace(TINY, n_experts=4, n_experts_per_token=2, d_expert=64)
STEPS = 8  # timed; two before them compile and warm up
MEMORY_BAR = 2.0  # percent


def bench(quick: bool) -> list[Row]:
    """Rows as bench/gpu.sh collects them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = quick or device == "cpu"
    cases = [("dense 0.45B", DENSE, 8, 0.45), ("16 experts of which 2 read a token", MIXTURE, 8, 0.30)]
    if small:
        cases = [("tiny dense", TINY, 2, None), ("tiny mixture", TINY_MIXTURE, 2, None)]
    rows: list[Row] = []
    for name, config, batch_size, bar in cases:
        settings = MemorySettings(
            "full", batch_size, None, config.max_seq_len, dtype="float32" if device == "cpu" else "bfloat16", checkpointing=False
        )  # fmt: skip
        rows += rows_of(name, config, settings, device, bar, None if small else MEMORY_BAR)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def rows_of(
    name: str, config: ModelConfig, settings: MemorySettings, device: str, bar: float | None, memory_bar: float | None
) -> list[Row]:
    """MFU, tokens a second, peak memory and how well it was predicted."""
    found = measure(config, settings, device=device)
    seconds = step_seconds(config, settings, device)
    n_tokens = settings.batch_size * settings.seq_len
    peak, what = peak_flops(device)
    print(f"{name}: {config.n_params:,} parameters, {config.n_active_params:,} active; peak: {what}", flush=True)
    rows = [row(f"pretrain {name}: tokens a second", n_tokens / seconds, "tok/s")]
    if peak is not None:
        used = flops_per_token(config, settings.seq_len) * n_tokens / seconds / peak
        rows.append(row(f"pretrain {name}: MFU", used, "", bar, least=True))
    return [
        *rows,
        row(f"pretrain {name}: peak", found.measured_bytes / 2**30, "GiB"),
        row(f"pretrain {name}: prediction's error", 100 * abs(found.error), "%", memory_bar),
    ]


def step_seconds(config: ModelConfig, settings: MemorySettings, device: str) -> float:
    """Median wall time of a step."""
    model = shaped_model(config, settings)
    place_(model, device)
    optimizer = make_optimizer(model, settings)
    times = []
    for step in range(-2, STEPS):
        began = time.perf_counter()
        run_training_step(model, optimizer, settings, device)
        if device == "cuda":
            torch.cuda.synchronize()
        if step >= 0:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _shown(result: dict[str, Any]) -> str:
    return f"{result['name']:60} {result['value']:12.3f} {result['unit']:6} {result['bar']}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    for one in bench(parser.parse_args().quick):
        print(_shown(one))
