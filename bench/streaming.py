"""Peak memory of graft sft on a large file: rows in memory against streaming=true, each in a process of its own.

    python bench/streaming.py [--mb 200]

Prints the file's size, the records, and for both ways the peak resident memory above that of the same run on a file of two
records, and the processor seconds. Losses must be equal.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = ("the", "cat", "sat", "on", "mat", "and", "looked", "at", "bird", "while", "rivers", "run", "to", "wide", "sea")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--child", nargs=4, metavar=("BASE", "DATA", "OUT", "STREAMING"))
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        work = Path(folder)
        make_base(work)
        n = write_rows(work / "rows.jsonl", options.mb << 20)
        write_rows(work / "few.jsonl", 1)
        print(f"{(work / 'rows.jsonl').stat().st_size / 1e6:.0f} MB, {n:,} records")
        found = {}
        for name in ("few", "rows"):
            for streaming in ("true", "false"):
                command = [
                    __file__,
                    "--child",
                    str(work / "base"),
                    str(work / f"{name}.jsonl"),
                    str(work / f"{name}-{streaming}"),
                ]
                done = subprocess.run([sys.executable, *command, streaming], capture_output=True, text=True, check=True)
                found[name, streaming] = json.loads(done.stdout.splitlines()[-1])
        assert found["rows", "true"]["loss"] == found["rows", "false"]["loss"]
        for streaming in ("true", "false"):
            more = found["rows", streaming]["peak_mb"] - found["few", streaming]["peak_mb"]
            print(
                f"streaming={streaming}: {more:,.0f} MB, {found['rows', streaming]['seconds']:.0f} s of processor time"
            )


def make_base(work: Path) -> None:
    """A base of one layer with a context of 2,048 tokens: what is measured is the data."""
    from graft.base.model.config import ModelConfig
    from graft.base.model.huggingface import save_model
    from graft.base.model.transformer import Transformer, initialize_
    from graft.base.pretrain import with_special_ids
    from graft.base.tokenizer.tokenizer import Tokenizer

    (work / "text.txt").write_text(" ".join(WORDS) * 50)
    tokenizer = Tokenizer.train([work / "text.txt"], vocab_size=300, special_tokens=["<|endoftext|>"])
    config = ModelConfig(
        tokenizer.vocab_size, 16, n_layers=1, n_heads=1, n_kv_heads=1, d_head=16, d_ff=32, max_seq_len=2048
    )
    model = Transformer(with_special_ids(config, tokenizer))
    initialize_(model, seed=0)
    save_model(model, work / "base")
    tokenizer.save(work / "base")


def write_rows(path: Path, n_bytes: int) -> int:
    """Records of about 4 KB until the file has so many bytes, two at least; returns how many."""
    rng, n = random.Random(0), 0
    with path.open("w") as file:
        while file.tell() < n_bytes or n < 2:
            file.write(json.dumps({"prompt": f"{n}:", "completion": " ".join(rng.choices(WORDS, k=900))}) + "\n")
            n += 1
    return n


def child(base: str, data: str, out: str, streaming: str) -> None:
    """One run of two updates in this process."""
    from graft.finetune.sft import run_sft

    settings = {"steps": 2, "batch_size": 2, "streaming": streaming == "true"}
    summary = run_sft(base=base, data=data, out=out, settings=settings, device="cpu", progress=False)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = usage.ru_utime + usage.ru_stime
    print(json.dumps({"peak_mb": usage.ru_maxrss / 1e3, "seconds": seconds, "loss": summary["train_loss"]}))


if __name__ == "__main__":
    main()
