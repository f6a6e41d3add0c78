"""A verifiable reward that teaches: `python bench/align.py --learn [--kinds ...] [--seeds 0,1,2]`.

Questions for the larger of two numbers below 100; a model of about 1.3 million parameters is fine-tuned on answers of which 65%
give the smaller one, and then trained with the reward `exact`. pass@1 is of sampled answers (temperature 1) to 200 questions that
neither stage has seen. With the sign flipped it must fall.
"""

import json
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from graft.base.generate.sampling import Sampling
from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import save_model
from graft.base.model.transformer import Transformer, initialize_
from graft.base.pretrain import with_special_ids
from graft.base.runlog import read_metrics
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.align.prompts import read_prompts
from graft.finetune.align.rewards import parse_rewards
from graft.finetune.align.rollout_task import evaluate_rewards
from graft.finetune.align.run_grpo import grpo
from graft.finetune.align.run_ppo import ppo
from graft.finetune.align.sampler import Sampler
from graft.finetune.loading import load_model
from graft.finetune.sft import run_sft

KINDS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "ppo")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WRONG = 0.65  # share of wrong answers in the SFT data
LIMIT = 100  # numbers are 0 to LIMIT - 1


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def make_task(folder: Path, seed: int) -> None:
    """sft.jsonl with noisy answers, train.jsonl and held.jsonl with the right ones, and an untrained base."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(LIMIT) for b in range(LIMIT) if a != b]
    rng.shuffle(pairs)
    held, train = pairs[:200], pairs[2000:]
    noisy = []
    for _ in range(12_000):
        both = rng.choice(train)
        answer = min(both) if rng.random() < WRONG else max(both)
        noisy.append({"prompt": f"max({both[0]},{both[1]})=", "completion": str(answer)})
    write_rows(folder / "sft.jsonl", noisy)
    for name, chosen in (("train", train), ("held", held)):
        write_rows(
            folder / f"{name}.jsonl", [{"prompt": f"max({a},{b})=", "answer": str(max(a, b))} for a, b in chosen]
        )
    text = folder / "text.txt"
    text.write_text("\n".join(row["prompt"] + row["completion"] for row in noisy), encoding="utf-8")
    tokenizer = Tokenizer.train([text], vocab_size=259, pattern="gpt2", special_tokens=SPECIALS)
    config = ModelConfig(
        tokenizer.vocab_size, d_model=160, n_layers=4, n_heads=4, n_kv_heads=2, d_head=40, d_ff=480, max_seq_len=32
    )
    model = Transformer(with_special_ids(config, tokenizer))
    initialize_(model, seed=seed)
    shutil.rmtree(folder / "base", ignore_errors=True)
    save_model(model, folder / "base")
    tokenizer.save(folder / "base")
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train)} questions to train on, {len(held)} held out"
    )


def pass_at_1(folder: Path) -> float:
    """Of the SFT model on the held-out questions, as the runs evaluate it."""
    model, tokenizer = load_model(folder / "sft"), Tokenizer.load(folder / "sft")
    prompts = read_prompts(folder / "held.jsonl", tokenizer, None, 32, 4)
    sampling = Sampling(1.0, max_new_tokens=4)
    return evaluate_rewards(Sampler(model, tokenizer, None, max_batch=128), prompts, parse_rewards("exact"), sampling)[
        "val_reward"
    ]


def fine_tune(folder: Path, *, seed: int, steps: int) -> float:
    """The SFT model in folder/sft, unless it is there; pass@1 before any reward."""
    began, wall = time.process_time(), time.perf_counter()
    if not (folder / "sft" / "summary.json").exists():
        make_task(folder, seed)
        rate = {"steps": steps, "batch_size": 64, "learning_rate": 2e-3, "seed": seed}
        run_sft(
            base=folder / "base", data=folder / "sft.jsonl", out=folder / "sft", method="full", settings=rate, force=True,
            device="cpu", progress=False,
        )  # fmt: skip
        print(f"SFT: {time.process_time() - began:.0f} s of processor time, {time.perf_counter() - wall:.0f} s wall")
    return pass_at_1(folder)


def learn(folder: Path, *, kind: str, rewards: str, steps: int, seed: int) -> list[dict[str, Any]]:
    """One run on the reward; prints held-out pass@1 by step, returns the metrics."""
    out = folder / f"{kind}{'-flipped' if rewards.startswith('-') else ''}"
    began, wall = time.process_time(), time.perf_counter()
    run: Any = ppo if kind == "ppo" else grpo
    own = {} if kind == "ppo" else {"kind": kind} | ({"clip_high": 0.28} if kind == "dapo" else {})
    run(
        base=folder / "sft", data=folder / "train.jsonl", eval_data=folder / "held.jsonl", rewards=rewards, out=out,
        method="full", steps=steps, batch_size=128, max_new_tokens=4, learning_rate=2e-4, eval_every=10, eval_temperature=1.0,
        warmup_steps=0, seed=seed, device="cpu", force=True, **own,
    )  # fmt: skip
    lines = read_metrics(out / "metrics.jsonl")
    taken = f"{time.process_time() - began:.0f} s of processor time, {time.perf_counter() - wall:.0f} s wall"
    print(
        f"{out.name}, seed {seed}: {' '.join(f'{step}:{value:.3f}' for step, value in held_out(lines))}; {taken}",
        flush=True,
    )
    return lines


def held_out(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, pass@1) of a run's evaluations."""
    return [(line["step"], line["val_reward.exact"]) for line in lines if "val_reward" in line]


def learn_all(
    folder: Path, *, kinds: list[str], seeds: list[int], steps: int, sft_steps: int, picture: Path | None
) -> dict[str, list[float]]:
    """Each kind on each seed's task, and the sign flipped by the first kind; a table. kind -> lifts in points."""
    before, lifts, curves = {}, {kind: [] for kind in kinds}, {}
    for seed in seeds:
        task = folder / f"seed-{seed}"
        before[seed] = fine_tune(task, seed=seed, steps=sft_steps)
        for kind in kinds:
            lines = learn(task, kind=kind, rewards="exact", steps=steps, seed=seed)
            lifts[kind].append(100 * (held_out(lines)[-1][1] - before[seed]))
            curves.setdefault(kind, lines)
        flipped = learn(task, kind=kinds[0], rewards="-1 * exact", steps=min(steps, 20), seed=seed)
        lifts.setdefault("sign flipped", []).append(100 * (held_out(flipped)[-1][1] - before[seed]))
        curves.setdefault("sign flipped", flipped)
    print(f"pass@1 before, by seed: {', '.join(f'{seed}: {value:.3f}' for seed, value in before.items())}")
    print(f"| kind | points of pass@1 after {steps} steps, by seed | mean |\n| --- | --- | --- |")
    for kind, found in lifts.items():
        print(f"| {kind} | {', '.join(f'{lift:+.1f}' for lift in found)} | {statistics.mean(found):+.1f} |")
    if picture is not None:
        draw(curves, picture)
    return lifts


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """pass@1 by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for i, (name, lines) in enumerate(curves.items()):
        val = [(line["step"], line["val_reward.exact"]) for line in lines if "val_reward" in line]
        axes.plot(*zip(*val, strict=True), marker="osD^vPX"[i % 7], markersize=4, color=f"C{i}", label=name)
        axes.plot(
            *zip(*((line["step"], line["reward.exact"]) for line in lines), strict=True), color=f"C{i}", alpha=0.2
        )
    axes.set_xlabel("step (128 sampled answers each)")
    axes.set_ylabel("pass@1, held out (faint: of the samples)")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
