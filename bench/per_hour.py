"""What a recipe learns in a given time: `python bench/per_hour.py OUT --minutes 20 --threads 2 --seeds 3`.

The same text (../shared/data: TinyStories and children's tales, 6 MB, a tokenizer of 4096 trained here), the same held-out
documents, the same time of training; reported are bits per byte of all held-out text. Arms:

    graft      our recipe: Muon and AdamW by role, WSD to zero, RMSNorm, RoPE, QK norm, SwiGLU, GQA, documents packed best-fit
    nanogpt    nanoGPT's: GPT-2's shape, AdamW (0.9, 0.99), decay 0.1, 5% warm-up and cosine to a tenth (its settings for CPUs)
    nanochat   nanochat's of October 2025: its shape, Muon at 0.02 with AdamW at 0.2 and 0.004, no warm-up, the last fifth
               linear to zero
    and graft with one thing changed: adamw, soap, cosine, stream, moe (8 experts, 2 a token, as many active weights), dense_wide

Time is processor time of the training steps, minutes x threads, not wall time: a machine that does other work then gives
about the same figures (caches and clock still suffer; measure alone). A step made before the clock starts compiles what is
compiled. The rate follows the share of the time that is used, so every arm ends its schedule. Both peers run with graft's
batches, optimizers and clipping and with torch's operators in their models; the rates of each arm are multiplied by --factors,
all of them are run, and the best is compared. Every cell is a line of OUT/cells.jsonl and is not run again.

    python bench/per_hour.py OUT --shakespeare      tiny_shakespeare by characters at nanoGPT's size for CPUs (4 layers of 128,
                                                    context 64, batch 12, 2000 steps; its README: loss 1.88), equal tokens

There the tokens are bytes without merges: the text has 65 different ones, the others never occur and cost nothing once learned.
"""

import argparse
import gzip
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from per_hour_models import GPT2Shape, NanochatShape, check_gpt2
from torch import nn

from graft.base.data.batches import WindowBatches, evaluation_batches
from graft.base.data.shards import open_tokens, prepare
from graft.base.data.windows import make_windows
from graft.base.evaluate import bits_per_byte, mean_loss
from graft.base.loss import n_labels, next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.optim.adamw import AdamW
from graft.base.optim.clip import clip_gradients_
from graft.base.optim.muon import UPDATE_RMS, Muon
from graft.base.optim.schedule import learning_rate_at
from graft.base.run import TrainConfig
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.base.training.optimizers import make_optimizer

EOT = "<|endoftext|>"
VOCAB = 4096
TICKS = 100_000  # of the schedule, which is a function of whole steps
CURVE = (0.25, 0.5, 0.75)  # shares of the time after which an arm is evaluated too


@dataclass(frozen=True)
class Cell:
    """One run: what, on what, for how long."""

    arm: str
    seed: int
    factor: float  # times the arm's rates
    d_model: int
    n_layers: int
    seq_len: int
    batch_size: int
    threads: int
    minutes: float | None  # of wall time, if the machine did nothing else; None: `max_steps`
    max_steps: int | None = None
    eval_batches: int | None = None  # of 32 windows; None: all held-out text

    @property
    def budget_s(self) -> float:
        """Processor time of training, in seconds."""
        return math.inf if self.minutes is None else 60 * self.minutes * self.threads


@dataclass
class Recipe:
    """A model, its optimizer, and the rate as a function of the share of the run."""

    model: nn.Module
    optimizer: Any
    rate: Callable[[float], float]
    windows: str = "stream"
    before_step: Callable[[int], None] = lambda step: None


# --- arms ----------------------------------------------------------------------------------------------------------


def schedule(peak: float, **how: Any) -> Callable[[float], float]:
    """A schedule over the share of the run; `warmup` is a share too."""
    warmup = round(TICKS * how.pop("warmup"))
    return lambda share: learning_rate_at(
        min(TICKS - 1, int(share * TICKS)), peak=peak, warmup_steps=warmup, total_steps=TICKS, **how
    )


GRAFT: dict[str, dict[str, Any]] = {  # what differs from our recipe
    "graft": {},
    "adamw": {"optimizer": "adamw", "learning_rate": 3e-3},
    "soap": {"optimizer": "soap", "learning_rate": 3e-3},
    "cosine": {"schedule": "cosine"},
    "stream": {"windows": "stream"},
    "masked": {"document_mask": True},
    "moe": {"n_experts": 8, "n_experts_per_token": 2},
    "dense_wide": {"d_ff": 2},
}


def graft_recipe(cell: Cell, vocab_size: int) -> Recipe:
    """Our recipe, or one with one thing changed."""
    change = dict(GRAFT[cell.arm])
    d_ff = change.pop("d_ff", 1) * 8 * round(cell.d_model / 3)
    experts = {name: change.pop(name) for name in list(change) if name.startswith("n_experts")}
    if experts:
        experts["d_expert"] = d_ff // experts["n_experts_per_token"]
    n_heads = max(2, cell.d_model // 32)
    model_config = ModelConfig(
        vocab_size,
        d_model=cell.d_model,
        n_layers=cell.n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads // 2,
        d_head=32,
        d_ff=d_ff,
        max_seq_len=cell.seq_len,
        **experts,
    )
    windows, _ = change.pop("windows", "best_fit"), change.pop("document_mask", None)
    how = {"optimizer": "muon", "learning_rate": 1e-2, "schedule": "wsd", "final_lr_fraction": 0.0} | change
    config = TrainConfig(**how, decay_fraction=0.4, warmup_steps=0.02, weight_decay=0.1)
    model = Transformer(model_config)
    initialize_(model, seed=cell.seed)
    optimizer = make_optimizer(model.named_parameters(), config, roles=parameter_roles(model))
    rate = schedule(
        config.learning_rate * cell.factor,
        warmup=0.02,
        schedule=config.schedule,
        final_fraction=config.final_lr_fraction,
        decay_fraction=config.decay_fraction,
    )
    return Recipe(model, optimizer, rate, windows)


def nanogpt_recipe(cell: Cell, vocab_size: int) -> Recipe:
    """config/train_shakespeare_char.py of nanoGPT with the README's settings for CPUs: no dropout there."""
    n_heads = max(2, cell.d_model // 32)
    model = GPT2Shape(vocab_size, cell.d_model, cell.n_layers, n_heads, cell.seq_len, cell.seed)
    optimizer = AdamW(model.named_parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    return Recipe(model, optimizer, schedule(1e-3 * cell.factor, warmup=0.05, schedule="cosine", final_fraction=0.1))


def nanochat_recipe(cell: Cell, vocab_size: int) -> Recipe:
    """nanochat's groups through graft's Muon, whose update of (out, in) is 0.2 sqrt(max(out, in)) times orthogonal where
    nanochat's is sqrt(max(1, out / in))."""
    n_heads = max(2, cell.d_model // 32)
    model = NanochatShape(vocab_size, cell.d_model, cell.n_layers, n_heads, cell.seq_len, cell.seed)
    matrix, width = 0.02, (cell.d_model / 768) ** -0.5
    adam = {"wte.weight": 0.2 * width / matrix, "head.weight": 0.004 * width / matrix}

    def rate_of(name: str, parameter: torch.Tensor) -> float:
        rows, columns = parameter.shape
        return adam.get(name) or max(1.0, rows / columns) ** 0.5 / (UPDATE_RMS * max(rows, columns) ** 0.5)

    optimizer = Muon(
        model.named_parameters(),
        betas=(0.8, 0.95),
        eps=1e-10,
        weight_decay=0.0,
        rate=rate_of,
        hidden=lambda name, _: name not in adam,
        polynomial="jordan",
        iterations=5,
    )

    def warm_momentum(step: int) -> None:
        optimizer.momentum = 0.85 + 0.1 * min(1.0, step / 300)

    rate = schedule(matrix * cell.factor, warmup=0.0, schedule="wsd", final_fraction=0.0, decay_fraction=0.2)
    return Recipe(model, optimizer, rate, before_step=warm_momentum)


def recipe_of(cell: Cell, vocab_size: int) -> Recipe:
    """The cell's arm. Raises ValueError for one that there isn't."""
    others = {"nanogpt": nanogpt_recipe, "nanochat": nanochat_recipe}
    if cell.arm in GRAFT:
        return graft_recipe(cell, vocab_size)
    if cell.arm not in others:
        raise ValueError(f"unknown arm {cell.arm!r}; choose {', '.join([*GRAFT, *others])}")
    return others[cell.arm](cell, vocab_size)


# --- text ----------------------------------------------------------------------------------------------------------


def documents(shared: Path) -> Iterator[str]:
    """Stories; where a file has no separator between them, stretches of paragraphs of about a story's length."""
    yield from _read(shared / "tinystories/tinystories_10k.txt.gz").split(EOT)
    for name, separator, least in (
        ("tinystories/tiny_stories.txt.gz", "\n\n", 800),
        ("tinystories/tinystories_val.txt.gz", "\n\n", 800),
        ("childrens_stories/stories.txt.gz", "\n", 3000),
    ):
        stretch = ""
        for paragraph in _read(shared / name).split(separator):
            stretch += paragraph + separator
            if len(stretch) >= least:
                yield stretch
                stretch = ""
        yield stretch


def _read(file: Path) -> str:
    return gzip.decompress(file.read_bytes()).decode("utf-8")


def prepared(out: Path, shared: Path, *, shakespeare: bool) -> Path:
    """The folder with text, tokenizer and shards; made once."""
    folder = out / ("shakespeare" if shakespeare else "stories")
    if (folder / "tokens/meta.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if shakespeare:
        text = _read(shared / "tiny_shakespeare/input.txt.gz")
    else:
        text = EOT.join(one.strip() for one in documents(shared) if one.strip())
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.train([folder / "text.txt"], vocab_size=257 if shakespeare else VOCAB)
    tokenizer.save(folder / "tokenizer")
    prepare([folder / "text.txt"], tokenizer, folder / "tokens", val_fraction=0.1 if shakespeare else 0.05, seed=0)
    return folder


# --- a run ---------------------------------------------------------------------------------------------------------


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train one cell and evaluate it."""
    torch.set_num_threads(cell.threads)
    train, val = open_tokens(folder / "tokens"), open_tokens(folder / "tokens", "val")
    vocab_size = train.meta["vocab_size"]
    held_out = evaluation_batches(val, seq_len=cell.seq_len, batch_size=32, n_batches=cell.eval_batches or len(val))

    def evaluate() -> tuple[float, float]:
        recipe.model.eval()
        loss = mean_loss(recipe.model, held_out)
        recipe.model.train()
        return loss, bits_per_byte(loss, n_tokens=len(val), n_bytes=val.n_bytes)

    def batches_of(recipe: Recipe) -> WindowBatches:
        windows = make_windows(recipe.windows, train, seq_len=cell.seq_len, seed=cell.seed)
        mask = bool(GRAFT.get(cell.arm, {}).get("document_mask"))
        return WindowBatches([windows], batch_size=cell.batch_size, micro_batch=cell.batch_size, document_mask=mask)

    trial = recipe_of(cell, vocab_size)
    for step in range(2):  # what is compiled at first use
        _step(trial, batches_of(trial), step, 0.0)
    recipe = recipe_of(cell, vocab_size)
    batches = batches_of(recipe)
    n_params = sum(parameter.numel() for parameter in recipe.model.parameters())
    used, step, curve, began = 0.0, 0, [], time.perf_counter()
    while used < cell.budget_s and step != cell.max_steps:
        share = used / cell.budget_s if cell.max_steps is None else step / cell.max_steps
        if len(curve) < len(CURVE) and share >= CURVE[len(curve)]:
            curve.append([round(share, 3), round(evaluate()[1], 4)])
        before = time.process_time()
        _step(recipe, batches, step, share)
        used += time.process_time() - before
        step += 1
    loss, bpb = evaluate()
    n_tokens = step * cell.batch_size * cell.seq_len
    figures = {
        **{"val_bits_per_byte": bpb, "val_loss": loss, "steps": step, "tokens": n_tokens, "n_params": n_params},
        **{"epochs": round(step * cell.batch_size / batches.sources[0].n_windows, 2), "curve": curve},
        **{"processor_s": round(used, 1), "wall_s": round(time.perf_counter() - began, 1), "torch": torch.__version__},
    }
    return vars(cell) | figures


def _step(recipe: Recipe, batches: WindowBatches, step: int, share: float) -> None:
    recipe.before_step(step)
    [batch] = batches.batch_at(step)
    loss = next_token_loss(recipe.model, batch) / n_labels(batch)
    loss.backward()
    if not math.isfinite(float(loss.detach())):
        raise ValueError(f"step {step + 1}: the loss is {float(loss.detach())}; lower --factors")
    clip_gradients_([parameter for _, parameter in recipe.optimizer.named], 1.0)
    recipe.optimizer.step(recipe.rate(share))
    recipe.optimizer.zero_grad()


def known_cells(file: Path) -> list[dict[str, Any]]:
    """The cells of earlier calls; a line that a kill cut is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append_line(file: Path, line: str) -> None:
    """Add a line that is on the disk when this returns, after a line that a kill cut."""
    is_cut = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as log:
        log.write(("\n" if is_cut else "") + line + "\n")
        log.flush()
        os.fsync(log.fileno())


# --- the table -----------------------------------------------------------------------------------------------------


def print_table(cells: list[dict[str, Any]], first: str) -> None:
    """Mean and standard error over seeds of each arm at its best factor; differences to `first`, paired by seed."""
    by_arm: dict[str, dict[float, dict[int, dict[str, Any]]]] = {}
    for cell in cells:
        by_arm.setdefault(cell["arm"], {}).setdefault(cell["factor"], {})[cell["seed"]] = cell
    best = {}
    for arm, factors in by_arm.items():
        means = {
            factor: statistics.mean(c["val_bits_per_byte"] for c in seeds.values()) for factor, seeds in factors.items()
        }
        best[arm] = min(means, key=lambda factor: means[factor])
        others = ", ".join(f"x{factor:g} {mean:.4f}" for factor, mean in sorted(means.items()))
        print(f"{arm:11} rates: {others}")
    print(
        f"\n{'arm':11} {'bits/byte':>16} {'loss':>7} {'steps':>7} {'epochs':>7} {'params':>10}   less than {first}'s, paired"
    )
    for arm, factor in best.items():
        seeds = by_arm[arm][factor]
        bits = [cell["val_bits_per_byte"] for cell in seeds.values()]
        one = next(iter(seeds.values()))
        line = f"{arm:11} {spread(bits):>16} {statistics.mean(c['val_loss'] for c in seeds.values()):7.4f} {one['steps']:7,}"
        line += f" {one['epochs']:7.2f} {one['n_params']:10,}"
        if first in best and arm != first:
            peers = by_arm[first][best[first]]
            pairs = [
                peers[seed]["val_bits_per_byte"] - seeds[seed]["val_bits_per_byte"] for seed in seeds if seed in peers
            ]
            line += f"   {spread(pairs)}" if pairs else ""
        print(line)


def spread(values: list[float]) -> str:
    """Mean +- standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} +- {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the tokens and the results")
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--arms", default="graft,nanogpt,nanochat", help=f"{', '.join(GRAFT)}, nanogpt, nanochat")
    parser.add_argument("--minutes", type=float, default=20.0, help="of every cell, times --threads of processor time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--factors", default="1", help="each arm's rates times these, for example 0.5,1,2")
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--shakespeare", action="store_true", help="bytes of tiny_shakespeare, equal tokens")
    parser.add_argument("--steps", type=int, default=2000, help="with --shakespeare")
    parser.add_argument(
        "--eval-batches", type=int, help="for a try: so many of 32 windows; all held-out text if not given"
    )
    arguments = parser.parse_args()
    check_gpt2()
    folder = prepared(arguments.out, arguments.shared, shakespeare=arguments.shakespeare)
    base = Cell("", 0, 1.0, arguments.d_model, arguments.layers, arguments.seq_len, arguments.batch_size,
                arguments.threads, arguments.minutes, eval_batches=arguments.eval_batches)  # fmt: skip
    if arguments.shakespeare:
        base = replace(
            base, d_model=128, n_layers=4, seq_len=64, batch_size=12, minutes=None, max_steps=arguments.steps
        )
    results = folder / "cells.jsonl"
    settings = list(vars(base))
    for seed in range(arguments.seeds):
        for factor in map(float, arguments.factors.split(",")):
            for arm in arguments.arms.split(","):
                cell = replace(base, arm=arm, seed=seed, factor=factor)
                if any(all(known.get(key) == vars(cell)[key] for key in settings) for known in known_cells(results)):
                    continue
                found = run(cell, folder)
                append_line(results, json.dumps(found))
                print(f"{arm} seed {seed} x{factor:g}: {found['val_bits_per_byte']:.4f} bits a byte, loss {found['val_loss']:.4f}, "
                      f"{found['steps']:,} steps, {found['processor_s']:.0f} s of processor time")  # fmt: skip
    fixed = {key: value for key, value in vars(base).items() if key not in ("arm", "seed", "factor")}
    print_table([c for c in known_cells(results) if all(c.get(k) == v for k, v in fixed.items())], "nanogpt")


if __name__ == "__main__":
    main()
