"""Predicted memory against a GPU's own count: `python bench/gpu_memory.py [--quick]`.

Twelve settings, each predicted before anything is allocated, then run for one step; the bar is 5%. Then the headline: a
Llama-65B-shaped model with random weights, quantized layer by layer as it streams, takes a QLoRA step (batch 1, 512 tokens,
checkpointing) under 48 GB. Needs torch, triton, numpy and safetensors. Without a GPU, or with --quick, the shapes are tiny
and the headline's bar is left out; on the CPU the count is PyTorch's own allocator's.
"""

import argparse
import gc
import time
from dataclasses import replace
from typing import Any

import torch

from graft.base.model.config import ModelConfig
from graft.base.model.presets import preset
from graft.finetune.memory.measure import cpu_allocations, measure
from graft.finetune.memory.predict import estimate
from graft.finetune.memory.settings import MemorySettings
from graft.finetune.memory.step import make_optimizer, place_, run_training_step, shaped_model
from graft.quant.linear import NF4Linear

ERROR_BAR = 5.0  # percent
HEADLINE_BAR = 48.0  # GB

ONE_B = ModelConfig(32_000, 2048, 22, 32, 4, 64, 5632, 2048, qk_norm=False, tie_embeddings=False)  # 1.1B parameters
TINY = ModelConfig(2000, 128, 3, 4, 2, 32, 384, 512, qk_norm=False, tie_embeddings=False)
CASES = [
    ("1.1B full", ONE_B, MemorySettings("full", 1, None, 1024)),
    ("1.1B full, kept activations", ONE_B, MemorySettings("full", 2, None, 512, checkpointing=False)),
    ("1.1B full, float32", ONE_B, MemorySettings("full", 1, None, 512, "float32")),
    ("1.1B full, 4 micro-batches", ONE_B, MemorySettings("full", 4, 1, 512)),
    ("1.1B LoRA", ONE_B, MemorySettings("lora", 2, None, 1024)),
    ("1.1B LoRA, kept activations", ONE_B, MemorySettings("lora", 4, None, 512, checkpointing=False)),
    ("1.1B LoRA, float32", ONE_B, MemorySettings("lora", 1, None, 1024, "float32")),
    ("1.1B QLoRA, kept activations", ONE_B, MemorySettings("qlora", 4, None, 1024, checkpointing=False)),
    ("Qwen3 1.7B QLoRA, 2,048 tokens", preset("qwen3-1.7b"), MemorySettings("qlora", 2, None, 2048)),
    ("Llama 7B QLoRA", preset("llama-7b"), MemorySettings("qlora", 1, None, 512)),
    ("Llama 7B QLoRA, no double quantization", preset("llama-7b"), MemorySettings("qlora", 4, None, 512, double_quant=False)),
    ("Llama 7B generate", preset("llama-7b"), MemorySettings("generate", 4, None, 2048)),
]  # fmt: skip


def bench(quick: bool) -> list[dict[str, Any]]:
    """Rows of name, value, unit, bar and ok, as bench/gpu.sh collects them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = quick or device == "cpu"
    rows: list[dict[str, Any]] = []
    for name, config, settings in CASES:
        if small:
            config = replace(TINY, qk_norm=config.qk_norm, tie_embeddings=config.tie_embeddings)
            settings = replace(settings, seq_len=min(settings.seq_len, 256))
        found = measure(config, settings, device=device)
        error = 100 * found.error
        print(
            f"{name:42} predicted {found.predicted.peak_bytes / 2**20:10.1f} MiB  measured "
            f"{found.measured_bytes / 2**20:10.1f} MiB  error {error:+.2f}%  {found.seconds:.1f} s",
            flush=True,
        )
        # a tiny model on a GPU is mostly workspace, whose size is the library's: no bar
        bar = None if small and device == "cuda" else ERROR_BAR
        rows.append(row(f"memory prediction error, {name}", error, "%", bar, abs(error)))
        _empty(device)
    config = replace(TINY, n_layers=5) if small else preset("llama-65b")
    predicted, built, measured = stream_and_step(config, device)
    name = "65B-shaped QLoRA step" if not small else "tiny QLoRA step, streamed"
    print(
        f"{name}: predicted {predicted / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB, while streaming {built / 1e9:.3f} GB"
    )
    error = 100 * (predicted / measured - 1)
    rows.append(row(f"{name}, peak", max(built, measured) / 1e9, "GB", None if small else HEADLINE_BAR))
    rows.append(row(f"{name}, predicted before", predicted / 1e9, "GB", None))
    rows.append(
        row(f"{name}, prediction error", error, "%", None if small and device == "cuda" else ERROR_BAR, abs(error))
    )
    return rows


def row(name: str, value: float, unit: str, bar: float | None, compared: float | None = None) -> dict[str, Any]:
    """One result; ok when what is compared is at most the bar, or there is none."""
    compared = value if compared is None else compared
    return {"name": name, "value": round(value, 4), "unit": unit, "bar": bar, "ok": bar is None or compared <= bar}


def stream_and_step(config: ModelConfig, device: str) -> tuple[int, int, int]:
    """Predict, then quantize random weights one at a time, then take a step: bytes (predicted, streaming, step)."""
    settings = MemorySettings("qlora", batch_size=1, seq_len=512, checkpointing=True)
    predicted = estimate(config, settings, device=device).peak_bytes
    model = shaped_model(config, settings)
    if device == "cpu":
        with cpu_allocations() as built:
            stream_(model, device)
        held = sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])
        with cpu_allocations() as step:
            run_training_step(model, make_optimizer(model, settings), settings, device)
        return predicted, built[0], held + step[0]
    before = _empty(device)
    began = time.perf_counter()
    stream_(model, device)
    torch.cuda.synchronize()
    print(f"streamed and quantized in {time.perf_counter() - began:.1f} s", flush=True)
    built_bytes = torch.cuda.max_memory_allocated() - before
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run_training_step(model, make_optimizer(model, settings), settings, device)
    torch.cuda.synchronize()
    print(f"one step in {time.perf_counter() - began:.1f} s", flush=True)
    return predicted, built_bytes, torch.cuda.max_memory_allocated() - before


def stream_(model: torch.nn.Module, device: str) -> None:
    """Random weights, each made in bfloat16, quantized into its layer, and dropped before the next is made."""
    for module in model.modules():
        if isinstance(module, NF4Linear):
            weight = torch.empty(module.out_features, module.in_features, dtype=torch.bfloat16, device=device)
            module.set_weight_(weight.normal_(0.0, 0.02))
            del weight
    place_(model, device)


def _empty(device: str) -> int:
    """Give back what earlier cases left; returns what is still allocated."""
    gc.collect()
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    for result in bench(parser.parse_args().quick):
        limit = "" if result["bar"] is None else f"  bar {result['bar']}: {'met' if result['ok'] else 'NOT met'}"
        print(f"{result['name']:60} {result['value']:10.3f} {result['unit']}{limit}")
