"""Three tasks' adapters on a real checkpoint, trained together and alone, then merged in 16 and in 4 bits:
`python bench/real_adapters.py --base DIR --tasks runs/demo/data [--steps 10]`.

DIR is a Hugging Face folder in float32 or bfloat16, --tasks a folder of task folders with train.jsonl and eval.jsonl, as
`graft demo` writes them. Prints the largest difference of the losses, and KL(merged || unmerged) on each task's held-out rows.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

import graft
from graft.base.model.huggingface import save_model
from graft.base.runlog import read_metrics
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.adapters.merge import run_merge
from graft.finetune.folders import carry_over
from graft.finetune.loading import load_model

SETTINGS = {"rank": 8, "learning_rate": 1e-4, "max_seq_len": 96, "on_too_long": "cut", "warmup_steps": 0}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def in_bfloat16(base: Path, out: Path) -> Path:
    """The base in 16 bits."""
    save_model(load_model(base), out, dtype="bfloat16")
    Tokenizer.load(base).save(out)
    carry_over(base, out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = sorted(path.name for path in args.tasks.iterdir() if (path / "train.jsonl").exists())[:3]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        common = SETTINGS | {"steps": args.steps, "batch_size": args.batch_size}
        jobs = [{**common, "data": args.tasks / name / "train.jsonl", "out": root / "many" / name, "seed": i}
                for i, name in enumerate(names)]  # fmt: skip
        began = time.process_time()
        graft.sft_many(base=args.base, jobs=jobs, device="cpu")
        together_s = time.process_time() - began
        began = time.process_time()
        for job in jobs:
            graft.sft(base=args.base, method="lora", device="cpu", **(job | {"out": root / "alone" / job["out"].name}))
        print(f"together {together_s:.0f} s, alone {time.process_time() - began:.0f} s of processor time, one thread")
        for name in names:
            many, alone = losses(root / "many" / name), losses(root / "alone" / name)
            worst = max(abs(a - b) for a, b in zip(many, alone, strict=True))
            print(
                f"{name}: loss {alone[0]:.4f} -> {alone[-1]:.4f} alone; trained together at most {worst:.1e} from that"
            )
        half = in_bfloat16(args.base, root / "bfloat16")
        graft.quantize(base=args.base, out=root / "nf4")
        for label, base in (("float32", args.base), ("bfloat16", half), ("4 bits", root / "nf4")):
            for name in names:
                made = root / "many" / name
                (made / "graft.json").unlink(missing_ok=True)  # the fingerprint is the float32 base's
                text = args.tasks / name / "eval.jsonl"
                _, drift = run_merge(base, made, root / "merged", text=text, force=True, allow_drift=True)
                print(f"{name} merged in {label}: {drift.sentence()}", flush=True)


if __name__ == "__main__":
    main()
