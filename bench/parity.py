"""LoRA by graft and by TRL's SFTTrainer with PEFT: the losses of the same steps: `python bench/parity.py --base DIR --data DIR`.

The rows are messages and labels of sms_spam (prompt and completion), or with --chat the conversations of llms_from_scratch,
both sides under graft's tagged ChatML template; --method qlora puts bitsandbytes' 4 bits beside graft's. Prints both losses
of each step, and the largest gap; fails where it is above 1e-3 (float32 sums in another order on each side).
"""

import argparse
from pathlib import Path

import torch
from beside_trl import Ours, trainer_beside
from real_tasks import TASKS, drawn

from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.data.chat import encode_whole
from graft.finetune.data.records import to_record

BAR = 1e-3


def main() -> None:
    """Parse, train graft, train TRL, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--method", choices=("lora", "qlora"), default="lora")
    parser.add_argument("--chat", action="store_true", help="conversations in place of prompts and completions")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=48, help="longer rows are left out")
    parser.add_argument("--rate", type=float, default=2e-4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(args.base)
    train, _ = TASKS["instructions" if args.chat else "spam"].rows(args.data)
    candidates = drawn(train, 4 * args.steps * args.batch_size)
    rows = [row for row in candidates if len(encode_whole(to_record(row, "row"), tokenizer).ids) <= args.max_tokens]
    options = {"method": args.method, "steps": args.steps, "batch_size": args.batch_size, "rate": args.rate}
    ours = Ours(
        args.base, rows[: args.steps * args.batch_size], chat_template="chatml" if args.chat else None, **options
    )
    trainer, theirs = trainer_beside(ours, args.base, steps=args.steps)
    mine = [ours.step() for _ in range(args.steps)]
    trainer.train()
    print("step      graft        TRL        gap")
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True), 1):
        print(f"{step:4} {a:10.6f} {b:10.6f} {a - b:10.1e}")
    gap = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    print(f"largest gap of {len(mine)} losses: {gap:.2e} (bar {BAR:g}); {mine[0]:.4f} -> {mine[-1]:.4f}")
    if not gap <= BAR:
        raise SystemExit(f"the losses differ by {gap:.2e}, expected at most {BAR:g}")


if __name__ == "__main__":
    main()
