"""Greedy decoding beside transformers' generate: the same weights, the same prompts, the same ids, interleaved rounds.

    python bench/decode.py [--rounds 9] [--batches 1,8] [--family qwen3|llama]

Processor time of one thread. Prints the median of each round's ratio with its 10th and 90th percentile, and the number of
operators in one decoding step of each side.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graft.base.generate.engine import generate_ids
from graft.base.generate.sampling import Sampling
from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import save_model
from graft.base.model.transformer import Transformer, initialize_

PROMPT, NEW = 32, 96


def operators_a_step(run: Callable[[int], object]) -> float:
    """PyTorch operators of one more new token, those that operators call included: the difference of two profiled runs."""
    counts = []
    for new in (10, 20):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(new)
        counts.append(sum(event.count for event in profile.key_averages() if event.key.startswith("aten::")))
    return (counts[1] - counts[0]) / 10


def by_graft(model: Transformer, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    return generate_ids(model, prompts, Sampling(max_new_tokens=new))


def by_transformers(model: Any, ids: torch.Tensor, new: int = NEW) -> list[list[int]]:
    with torch.inference_mode():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None
        )
    return made[:, ids.shape[1] :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--family", choices=("qwen3", "llama"), default="qwen3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    config = ModelConfig(
        8192, d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, d_head=64, d_ff=1024, max_seq_len=512,
        qk_norm=options.family == "qwen3", init_std=0.05,
    )  # fmt: skip
    ours = Transformer(config).eval()
    initialize_(ours, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, Path(folder))
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    peer.generation_config.pad_token_id = 0
    for batch in map(int, options.batches.split(",")):
        ids = torch.randint(0, 8192, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
        prompts = ids.tolist()

        graft_side, peer_side = partial(by_graft, ours, prompts), partial(by_transformers, peer, ids)
        assert graft_side() == peer_side(), "the two sides wrote different ids"
        ratios, best = [], {"graft": [], "transformers": []}
        for i in range(options.rounds):
            times = {}
            order = [("graft", graft_side), ("transformers", peer_side)]
            for name, side in order if i % 2 else order[::-1]:
                began = time.process_time()
                side()
                times[name] = time.process_time() - began
                best[name].append(times[name])
            ratios.append(times["transformers"] / times["graft"])
        ratios.sort()
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        tokens = batch * NEW
        speed = {name: tokens / statistics.median(found) for name, found in best.items()}
        print(
            f"{options.family} batch {batch}: {statistics.median(ratios):.2f}x transformers' speed ({low:.2f}-{high:.2f}); "
            f"graft {speed['graft']:.0f} tokens/s, {operators_a_step(graft_side):.0f} operators a step; "
            f"transformers {speed['transformers']:.0f} tokens/s, {operators_a_step(peer_side):.0f}"
        )


if __name__ == "__main__":
    main()
