"""Best learning rate at widths 64, 128 and 256, with muP and without it: tiny_shakespeare by characters, float32, AdamW.

    python bench/mup.py --text ../shared/data/tiny_shakespeare/input.txt.gz

Prints the held-out loss of every width and rate, the best rate of each width (vertex of the parabola through the lowest three, in
log rate) and how far the best rates of the widths lie apart. About 7 minutes alone on 2 cores with the default sizes.
"""

import argparse
import gzip
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from graft.base.loss import next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.optim.clip import clip_gradients_
from graft.base.optim.schedule import learning_rate_at
from graft.base.run import TrainConfig
from graft.base.training.optimizers import make_optimizer

BASE = ModelConfig(1, d_model=64, n_layers=2, n_heads=2, n_kv_heads=2, d_head=32, d_ff=160, max_seq_len=64)


def read_ids(path: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The text's characters as ids: the first 90%, the rest, and how many different ones there are."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[letter] for letter in text])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], len(letters)


def windows(ids: torch.Tensor, rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Random windows, the same for a seed."""
    starts = torch.randint(len(ids) - 65, (rows,), generator=torch.Generator().manual_seed(seed))
    both = torch.stack([ids[start : start + 65] for start in starts])
    return {"ids": both[:, :-1].contiguous(), "targets": both[:, 1:].contiguous()}


def final_loss(
    data: tuple[torch.Tensor, torch.Tensor, int],
    width: int,
    rate: float,
    *,
    mup: bool,
    steps: int,
    rows: int,
    optimizer: str,
    seed: int,
) -> float:
    """Held-out loss in nats a character after `steps` of a linear decay to zero; infinite when it diverged."""
    train, held_out, vocab = data
    config = replace(BASE, vocab_size=vocab, d_model=width, n_heads=width // 32, n_kv_heads=width // 32)
    config = replace(config, d_ff=BASE.d_ff * width // BASE.d_model)
    ratio = width / BASE.d_model if mup else 1.0
    model = Transformer(config)
    initialize_(model, seed=seed, width_ratio=ratio)
    settings = TrainConfig(steps=steps, optimizer=optimizer, learning_rate=rate)
    made = make_optimizer(model.named_parameters(), settings, roles=parameter_roles(model), width_ratio=ratio)
    for step in range(steps):
        loss = next_token_loss(model, windows(train, rows, 1000 * seed + step)) / (rows * 64)
        if not torch.isfinite(loss):
            return float("inf")
        loss.backward()
        clip_gradients_([p for _, p in made.named], 1.0)
        made.step(
            learning_rate_at(
                step, schedule="linear", peak=rate, warmup_steps=steps // 10, total_steps=steps, final_fraction=0.0
            )
        )
        made.zero_grad()
    with torch.no_grad():
        return float(next_token_loss(model, windows(held_out, 256, 0))) / (256 * 64)


def best_rate(rates: list[float], losses: list[float]) -> float:
    """The vertex of the parabola through the lowest loss and its neighbours, in log rate; at an end the end itself."""
    i = int(np.argmin(losses))
    if not 0 < i < len(rates) - 1 or not np.isfinite(losses[i - 1 : i + 2]).all():
        return rates[i]
    a, b, _ = np.polyfit(np.log(rates[i - 1 : i + 2]), losses[i - 1 : i + 2], 2)
    return float(np.exp(-b / (2 * a)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[2.0**-i for i in range(10, 3, -1)]
    )  # 1e-3 ... 6e-2, each twice
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    data, began = read_ids(args.text), time.perf_counter()
    figures: dict[str, dict[int, list[float]]] = {}
    for mup in (True, False):
        name = "muP" if mup else "without"
        best = []
        for width in args.widths:
            losses = [
                float(
                    np.mean(
                        [
                            final_loss(
                                *(data, width, rate),
                                **{"mup": mup, "steps": args.steps, "rows": args.rows, "optimizer": args.optimizer},
                                seed=seed,
                            )
                            for seed in range(args.seeds)
                        ]
                    )
                )
                for rate in args.rates
            ]
            figures.setdefault(name, {})[width] = losses
            best.append(best_rate(args.rates, losses))
            told = "  ".join(f"{loss:.3f}" for loss in losses)
            print(f"{name:8} width {width:4}  best rate {best[-1]:.4f}  losses {told}", flush=True)
        print(f"{name:8} largest / smallest best rate: {max(best) / min(best):.2f}")
    print(f"rates {' '.join(f'{rate:.4f}' for rate in args.rates)}; {time.perf_counter() - began:.0f} s")
    if args.out:
        args.out.write_text(json.dumps({"rates": args.rates, "losses": figures}, indent=1))


if __name__ == "__main__":
    main()
