"""K adapters trained at once beside the ceiling, one adapter trained on all their rows, and beside K separate steps:
`python bench/many.py [--quick] [--rounds N] [--rows k8 k32 long memory equal sweep1 sweep16 halving] [--base DIR --data sms.tsv]`.

k8, k32, long: a step is forward, backward, clipping and AdamW, rank 16 on every linear, of a base of 12.6 M parameters with random
weights (the demo's sizes). Processor time of one thread, interleaved; medians and 10th to 90th percentiles of a round's ratios.
memory: what PyTorch's allocator had out at most in a step of 8 adapters, beside one and beside the prediction.
equal: the losses of 100 steps of 8 unlike jobs against their solo runs. sweep1, sweep16, halving: a grid of 16 on sms_spam with
batches of 1 and of 16 rows against 16 runs. These four need a base folder (such as runs/demo/base) and the sms_spam file, and count
all but the predictions, which both sides would make.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import graft
from graft.base.loss import next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import IGNORE, Transformer, initialize_
from graft.base.optim.adamw import AdamW
from graft.base.optim.clip import clip_gradients_
from graft.base.runlog import read_metrics
from graft.finetune import sft
from graft.finetune.adapters.lora import LoraConfig, attach_lora
from graft.finetune.adapters.selection import registry_of
from graft.finetune.adapters.stacked import AdapterStack, StackRow
from graft.finetune.many import run
from graft.finetune.many.batch import together, weighted_loss
from graft.finetune.many.predict import Load, Plan, Shared, attach_all, micro_batch_of, predict_bytes, update_all
from graft.finetune.many.sweep import run_sweep, say_value, trials_of
from graft.finetune.memory.measure import cpu_allocations
from graft.finetune.memory.step import place_, shaped_model
from graft.quant.linear import quantize_linears_

BASE = ModelConfig(
    vocab_size=8192, d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, d_head=64, d_ff=1024, max_seq_len=256
)
QUICK = ModelConfig(
    vocab_size=256, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_head=32, d_ff=128, max_seq_len=256
)
LORA = LoraConfig(rank=16, alpha=32)
ROWS = [
    ("k8", 8, 32, 1.12, "K = 8, 1 row of 32 tokens each"),
    ("k32", 32, 32, 1.15, "K = 32, the same"),
    ("long", 8, 128, 1.05, "K = 8, 128 tokens"),
]
OTHERS = ("memory", "equal", "sweep1", "sweep16", "halving")
GRID = {"learning_rate": [1e-4, 3e-4, 1e-3, 3e-3], "rank": [4, 8, 16, 32]}


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
        stack.clip_([1.0] * n_jobs)
        with stack.updating():
            for row in rows:
                row.step(1e-4)
                row.zero_grad()

    return step


def step_rows(config: ModelConfig, rounds: int, nf4: bool, wanted: list[str]) -> None:
    """k8, k32 and long."""
    for name, n_jobs, length, bar, label in ROWS:
        if name not in wanted:
            continue
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, config.vocab_size, (n_jobs, length + 1), generator=generator)
        parts = [{"ids": row[None, :-1].contiguous(), "targets": row[None, 1:].contiguous()} for row in rows]
        whole = {key: torch.cat([part[key] for part in parts]) for key in ("ids", "targets")}
        alone, many = one_adapter(config, nf4), many_adapters(config, n_jobs, nf4)
        candidates: dict[str, Callable[[], object]] = {
            "ceiling": lambda whole=whole, alone=alone: alone(whole),
            "many": lambda parts=parts, many=many: many(parts),
            "separate": lambda parts=parts, alone=alone: [alone(part) for part in parts],
        }
        times = interleaved(candidates, rounds)
        ratios = [a / b for a, b in zip(times["many"], times["ceiling"], strict=True)]
        gains = [a / b for a, b in zip(times["separate"], times["many"], strict=True)]
        limits = [a / b for a, b in zip(times["separate"], times["ceiling"], strict=True)]
        deciles = statistics.quantiles(ratios, n=10, method="inclusive")
        middle = {key: statistics.median(values) for key, values in times.items()}
        print(
            f"{label}: {middle['many']:.1f} ms, ceiling {middle['ceiling']:.1f} ms, ratio {statistics.median(ratios):.3f} "
            f"({deciles[0]:.3f}-{deciles[-1]:.3f}), bar {bar}: {'met' if statistics.median(ratios) <= bar else 'NOT met'}; "
            f"{statistics.median(gains):.2f}x of separate steps ({middle['separate']:.1f} ms; the ceiling is "
            f"{statistics.median(limits):.2f}x)",
            flush=True,
        )


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time of each, in turns, after two to warm up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 2):
        for name, step in candidates.items():
            start = time.process_time()
            step()
            if turn >= 2:
                times[name].append(1e3 * (time.process_time() - start))
    return times


def memory(config: ModelConfig) -> None:
    """One step of K jobs of 32 tokens, from nothing, by the allocator and by the prediction."""
    for method in ("lora", "qlora"):
        measured, said = {}, []
        for n_jobs in (1, 8):
            loads, shared = [Load(LORA, 1, 32)] * n_jobs, Shared(method)
            predicted = predict_bytes(config, loads, shared, device="cpu")
            measured[n_jobs] = measured_bytes(config, loads, shared)
            error = predicted / measured[n_jobs] - 1
            said.append(f"K = {n_jobs}: {measured[n_jobs] / 2**20:.2f} MiB, predicted {error:+.2%}")
        print(f"memory, {method}: {'; '.join(said)}, bar 1%; {measured[8] / measured[1]:.2f}x of one", flush=True)


def measured_bytes(config: ModelConfig, loads: list[Load], shared: Shared) -> int:
    """The most that PyTorch's CPU allocator had out in a step of these jobs."""
    with cpu_allocations() as peak:
        model = shaped_model(config, shared.settings(), bare=True)
        place_(model, "cpu")
        stack, rows = attach_all(model, loads, [str(i) for i in range(len(loads))])
        batch, counts = together([micro_batch_of(load) for load in loads], packed=True)
        with stack.training(counts):
            weighted_loss(model, batch, torch.full((sum(counts),), 1e-3))[0].backward()
        update_all(stack, rows)
    return peak[0]


# --- whole runs on a base folder -----------------------------------------------------------------------------------


def write_records(tsv: Path, folder: Path) -> tuple[Path, Path]:
    """sms_spam as prompts and completions: 2,000 rows to train on, 64 held out."""
    lines = [line.split("\t", 1) for line in tsv.read_text(encoding="utf-8").splitlines() if "\t" in line]
    rows = [{"prompt": f"Message: {text[:200]}\nLabel:", "completion": f" {label}"} for label, text in lines]
    found = []
    for name, part in (("train", rows[:2000]), ("eval", rows[2000:2064])):
        found.append(folder / f"{name}.jsonl")
        found[-1].write_text("\n".join(json.dumps(row) for row in part), encoding="utf-8")
    return found[0], found[1]


def without_predictions() -> None:
    """Predictions of memory and time take a second or two; they are left out on both sides."""
    sft.print_prediction = lambda *args, **options: 0  # pyright: ignore[reportAttributeAccessIssue]
    run.plan_jobs = lambda config, ready, **how: Plan(  # pyright: ignore[reportAttributeAccessIssue]
        len(ready), how["at_once"] or len(ready), "cpu", 0, 0.0, 0.0, 1
    )


def equal(base: Path, train: Path, root: Path, steps: int) -> None:
    """8 unlike jobs together, and each alone."""
    jobs = [
        {"data": train, "out": root / "together" / str(i), "seed": i, "steps": steps, "rank": 2 + 2 * i, "batch_size": 1 + i % 3,
         "learning_rate": 1e-3 / (1 + i), "warmup_steps": i}
        for i in range(8)
    ]  # fmt: skip
    graft.sft_many(base=base, jobs=jobs, device="cpu")
    worst = 0.0
    for job in jobs:
        alone = root / "alone" / job["out"].name
        graft.sft(base=base, method="lora", device="cpu", **(job | {"out": alone}))
        pairs = zip(*(read_metrics(folder / "metrics.jsonl") for folder in (job["out"], alone)), strict=True)
        worst = max(worst, *(abs(one["loss"] - other["loss"]) for one, other in pairs))
    verdict = "met" if worst <= 1e-4 else "NOT met"
    print(
        f"equal: losses of {steps} steps of 8 jobs, at most {worst:.1e} from solo runs', bar 1e-4: {verdict}",
        flush=True,
    )


def sweep(
    base: Path, records: tuple[Path, Path], root: Path, *, batch_size: int, steps: int, halving: bool, bar: float | None
) -> None:
    """The grid at once against a run for each of its trials."""
    train, held_out = records
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "eval_every": 0, "warmup_steps": 2}
    began = time.process_time()
    report = run_sweep(
        base=base, data=train, eval_data=held_out, out=root / "sweep", grid=GRID, settings=settings, halving=halving,
        device="cpu", progress=False, force=True,
    )  # fmt: skip
    taken = time.process_time() - began
    began = time.process_time()
    losses = {}
    for trial in trials_of(GRID):
        name = ",".join(f"{key}={say_value(value)}" for key, value in trial.items())
        found = graft.sft(base=base, data=train, eval_data=held_out, out=root / "runs" / name, method="lora", device="cpu",
                          force=True, **settings, **trial)  # fmt: skip
        losses[name] = found["val_loss"]
    apart = time.process_time() - began
    ratio, best = taken / apart, min(losses, key=lambda name: losses[name])
    verdict = "" if bar is None else f", bar {bar}: {'met' if ratio <= bar else 'NOT met'}"
    print(
        f"sweep of 16, batches of {batch_size}{', halving' if halving else ''}: {taken:.1f} s against {apart:.1f} s, {ratio:.3f}x"
        f"{verdict}; the best is {report['best']} ({'the runs agree' if best == report['best'] else f'of the runs {best}'})",
        flush=True,
    )


def whole_runs(args: argparse.Namespace, wanted: list[str]) -> None:
    """equal, sweep1, sweep16 and halving."""
    if args.base is None or args.data is None:
        raise SystemExit(f"{wanted[0]} needs --base DIR and --data sms.tsv")
    without_predictions()
    short = 4 if args.quick else 1
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        records = write_records(args.data, root)
        for name in wanted:
            if name == "equal":
                equal(args.base, records[0], root / name, 100 // short)
            else:
                size, steps, bar = {"sweep1": (1, 64, 0.5), "sweep16": (16, 16, None), "halving": (1, 64, 0.35)}[name]
                sweep(
                    args.base,
                    records,
                    root / name,
                    batch_size=size,
                    steps=steps // short,
                    halving=name == "halving",
                    bar=bar,
                )


def main() -> None:
    names = [*(name for name, *_ in ROWS), *OTHERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny base and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--nf4", action="store_true", help="the base in 4 bits")
    parser.add_argument("--rows", nargs="+", choices=names, help="which rows; all that the other options allow")
    parser.add_argument("--base", type=Path, help="a base folder, such as runs/demo/base")
    parser.add_argument("--data", type=Path, help="sms_spam's file of label, tab, message")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config, rounds = (QUICK, 3) if args.quick else (BASE, args.rounds)
    wanted = args.rows or [name for name in names if args.base or name not in OTHERS[1:]]
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, {rounds} rounds")
    step_rows(config, rounds, args.nf4, wanted)
    if "memory" in wanted:
        memory(config)
    if runs := [name for name in OTHERS[1:] if name in wanted]:
        whole_runs(args, runs)


if __name__ == "__main__":
    main()
