"""K adapters trained at once beside the ceiling, one adapter trained on all their rows, and beside K separate steps:
`python bench/many.py [--quick] [--rounds N]`.

A step is forward, backward, clipping and AdamW, rank 16 on every linear, of a base of 12.6 M parameters with random weights (the
demo's sizes). Processor time of one thread, interleaved; medians and 10th to 90th percentiles of the same rounds' ratios.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from graft.base.loss import next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import IGNORE, Transformer, initialize_
from graft.base.optim.adamw import AdamW
from graft.base.optim.clip import clip_gradients_
from graft.finetune.adapters.lora import LoraConfig, attach_lora
from graft.finetune.adapters.selection import registry_of
from graft.finetune.adapters.stacked import AdapterStack, StackRow
from graft.finetune.many import together, weighted_loss
from graft.quant.linear import quantize_linears_

BASE = ModelConfig(
    vocab_size=8192, d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, d_head=64, d_ff=1024, max_seq_len=256
)
QUICK = ModelConfig(
    vocab_size=256, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_head=32, d_ff=128, max_seq_len=256
)
LORA = LoraConfig(rank=16, alpha=32)
ROWS = [
    (8, 32, 1.12, "K = 8, 1 row of 32 tokens each"),
    (32, 32, 1.15, "K = 32, the same"),
    (8, 128, 1.05, "K = 8, 128 tokens"),
]


def base_model(config: ModelConfig, nf4: bool) -> Transformer:
    """The frozen base."""
    model = Transformer(config)
    initialize_(model, seed=0)
    if nf4:
        quantize_linears_(model)
    model.requires_grad_(False)
    return model.train()


def one_adapter(config: ModelConfig, nf4: bool) -> Callable[[dict[str, torch.Tensor]], None]:
    """A step of one adapter as `graft sft` makes it."""
    model = base_model(config, nf4)
    attach_lora(model, LORA)
    optimizer = AdamW([(name, p) for name, p in model.named_parameters() if p.requires_grad])

    def step(batch: dict[str, torch.Tensor]) -> None:
        loss = next_token_loss(model, batch) / int((batch["targets"] != IGNORE).sum())
        loss.backward()
        clip_gradients_([p for _, p in optimizer.named], 1.0)
        optimizer.step(1e-4)
        optimizer.zero_grad()

    return step


def many_adapters(config: ModelConfig, n_jobs: int, nf4: bool) -> Callable[[list[dict[str, torch.Tensor]]], None]:
    """A step of K adapters as `graft sft --jobs` makes it."""
    model = base_model(config, nf4)
    names = [f"job{i}" for i in range(n_jobs)]
    for i, name in enumerate(names):
        attach_lora(model, LORA, seed=i, name=name)
    registry_of(model).default = None
    stack = AdapterStack(model, names, [torch.Generator() for _ in names])
    rows = [StackRow(stack, name, "default", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1) for name in names]

    def step(parts: list[dict[str, torch.Tensor]]) -> None:
        batch, counts = together(parts, packed=True)
        labels = torch.tensor([float((part["targets"] != IGNORE).sum()) for part in parts])
        job_of = torch.repeat_interleave(torch.arange(n_jobs), torch.tensor(counts))
        with stack.training(counts):
            total, losses = weighted_loss(model, batch, (1 / labels)[job_of])
            total.backward()
        torch.zeros(n_jobs).index_add_(0, job_of, losses).tolist()
        norms = stack.norms()
        factors = (1.0 / (norms + 1e-6)).clamp(max=1.0)
        stack.buffers["gradients"] *= factors[:, None]
        norms.tolist()
        for row in rows:
            row.step(1e-4)
            row.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny base and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--nf4", action="store_true", help="the base in 4 bits")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config, rounds = (QUICK, 3) if args.quick else (BASE, args.rounds)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, {rounds} rounds")
    for n_jobs, length, bar, label in ROWS:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, config.vocab_size, (n_jobs, length + 1), generator=generator)
        parts = [{"ids": row[None, :-1].contiguous(), "targets": row[None, 1:].contiguous()} for row in rows]
        whole = {name: torch.cat([part[name] for part in parts]) for name in ("ids", "targets")}
        alone, many = one_adapter(config, args.nf4), many_adapters(config, n_jobs, args.nf4)
        candidates: dict[str, Callable[[], object]] = {
            "ceiling": lambda whole=whole, alone=alone: alone(whole),
            "many": lambda parts=parts, many=many: many(parts),
            "separate": lambda parts=parts, alone=alone: [alone(part) for part in parts],
        }
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for turn in range(rounds + 2):
            for name, run in candidates.items():
                start = time.process_time()
                run()
                if turn >= 2:
                    times[name].append(1e3 * (time.process_time() - start))
        ratios = [a / b for a, b in zip(times["many"], times["ceiling"], strict=True)]
        gains = [a / b for a, b in zip(times["separate"], times["many"], strict=True)]
        deciles = statistics.quantiles(ratios, n=10, method="inclusive")
        middle = {name: statistics.median(values) for name, values in times.items()}
        print(
            f"{label}: {middle['many']:.1f} ms, ceiling {middle['ceiling']:.1f} ms, ratio {statistics.median(ratios):.3f} "
            f"({deciles[0]:.3f}-{deciles[-1]:.3f}), bar {bar}: {'met' if statistics.median(ratios) <= bar else 'NOT met'}; "
            f"{statistics.median(gains):.2f}x of separate steps ({middle['separate']:.1f} ms)"
        )


if __name__ == "__main__":
    main()
