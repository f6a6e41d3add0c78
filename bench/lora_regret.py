"""The claims of "LoRA Without Regret" (Schulman et al. 2025) on a tiny base: `python bench/lora_regret.py --base DIR --data DIR`.

    rates      LoRA's best learning rate over full fine-tuning's (the article: about ten times)
    placement  all layers, attention alone and MLP alone at an equal number of trained parameters (all >= MLP > attention)
    capacity   ranks by numbers of training rows, beside full fine-tuning (a low rank falls behind on much data)
    batch      LoRA beside full fine-tuning by batch size, on the same rows (LoRA suffers more from large batches)

Each cell fine-tunes DIR on multi30k, English to German, one pass of constant rate, and is scored by the loss of 500
held-out sentences in nats a token. Cells are kept in OUT and not run again. `rates` is run first: the other three take its best.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from real_tasks import drawn, translation_rows

from graft.base.checkpoint import write_file, write_json
from graft.base.json_fields import read_json
from graft.base.model.huggingface import load_config
from graft.finetune.sft import run_sft

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
RATES = {"lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "full": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
RANK, BATCH, N_ROWS = 8, 16, 3200
N_TEST = 500
Cell = Callable[..., float]


def numbers_a_rank(base: Path, targets: tuple[str, ...]) -> int:
    """Trained numbers that one rank costs on the targets of a layer: inputs and outputs of each linear."""
    c = load_config(base)
    q, kv = c.n_heads * c.d_head, c.n_kv_heads * c.d_head
    sides = {
        "q_proj": c.d_model + q, "k_proj": c.d_model + kv, "v_proj": c.d_model + kv, "o_proj": q + c.d_model,
        "gate_proj": c.d_model + c.d_ff, "up_proj": c.d_model + c.d_ff, "down_proj": c.d_ff + c.d_model,
    }  # fmt: skip
    return sum(sides[name] for name in targets)


def rates(cell: Cell) -> dict[str, float]:
    """The best rate of each method, and the losses of all."""
    best = {}
    for method, tried in RATES.items():
        losses = {rate: cell(method, rate=rate) for rate in tried}
        best[method] = min(losses, key=lambda rate: losses[rate])
        print(f"rates, {method}: " + ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in losses.items()))
        if best[method] in (tried[0], tried[-1]):
            print(f"  the best of {method} lies at the end of what was tried")
    print(f"  LoRA's best rate is {best['lora'] / best['full']:.3g} times full fine-tuning's")
    return best


def placement(cell: Cell, base: Path, rate: float) -> None:
    """All layers against a part of them, ranks chosen so that the numbers trained are equal."""
    budget = RANK * numbers_a_rank(base, ATTENTION + MLP)
    for name, targets in (("all layers", ATTENTION + MLP), ("attention", ATTENTION), ("MLP", MLP)):
        rank = round(budget / numbers_a_rank(base, targets))
        losses = {factor * rate: cell("lora", rate=factor * rate, rank=rank, targets=targets) for factor in (0.5, 1, 2)}
        found = min(losses.values())
        print(f"placement, {name}, rank {rank} ({rank * numbers_a_rank(base, targets):,} numbers a layer): {found:.4f}")


def capacity(cell: Cell, best: dict[str, float]) -> None:
    """Ranks by rows; a pass over the rows each."""
    for n_rows in (400, 1600, 12_800):
        full = cell("full", rate=best["full"], n_rows=n_rows)
        found = {rank: cell("lora", rate=best["lora"], rank=rank, n_rows=n_rows) for rank in (1, 4, 16)}
        above = ", ".join(f"rank {rank} {loss - full:+.4f}" for rank, loss in found.items())
        print(f"capacity, {n_rows:,} rows: full {full:.4f}; LoRA above it: {above}")


def batch(cell: Cell, best: dict[str, float]) -> None:
    """Larger batches of the same rows, the better of two rates each (the rate grows by the root of the batch, or stays)."""
    for size in (8, 32, 128):
        found = {
            method: min(
                cell(method, rate=best[method] * factor, batch_size=size) for factor in (1.0, (size / BATCH) ** 0.5)
            )
            for method in ("lora", "full")
        }
        gap = found["lora"] - found["full"]
        print(f"batch {size}: LoRA {found['lora']:.4f}, full {found['full']:.4f}, LoRA above it {gap:+.4f}")


def main() -> None:
    """Run the cells that are not there yet, print the four tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a small base, such as the demo's (runs/demo/base)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/lora_regret"))
    parser.add_argument("--seeds", default="0", help="comma-separated; losses are means over them")
    parser.add_argument("--only", default="rates,placement,capacity,batch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    train, test = translation_rows(args.data)
    write_file(args.out / "test.jsonl", "".join(json.dumps(row) + "\n" for row in drawn(test, N_TEST)))

    def cell(
        method: str, *, rate: float, rank: int = RANK, targets: tuple[str, ...] = ("all-linear",), n_rows: int = N_ROWS,
        batch_size: int = BATCH,
    ) -> float:  # fmt: skip
        settings: dict[str, Any] = {
            "learning_rate": rate, "batch_size": batch_size, "epochs": 1, "schedule": "constant", "warmup_steps": 0,
            "checkpoint_every": 0,
        }  # fmt: skip
        if method == "lora":
            settings |= {"rank": rank, "alpha": 32.0, "targets": targets}  # alpha as in the article, whatever the rank
        rows = args.out / f"train-{n_rows}.jsonl"
        if not rows.exists():
            write_file(rows, "".join(json.dumps(row) + "\n" for row in drawn(train, n_rows)))
        losses = []
        for seed in seeds:
            parts = (method, f"{rate:g}", rank, "+".join(targets), n_rows, batch_size, seed)
            kept = args.out / f"{'_'.join(map(str, parts))}.json"
            if not kept.exists():
                folder = args.out / "run"
                summary = run_sft(
                    base=args.base, data=rows, eval_data=args.out / "test.jsonl", out=folder, method=method,
                    settings=settings | {"seed": seed}, force=True, progress=False,
                )  # fmt: skip
                write_json(kept, {"val_loss": summary["val_loss"], "settings": settings})
                shutil.rmtree(folder)
            losses.append(read_json(kept)["val_loss"])
        return sum(losses) / len(losses)

    best = rates(cell)
    asked = args.only.split(",")
    steps = {
        "placement": lambda: placement(cell, args.base, best["lora"]),
        "capacity": lambda: capacity(cell, best),
        "batch": lambda: batch(cell, best),
    }
    for name, run in steps.items():
        if name in asked:
            run()


if __name__ == "__main__":
    main()
