"""Paged attention while decoding: share of the memory's bandwidth at batch 1, 8, 64, beside attention over rows.

    python -m graft.kernels.paged_attention.bench [--quick]

Keys and values are read once, so their bytes over the time are the bandwidth (model bandwidth utilization's attention part).
"""

import sys

import torch

from ..attention import attention
from ..measure import Row, bandwidth_rows, bench_device, our_backend, print_table
from . import paged_attention


def bench(quick: bool) -> list[Row]:
    device, backend = bench_device(), our_backend()
    H, K, Dh, page = 32, 8, 128, 32  # Llama-3-8B's heads
    tokens, batches = (64, (1, 2)) if quick else (4096, (1, 8, 64))
    if quick:
        H, K, Dh = 4, 2, 32
    rows: list[Row] = []
    for batch in batches:
        per_row = tokens // page
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        q = torch.randn(batch, H, 1, Dh, device=device, dtype=dtype)
        keys, values = (torch.randn(batch * per_row, K, page, Dh, device=device, dtype=dtype) for _ in range(2))
        table = torch.randperm(batch * per_row, device=device).view(batch, per_row).int()
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        k, v = (
            t.view(batch, per_row, K, page, Dh).transpose(1, 2).reshape(batch, K, tokens, Dh) for t in (keys, values)
        )
        runs = {
            "ours": lambda q=q, a=(keys, values, table, lengths): paged_attention(q, *a, backend=backend),
            "rows": lambda q=q, k=k, v=v: attention(q, k, v, backend=backend),
            "torch": lambda q=q, a=(keys, values, table, lengths): paged_attention(q, *a, backend="torch"),
        }
        n_bytes = 2 * keys.numel() * keys.element_size()
        rows += bandwidth_rows(f"paged_attention batch {batch}, {tokens} tokens", runs, n_bytes, quick=quick, bar=0.6)
    return rows


if __name__ == "__main__":
    print_table(bench("--quick" in sys.argv))
