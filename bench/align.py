"""Alignment, measured: a verifiable reward that teaches (--learn), and DPO beside TRL's on the same model and data (--dpo).

    python bench/align.py --learn [--out runs/align] [--steps 80] [--method grpo|ppo]
    python bench/align.py --dpo [--rounds 3] [--steps 30]

--learn makes questions for the larger of two numbers below 100, fine-tunes a model of about 1.2 million parameters on answers
of which 65% give the smaller one, and trains it with the reward `exact`. pass@1 is of sampled answers (temperature 1) to 200
questions that neither stage has seen. Then the same with the sign flipped.
--dpo compares losses step by step and processor time a step, in interleaved rounds, both in float32 on one thread.
"""

import argparse
import itertools
import json
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

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
from graft.finetune.align.sampler import Sampler
from graft.finetune.loading import load_model
from graft.finetune.sft import run_sft

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


def learn(folder: Path, *, steps: int, sft_steps: int, method: str, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Both runs' metrics; prints pass@1 before and after."""
    began, wall = time.process_time(), time.perf_counter()
    common: dict[str, Any] = {"device": "cpu", "force": True, "progress": False}
    if not (folder / "sft" / "summary.json").exists():
        make_task(folder, seed)
        rate = {"steps": sft_steps, "batch_size": 64, "learning_rate": 2e-3, "seed": seed}
        run_sft(
            base=folder / "base", data=folder / "sft.jsonl", out=folder / "sft", method="full", settings=rate, **common
        )
        print(f"SFT: {time.process_time() - began:.0f} s of processor time, {time.perf_counter() - wall:.0f} s wall")
    common.pop("progress")
    before = pass_at_1(folder)
    curves = {}
    for name, rewards, n in (("reward", "exact", steps), ("sign flipped", "-1 * exact", min(steps, 20))):
        began, wall = time.process_time(), time.perf_counter()
        run: Any = grpo
        if method == "ppo":
            from graft.finetune.align.run_ppo import ppo as run
        out = folder / name.replace(" ", "-")
        run(
            base=folder / "sft", data=folder / "train.jsonl", eval_data=folder / "held.jsonl", rewards=rewards, out=out,
            method="full", steps=n, batch_size=128, max_new_tokens=4, learning_rate=2e-4, eval_every=10,
            eval_temperature=1.0, warmup_steps=0, seed=seed, **common,
        )  # fmt: skip
        lines = read_metrics(out / "metrics.jsonl")
        curves[name] = lines
        val = [(line["step"], abs(line["val_reward.exact"])) for line in lines if "val_reward" in line]
        print(
            f"{name}: pass@1 on held-out questions {before:.3f} before, {val[-1][1]:.3f} after {val[-1][0]} steps; "
            f"{time.process_time() - began:.0f} s of processor time, {time.perf_counter() - wall:.0f} s wall"
        )
        print("   ", " ".join(f"{step}:{value:.3f}" for step, value in val))
    return curves


# --- beside TRL ----------------------------------------------------------------------------------------------------

N_PAIRS, RATE = 8, 2e-4
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "looked",
    "at",
    "the",
    "bird",
    "that",
    "sang",
    "in",
    "the",
    "tree",
    "by",
    "the",
    "river",
    "where",
    "it",
    "runs",
    "to",
    "the",
    "sea",
]


def make_pairs(folder: Path, seed: int) -> None:
    """A small base with random weights and 8 pairs of about 60 tokens: the whole set is each step's batch, so that no data
    order differs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    rows = [
        {"prompt": words(20), "chosen": " " + words(rng.randint(20, 40)), "rejected": " " + words(rng.randint(20, 40))}
        for _ in range(N_PAIRS)
    ]
    write_rows(folder / "pairs.jsonl", rows)
    text = folder / "text.txt"
    text.write_text(" ".join(" ".join(row.values()) for row in rows) * 20, encoding="utf-8")
    tokenizer = Tokenizer.train([text], vocab_size=280, pattern="gpt2", special_tokens=SPECIALS)
    config = ModelConfig(
        tokenizer.vocab_size, d_model=192, n_layers=4, n_heads=6, n_kv_heads=2, d_head=32, d_ff=512, max_seq_len=128
    )
    model = Transformer(with_special_ids(config, tokenizer))
    initialize_(model, seed=seed)
    shutil.rmtree(folder / "base", ignore_errors=True)
    save_model(model, folder / "base")
    tokenizer.save(folder / "base")


def ours(folder: Path, steps: int) -> tuple[list[float], list[float]]:
    """Losses, and seconds of processor time from the beginning of each step to that of the next."""
    from graft.finetune.align import run_dpo

    began: list[float] = []
    original = run_dpo.PreferenceObjective.loss

    def timed(self: Any, model: Any, batch: Any) -> Any:
        began.append(time.process_time())
        return original(self, model, batch)

    run_dpo.PreferenceObjective.loss = timed
    try:
        run_dpo.dpo(
            base=folder / "base", data=folder / "pairs.jsonl", out=folder / "ours", method="full", force=True, device="cpu",
            steps=steps, batch_size=N_PAIRS, learning_rate=RATE, schedule="constant", warmup_steps=0, checkpoint_every=0,
        )  # fmt: skip
    finally:
        run_dpo.PreferenceObjective.loss = original
    losses = [line["loss"] for line in read_metrics(folder / "ours" / "metrics.jsonl")]
    return losses, [b - a for a, b in itertools.pairwise(began)]


def trls(folder: Path, steps: int) -> tuple[list[float], list[float]]:
    """The same by trl.DPOTrainer, reference log-probabilities computed beforehand too."""
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    began: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            began.append(time.process_time())

    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    config = DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, per_device_train_batch_size=N_PAIRS, max_steps=steps, beta=0.1,
        learning_rate=RATE, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, bf16=False,
        report_to="none", save_strategy="no", logging_steps=1, precompute_ref_log_probs=True, disable_tqdm=True,
        gradient_checkpointing=False, max_length=128,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "base"),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, [b - a for a, b in itertools.pairwise(began)]


def compare_dpo(folder: Path, *, steps: int, rounds: int, seed: int) -> None:
    """Losses step by step, and the median processor time of a step of each, in interleaved rounds."""
    make_pairs(folder, seed)
    seconds: dict[str, list[float]] = {"graft": [], "trl": []}
    losses = {}
    for _ in range(rounds):
        for name, run in (("graft", ours), ("trl", trls)):
            losses[name], taken = run(folder, steps)
            seconds[name] += taken[2:]
    gap = max(abs(a - b) for a, b in zip(losses["graft"], losses["trl"], strict=True))
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    print(
        f"loss after {steps} steps: graft {losses['graft'][-1]:.6f}, TRL {losses['trl'][-1]:.6f}; largest gap {gap:.1e}"
    )
    for name, median in medians.items():
        low, *_, high = statistics.quantiles(seconds[name], n=10)
        print(
            f"{name}: {median * 1000:.1f} ms of processor time a step (10-90%: {low * 1000:.1f} to {high * 1000:.1f})"
        )
    print(f"TRL / graft: {medians['trl'] / medians['graft']:.2f}")


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """pass@1 by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, lines in curves.items():
        val = [(line["step"], line["val_reward.exact"]) for line in lines if "val_reward" in line]
        axes.plot(*zip(*val, strict=True), marker="o", label=f"{name}, held out")
        axes.plot([line["step"] for line in lines], [line["reward.exact"] for line in lines], alpha=0.3)
    axes.set_xlabel("step (128 sampled answers each)")
    axes.set_ylabel("pass@1")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--dpo", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/align"))
    parser.add_argument("--method", choices=["grpo", "ppo"], default="grpo")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sft-steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.learn:
        curves = learn(
            options.out,
            steps=options.steps or 80,
            sft_steps=options.sft_steps,
            method=options.method,
            seed=options.seed,
        )
        if options.picture:
            draw(curves, options.picture)
    if options.dpo:
        compare_dpo(options.out, steps=options.steps or 30, rounds=options.rounds, seed=options.seed)


if __name__ == "__main__":
    main()
