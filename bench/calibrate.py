"""Calibrated NF4 beside plain NF4 on held-out text, at the same bytes:
`python bench/calibrate.py --base DIR --calibrate TEXT --held-out TEXT [--rows 128] [--tokens 20000]`.

Prints the mean loss of the base in full precision, in NF4 (double quantization) and in NF4 with codes chosen on the first text,
and the ratio of the two gaps with its standard error over the held-out rows. Texts may be gzipped; --held-out may also be a folder
of token shards, whose validation split is read (`graft demo` leaves runs/demo/data/tokens).
"""

import argparse
import gzip
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import graft
from graft.base.data.shards import open_tokens
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.loading import load_model

BAR = 0.65


def text_of(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def held_out_rows(path: Path, tokenizer: Tokenizer, length: int, n_tokens: int) -> Tensor:  # (rows, length + 1)
    """Rows from all over the text."""
    if path.is_dir():
        shards = open_tokens(path, "val")
        ids = shards[0 : len(shards)]
    else:
        ids = np.asarray(tokenizer.encode(text_of(path)))
    n_rows = max(2, min(n_tokens, len(ids)) // (length + 1))
    starts = np.linspace(0, len(ids) - length - 1, n_rows).astype(int)
    return torch.from_numpy(np.stack([ids[start : start + length + 1] for start in starts]).astype(np.int64))


@torch.no_grad()
def row_losses(folder: Path, rows: Tensor) -> Tensor:  # (rows,) nats a token
    model = load_model(folder)
    return torch.stack([F.cross_entropy(model(row[None, :-1])[0].float(), row[1:]) for row in rows]).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128, help="of calibration text")
    parser.add_argument("--tokens", type=int, default=20_000, help="held-out, at most")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.load(args.base)
    length = min(512, load_model(args.base).config.max_seq_len)
    rows = held_out_rows(args.held_out, tokenizer, length, args.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "text.txt").write_text(text_of(args.calibrate))
        graft.quantize(base=args.base, out=root / "plain")
        began = time.process_time()
        figures = graft.quantize(
            base=args.base, out=root / "ours", calibrate=root / "text.txt", calibration_rows=args.rows
        )
        print(f"{figures['n_calibration_tokens']:,} tokens, {time.process_time() - began:.0f} s of processor time; "
              f"{figures['bits_per_weight']:.3f} bits a weight, {rows.numel():,} held-out tokens")  # fmt: skip
        full, plain, ours = (row_losses(folder, rows) for folder in (args.base, root / "plain", root / "ours"))
    gaps = [float((losses - full).mean() / full.mean()) for losses in (plain, ours)]
    ratio = gaps[1] / gaps[0]
    spread = (ours - full - ratio * (plain - full)).std() / math.sqrt(len(rows)) / (plain - full).mean().abs()
    print(
        f"loss {full.mean():.4f}; NF4 {gaps[0]:+.3%}, calibrated {gaps[1]:+.3%}: {ratio:.3f} of the gap "
        f"(standard error {float(spread):.3f}), bar {BAR}: {'met' if ratio <= BAR else 'NOT met'}"
    )


if __name__ == "__main__":
    main()
