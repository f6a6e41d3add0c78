"""DPO and GRPO beside TRL's trainers on the same model and data: `python bench/align.py --dpo` or `--grpo`.

float32 on one thread, no gradient checkpointing, processor time in interleaved rounds. Memory is the most that PyTorch's CPU
allocator had out at a time (tensors; not Python, not libraries), in a run of its own.
"""

import itertools
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from align_learn import SPECIALS, write_rows

from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import save_model
from graft.base.model.transformer import Transformer, initialize_
from graft.base.pretrain import with_special_ids
from graft.base.runlog import read_metrics
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.align import run_dpo
from graft.finetune.align.run_grpo import grpo
from graft.finetune.memory.measure import cpu_allocations

N_PAIRS, RATE = 8, 2e-4
TEXT = "the cat sat on a mat and looked at the bird that sang in the tree by the river where it runs to the sea"
WORDS = TEXT.split()


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


def peak_bytes(run: Callable[[], object]) -> int:
    """The most tensor memory of a run, the model's loading included."""
    with cpu_allocations() as peak:
        run()
    return peak[0]


def compare_memory(folder: Path) -> None:
    """Peaks of two DPO steps of each."""
    make_pairs(folder, 0)
    peaks = {name: peak_bytes(lambda run=run: run(folder, 2)) for name, run in (("graft", ours), ("trl", trls))}
    said = ", ".join(f"{name} {n / 2**20:.1f} MiB" for name, n in peaks.items())
    print(f"peak memory of tensors, DPO: {said}; graft / TRL: {peaks['graft'] / peaks['trl']:.2f}")


# --- GRPO ------------------------------------------------------------------------------------------------------------

GROUP, N_PROMPTS, NEW = 8, 4, 24  # answers a prompt, prompts an update, tokens an answer


def count_vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """TRL's form of the reward that ours is given as regex:[aeiou]."""
    return [float(any(letter in text for letter in "aeiou")) for text in completions]


def our_grpo(folder: Path, steps: int) -> list[float]:
    """Seconds of processor time from the end of a step to that of the next, rollout included."""
    ends: list[float] = []
    from graft.finetune.align import run_grpo

    original = run_grpo.GRPO.complete

    def timed(self: Any, *arguments: Any) -> Any:
        ends.append(time.process_time())
        return original(self, *arguments)

    run_grpo.GRPO.complete = timed
    try:
        grpo(
            base=folder / "base", data=folder / "pairs.jsonl", rewards="regex:[aeiou]", out=folder / "ours-grpo", method="full",
            steps=steps, batch_size=GROUP * N_PROMPTS, group_size=GROUP, max_new_tokens=NEW, learning_rate=1e-6, force=True,
            warmup_steps=0, checkpoint_every=0, device="cpu",
        )  # fmt: skip
    finally:
        run_grpo.GRPO.complete = original
    return [b - a for a, b in itertools.pairwise(ends)]


def trl_grpo(folder: Path, steps: int) -> list[float]:
    """The same by trl.GRPOTrainer with its own generation."""
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    config = GRPOConfig(
        output_dir=str(folder / "trl-grpo"), use_cpu=True, per_device_train_batch_size=GROUP * N_PROMPTS, num_generations=GROUP,
        max_completion_length=NEW, max_steps=steps, learning_rate=1e-6, beta=0.0, bf16=False, report_to="none",
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, loss_type="grpo", logging_steps=1000,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
        reward_funcs=count_vowels,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "base"),
        callbacks=[Clock()],
    )
    trainer.train()
    return [b - a for a, b in itertools.pairwise(ends)]


def compare_grpo(folder: Path, *, steps: int, rounds: int, seed: int) -> None:
    """Median processor time of a step with its rollout, in interleaved rounds. The random base hardly ever ends an answer, so
    both sample about as many tokens."""
    make_pairs(folder, seed)
    seconds: dict[str, list[float]] = {"graft": [], "trl": []}
    for _ in range(rounds):
        for name, run in (("graft", our_grpo), ("trl", trl_grpo)):
            seconds[name] += run(folder, steps)[1:]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {median * 1000:.0f} ms of processor time a step of {GROUP * N_PROMPTS} answers of {NEW} tokens")
    print(f"TRL / graft: {medians['trl'] / medians['graft']:.2f}")
