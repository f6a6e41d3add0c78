"""Step time and memory of fine-tuning beside TRL + PEFT, on one model in one process: `python bench/finetune.py [--real DIR]`.

LoRA of rank 16 on every linear, and QLoRA in NF4 with double quantization (TRL's through bitsandbytes on the CPU), float32,
without checkpointing: batches of rows of one length, half of it prompt. TRL runs its own loop; each of its steps is followed by
one of graft's, so that what else the machine does hits both alike. The clock is the processor time of one thread. Memory is
the highest sum of PyTorch's allocations over two steps above what was there before: activations, gradients, the optimizer's
moments and what operators take within themselves, the weights left out on both sides. The losses of both are compared.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from beside_trl import Ours, trainer_beside

from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import save_model
from graft.base.model.transformer import Transformer, initialize_
from graft.base.pretrain import with_special_ids
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.memory.measure import cpu_allocations

SMALL = {"d_model": 384, "n_layers": 6, "n_heads": 6, "n_kv_heads": 2, "d_head": 64, "d_ff": 1024}
TINY = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 16, "d_ff": 192}
BARS = {"lora": (0.85, 0.60), "qlora": (0.85, None)}  # of TRL's time, of its memory


def made_base(folder: Path, sizes: dict[str, int], vocab_size: int, seq_len: int) -> Path:
    """A random model with a tokenizer of `vocab_size` tokens trained on made-up words."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(vocab_size)]
    text = folder / "words.txt"
    text.write_text(" ".join(rng.choices(words, k=40 * vocab_size)), encoding="utf-8")
    tokenizer = Tokenizer.train([text], vocab_size=vocab_size, pattern="gpt4", special_tokens=["<|endoftext|>"])
    tokenizer.save(folder / "base")
    config = ModelConfig(tokenizer.vocab_size, **sizes, max_seq_len=2 * seq_len, qk_norm=False)  # pyright: ignore
    model = Transformer(with_special_ids(config, tokenizer))
    initialize_(model, seed=0)
    save_model(model, folder / "base")
    return folder / "base"


def rows_of(tokenizer: Tokenizer, n: int, seq_len: int) -> list[dict[str, str]]:
    """n rows of about seq_len tokens: text that encodes to itself, half a prompt, half a completion."""
    rng = random.Random(1)
    tokens = [t.decode() for t in map(tokenizer.token_bytes, range(300, tokenizer.vocab_size)) if _is_word(t)]
    half = seq_len // 2
    words = [[rng.choice(tokens) for _ in range(2 * half)] for _ in range(n)]
    return [{"prompt": "".join(row[:half]), "completion": "".join(row[half:])} for row in words]


def _is_word(token: bytes) -> bool:
    return token[:1] == b" " and token[1:].isalpha() and token.isascii()


def compare(base: Path, method: str, rounds: int, batch_size: int, seq_len: int) -> None:
    """Both libraries on one base: losses, time, memory."""
    rows = rows_of(Tokenizer.load(base), (rounds + 2) * batch_size, seq_len)
    options = {"method": method, "batch_size": batch_size, "rate": 2e-4}
    memory = {name: measured(base, rows, name, options) for name in ("graft", "TRL")}
    ours = Ours(base, rows, steps=rounds + 2, **options)
    times: dict[str, list[float]] = {"graft": [], "TRL": []}
    mine: list[float] = []
    began = [0.0]

    def before() -> None:
        began[0] = time.process_time()

    def after() -> None:
        now = time.process_time()
        times["TRL"].append(now - began[0])
        mine.append(ours.step())
        times["graft"].append(time.process_time() - now)

    trainer, theirs = trainer_beside(ours, base, steps=rounds + 2, around_step=(before, after))
    trainer.train()
    ratios = sorted(a / b for a, b in zip(times["graft"][2:], times["TRL"][2:], strict=True))
    gap = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    bar, memory_bar = BARS[method]
    deciles = statistics.quantiles(ratios, n=10, method="inclusive")
    middle = statistics.median(ratios)
    print(f"{method}: {batch_size} x {seq_len} tokens, largest gap of {len(mine)} losses {gap:.1e}")
    for name, values in times.items():
        print(f"  {name:6} {1e3 * statistics.median(values[2:]):10.1f} ms a step {memory[name] / 2**20:10.1f} MiB")
    print(f"  time    {middle:.3f} ({deciles[0]:.3f}-{deciles[-1]:.3f}) of TRL's, bar {bar}: {verdict(middle, bar)}")
    share = memory["graft"] / memory["TRL"]
    print(
        f"  memory  {share:.3f} of TRL's" + (f", bar {memory_bar}: {verdict(share, memory_bar)}" if memory_bar else "")
    )
    print(json.dumps({"method": method, "time_ratio": middle, "memory_ratio": share, "loss_gap": gap}), flush=True)


def measured(base: Path, rows: list[dict[str, str]], library: str, options: dict) -> int:
    """The highest sum of allocations of two steps, in bytes, beside the weights."""
    ours = Ours(base, rows, steps=2, **options)
    if library == "graft":
        gc.collect()
        with cpu_allocations() as peak:
            for _ in range(2):
                ours.step()
        return peak[0]
    trainer, _ = trainer_beside(ours, base, steps=2)
    del ours
    gc.collect()
    with cpu_allocations() as peak:
        trainer.train()
    return peak[0]


def verdict(value: float, bar: float) -> str:
    return "met" if value <= bar else "NOT met"


def main() -> None:
    """Parse, make the base or take the real one, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="folder of a checkpoint, in place of a model made here")
    parser.add_argument("--methods", default="lora,qlora")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, help="default: 256, with --real 128")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: does it run?")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seq_len = args.seq_len or (128 if args.real else 256)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, processor time")
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            base, seq_len, args.rounds = made_base(Path(folder), TINY, 600, 32), 32, 3
        else:
            base = args.real or made_base(Path(folder), SMALL, 8192, seq_len)
        for method in args.methods.split(","):
            compare(base, method, args.rounds, args.batch_size, seq_len)


if __name__ == "__main__":
    main()
