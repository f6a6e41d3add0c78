"""Critical batch size: the noise scale that a run measures beside the measured knee, on tiny_shakespeare by characters.

    python bench/noise_scale.py --text ../shared/data/tiny_shakespeare/input.txt.gz

For each batch size the fewest steps S to a held-out loss, over a few rates. arXiv:1812.06162, equation 2.11, with E = S * B:
S = S_min (1 + B_crit / B), a straight line in 1 / B whose slope over its height at 0 is the knee B_crit. Beside it the noise
scale of the largest batch's run, from its micro-batches, over the steps before the loss is reached. About 8 minutes alone.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from mup import BASE, read_ids, windows

from graft.base.loss import n_labels, next_token_loss
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.precision import LossScaler
from graft.base.run import TrainConfig
from graft.base.training.noise import critical_batch
from graft.base.training.optimizers import make_optimizer
from graft.base.training.result import noise_of
from graft.base.training.step import one_step


def steps_to(
    data: tuple[torch.Tensor, torch.Tensor, int],
    rows: int,
    rate: float,
    *,
    target: float,
    limit: int,
    width: int,
) -> tuple[float, float | None]:
    """Steps to the held-out loss (infinite above the limit), and the noise scale in labels where the step has micro-batches."""
    train, held_out, vocab = data
    model = Transformer(replace(BASE, vocab_size=vocab, d_model=width, d_ff=5 * width // 2))
    initialize_(model, seed=0)
    micro = max(1, rows // 4)
    every = 1 if micro < rows else 0
    config = TrainConfig(
        steps=limit,
        batch_size=rows,
        micro_batch=micro,
        learning_rate=rate,
        schedule="constant",
        noise_scale_every=every,
    )
    optimizer = make_optimizer(model.named_parameters(), config, roles=parameter_roles(model))
    test, scaler, noise = windows(held_out, 64, 0), LossScaler("float32"), []
    checked, before = max(1, limit // 60), (0, float("inf"))
    for step in range(limit):
        batch = windows(train, rows, step)
        parts = [{name: t[i : i + micro] for name, t in batch.items()} for i in range(0, rows, micro)]
        line = one_step(model, optimizer, parts, config, scaler, step, next_token_loss, n_labels, "cpu")
        noise += noise_of(line)
        if (step + 1) % checked == 0:
            with torch.no_grad():
                loss = float(next_token_loss(model, test)) / n_labels(test)
            if loss <= target:  # between this check and the one before, by a straight line
                share = (before[1] - target) / (before[1] - loss) if np.isfinite(before[1]) else 1.0
                return before[0] + share * (step + 1 - before[0]), critical_batch(noise)
            before = step + 1, loss
    return float("inf"), critical_batch(noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], help="Sequences of 64 a step.")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--target", type=float, default=2.1, help="Nats a character on held-out text.")
    parser.add_argument("--limit", type=int, default=1500, help="Steps of the smallest batch at most.")
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    data = read_ids(args.text)
    points, scales = [], {}
    for rows in args.rows:
        limit = max(60, args.limit * args.rows[0] // rows * 4)
        tried = [
            (*steps_to(data, rows, rate, target=args.target, limit=min(limit, args.limit), width=args.width), rate)
            for rate in args.rates
        ]
        steps, scale, rate = min(tried, key=lambda one: one[0])
        told = "" if scale is None else f"  noise scale {scale:,.0f} labels"
        print(f"{rows:4} rows, {64 * rows:6,} labels a step: {steps:7.1f} steps at rate {rate}{told}", flush=True)
        if np.isfinite(steps):
            points.append((64 * rows, steps))
            scales[64 * rows] = scale
    if len(points) < 3:
        print("fewer than three batch sizes reached the target; raise --target or --limit")
        return
    inverse, steps = 1 / np.array([b for b, _ in points]), np.array([s for _, s in points])
    weights = 1 / steps  # relative errors are alike
    slope, height = np.polyfit(inverse, steps, 1, w=weights)
    measured = scales[points[-1][0]]
    print(f"fewest steps {height:.0f}; measured knee {slope / height:,.0f} labels a step")
    if measured is not None:
        print(f"noise scale of the largest batch {measured:,.0f} labels: {measured * height / slope:.2f} of the knee")


if __name__ == "__main__":
    main()
