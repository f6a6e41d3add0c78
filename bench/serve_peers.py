"""The peers of bench/serve.py: transformers' continuous batching, and llama.cpp."""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graft.base.generate.engine import generate_ids
from graft.base.generate.sampling import Sampling
from graft.base.model.transformer import Transformer
from graft.base.tokenizer.tokenizer import Tokenizer


def spread(ratios: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def bench_transformers(base: Path, model: Transformer, prompts: list[list[int]], options: argparse.Namespace) -> None:
    """Processor time of transformers' generate_batch over the engine's, the same prompts at once, greedy, equal ids."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    peer: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa").eval()
    if not hasattr(peer, "generate_batch"):
        print("transformers: this version has no continuous batching (generate_batch)", flush=True)
        return
    settings = GenerationConfig(max_new_tokens=options.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    ratios = []
    for i in range(options.rounds + 1):
        seconds, ids = {}, {}
        for name in ("graft", "transformers") if i % 2 else ("transformers", "graft"):
            began = time.process_time()
            if name == "graft":
                ids[name] = generate_ids(model, prompts, Sampling(max_new_tokens=options.tokens))
            else:
                found = peer.generate_batch(inputs=prompts, generation_config=settings, progress_bar=False)
                ids[name] = [each.generated_tokens for each in found.values()]
            seconds[name] = time.process_time() - began
        if not all(ids.values()) or sorted(ids["transformers"]) != sorted(ids["graft"]):
            print("transformers: generate_batch gave other ids than graft, whose are generate's (bench/decode.py)")
        if i:
            ratios.append(seconds["transformers"] / seconds["graft"])
    print(f"transformers' continuous batching, batch {len(prompts)}: graft is {spread(ratios)} as fast", flush=True)


def bench_llama_cpp(
    files: Sequence[Path], model: Transformer, tokenizer: Tokenizer, options: argparse.Namespace
) -> None:
    """Wall time of decoding with llama.cpp over the engine's, batch 1, 2 threads each."""
    if importlib.util.find_spec("llama_cpp") is None:
        print(
            "llama.cpp: llama-cpp-python is not installed (no wheel on the registry; it builds with a compiler and cmake)"
        )
        return
    if not files:
        print("llama.cpp: give the same weights as GGUF files with --gguf, once for each type")
        return
    from llama_cpp import Llama

    prompt = torch.randint(0, 1000, (32,), generator=torch.Generator().manual_seed(5)).tolist()
    torch.set_num_threads(2)
    for file in files:
        peer = Llama(str(file), n_threads=2, n_ctx=1024, verbose=False)
        ratios = []
        for i in range(options.rounds + 1):
            seconds = {}
            for name in ("graft", "llama.cpp") if i % 2 else ("llama.cpp", "graft"):
                began = time.perf_counter()
                if name == "graft":
                    generate_ids(model, [prompt], Sampling(max_new_tokens=options.tokens))
                else:
                    peer.reset()
                    for _, _ in zip(range(options.tokens), peer.generate(prompt, temp=0.0), strict=False):
                        pass
                seconds[name] = time.perf_counter() - began
            if i:
                ratios.append(seconds["llama.cpp"] / seconds["graft"])
        print(f"llama.cpp, {file.name}, 2 threads: graft in float32 is {spread(ratios)} as fast", flush=True)
    torch.set_num_threads(1)
