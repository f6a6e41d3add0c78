"""DPO on real preference pairs (politeness): `python bench/align.py --preferences DIR [--real MODEL]`.

DIR holds instruction-data-with-preference.json (Apache-2.0, rasbt/LLMs-from-scratch, chapter 7): instruction, input, output,
chosen, rejected. A tenth of the distinct instructions is held out, with all their rows. Without --real the base is made here:
a tokenizer, pretraining and SFT on the training rows alone. With --real it is a chat model's folder, whose SFT others have done.
"""

import json
import random
import time
from pathlib import Path
from typing import Any

from graft.base.data.shards import prepare
from graft.base.pretrain import pretrain
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.align.run_dpo import dpo
from graft.finetune.sft import sft

FILE = "instruction-data-with-preference.json"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES: dict[str, Any] = {
    "d_model": 256, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "d_head": 32, "d_ff": 768, "max_seq_len": 256,
}  # fmt: skip
FIGURES = (
    "val_accuracy",
    "val_margin",
    "val_kl",
    "val_chosen_logp",
    "val_rejected_logp",
    "val_chosen_gain",
    "val_rejected_gain",
)


def split_rows(source: Path, folder: Path, seed: int) -> dict[str, Path]:
    """train.jsonl and held.jsonl (pairs), sft.jsonl (the training rows' own output, polite or not) and text.txt."""
    rows = json.loads((source / FILE).read_text(encoding="utf-8"))
    asked = sorted({(row["instruction"], row["input"]) for row in rows})
    random.Random(seed).shuffle(asked)
    held = set(asked[: len(asked) // 10])
    parts: dict[str, list[dict[str, str]]] = {"train": [], "held": [], "sft": []}
    for row in rows:
        prompt = {name: row[name] for name in ("instruction", "input")}
        is_held = (row["instruction"], row["input"]) in held
        parts["held" if is_held else "train"].append(prompt | {name: row[name] for name in ("chosen", "rejected")})
        if not is_held:
            parts["sft"].append(prompt | {"output": row["output"]})
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    text = folder / "text.txt"
    text.write_text("<|endoftext|>".join("\n".join(row.values()) for row in parts["sft"]), encoding="utf-8")
    print(f"{len(parts['train'])} rows to train on, {len(parts['held'])} held out")
    return {name: folder / f"{name}.jsonl" for name in parts} | {"text": text}


def make_base(files: dict[str, Path], folder: Path, seed: int) -> Path:
    """Tokenizer, pretraining and SFT on the training rows; the SFT model's folder."""
    tokenizer = Tokenizer.train([files["text"]], vocab_size=2048, pattern="gpt2", special_tokens=SPECIALS)
    tokenizer.save(folder / "tokenizer")
    prepare([files["text"]], tokenizer, folder / "tokens", val_fraction=0.05, workers=1, force=True)
    common: dict[str, Any] = {"device": "cpu", "force": True, "seed": seed}
    base = pretrain(
        data=folder / "tokens", tokenizer=folder / "tokenizer", out=folder / "base", steps=300, batch_size=8, learning_rate=2e-3,
        **SIZES, **common,
    )  # fmt: skip
    tuned = sft(base=folder / "base", data=files["sft"], out=folder / "sft", epochs=2, learning_rate=5e-4, **common)
    print(f"base made here: pretraining loss {base['train_loss']:.2f}, SFT loss {tuned['train_loss']:.2f} nats a token")
    return folder / "sft"


def preferences(source: Path, folder: Path, *, real: Path | None, steps: int | None, seed: int) -> dict[str, Any]:
    """DPO with LoRA; prints and returns the held-out figures before and after."""
    files = split_rows(source, folder, seed)
    base = real or make_base(files, folder, seed)
    rate = {"learning_rate": 5e-5, "batch_size": 8} if real else {"learning_rate": 5e-4, "batch_size": 16}
    began, wall = time.process_time(), time.perf_counter()
    summary = dpo(
        base=base, data=files["train"], eval_data=files["held"], out=folder / ("dpo-real" if real else "dpo"), device="cpu",
        force=True, rank=16, seed=seed, eval_every=20, checkpoint_every=20, keep="best", progress=True,
        **rate, **({"steps": steps} if steps else {"epochs": 1 if real else 3}),
    )  # fmt: skip
    taken = f"{time.process_time() - began:.0f} s of processor time, {time.perf_counter() - wall:.0f} s wall"
    print(
        f"{real or 'base made here'}: {summary['steps']} steps, {summary['n_pairs']} pairs, {summary['n_equal']} equal; {taken}"
    )
    for name in FIGURES:
        print(f"    {name}: {summary[name]:.3f}")
    return summary
