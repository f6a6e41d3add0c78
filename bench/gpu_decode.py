"""Decoding on one GPU: tokens a second and memory bandwidth used at batch 1, 8 and 64: `python bench/gpu_decode.py [--quick]`, or a
part of bench/gpu.sh.

The engine's own steps, greedy, over a Qwen3-0.6B-shaped model of random weights in bfloat16, prompts of 128 tokens, keys and values
in rows and in pages. MBU is the bytes that a step has to read (every weight that multiplies once, each row's keys and values) over
its time and the device's bandwidth in base/plan.py. Without a GPU, or with --quick, the shapes are tiny.
"""

import argparse
import statistics
import time

import torch

from graft.base.generate.engine import Engine
from graft.base.generate.sampling import Sampling
from graft.base.model.config import ModelConfig
from graft.base.model.presets import preset
from graft.base.model.transformer import Transformer
from graft.base.plan import DEVICES
from graft.finetune.memory.settings import MemorySettings
from graft.finetune.memory.step import place_, shaped_model
from graft.kernels.measure import Row, row

TINY = ModelConfig(512, 64, 2, 4, 2, 16, 128, 256)
BATCHES, PROMPT, NEW = (1, 8, 64), 128, 64


def bench(quick: bool) -> list[Row]:
    """Rows as bench/gpu.sh collects them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = quick or device == "cpu"
    config = TINY if small else preset("qwen3-0.6b")
    model = shaped_model(config, MemorySettings("generate", dtype="float32" if device == "cpu" else "bfloat16"))
    place_(model, device)
    model.requires_grad_(False).eval()
    rows: list[Row] = []
    for n in BATCHES[:2] if small else BATCHES:
        for kind in ("rows", "pages"):
            seconds = step_seconds(model, n, in_pages=kind == "pages")
            rows.append(row(f"decode, batch {n}, {kind}: tokens a second", n / seconds, "tok/s"))
            rate = bandwidth()
            if rate is not None:
                used = step_bytes(model, n) / seconds / rate
                rows.append(row(f"decode, batch {n}, {kind}: MBU", used, ""))
    return rows


def step_seconds(model: Transformer, n: int, *, in_pages: bool) -> float:
    """Median wall time of a step with n running rows."""
    config, device = model.config, model.model.embed_tokens.weight.device
    n_bytes = 4 * n * (PROMPT + NEW + 64) * 2 * config.n_layers * config.n_kv_heads * config.d_head * 4
    engine = Engine(model, max_batch=n, cache_bytes=n_bytes if in_pages else None)
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        prompt = torch.randint(0, config.vocab_size, (PROMPT,), generator=generator).tolist()
        engine.add(prompt, Sampling(max_new_tokens=NEW))
    while engine.n_waiting or engine.n_running < n:  # the prompts
        engine.step()
    times = []
    while engine.n_running == n:
        began = time.perf_counter()
        engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:] or times)


def step_bytes(model: Transformer, n: int) -> float:
    """Bytes that a step of n rows reads at the least: weights once (a tied embedding once), keys and values of the text so far."""
    config = model.config
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    size = model.model.embed_tokens.weight.element_size()
    cache = n * (PROMPT + NEW / 2) * 2 * config.n_layers * config.n_kv_heads * config.d_head * size
    return sum(weights.values()) + cache


def bandwidth() -> float | None:
    """Bytes a second of this GPU's memory by its data sheet; None for a CPU, or one that base/plan.py doesn't list."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    return next((chip.bytes_per_s for key, chip in DEVICES.items() if key in name), None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    for one in bench(parser.parse_args().quick):
        print(f"{one['name']:60} {one['value']:12.3f} {one['unit']}")
