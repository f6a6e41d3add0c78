"""Fused linear + cross entropy against the plain two steps, memory and time: python -m graft.kernels.cross_entropy.bench

The plain loss is F.cross_entropy of the logits in hidden's own dtype, the leanest that PyTorch has (transformers casts the
logits to float32 first, which doubles its memory). With a GPU: bfloat16. Without: float32 and the chunked torch backend,
resident memory. Both need gradients of hidden and weight.
"""

import sys

import torch
import torch.nn.functional as F

from ..dispatch import Backend
from ..measure import Row, bench_device, interleaved_ms, our_backend, peak_bytes, print_table, row, time_rows
from . import linear_cross_entropy


def bench(quick: bool) -> list[Row]:
    device = bench_device()
    if device.type == "cuda":
        sizes = [(16384, 4096, 128256)] if not quick else [(2048, 512, 32000)]
        return [r for size in sizes for r in compare(*size, torch.bfloat16, our_backend(), quick)]
    if quick:
        return compare(16, 8, 100, torch.float32, our_backend(), quick)
    sizes = [(2048, 256, 8192), (4096, 512, 32000)]  # a small model of ours, and Llama-2's vocabulary
    return [r for size in sizes for r in compare(*size, torch.float32, "torch", quick)]


def compare(N: int, D: int, V: int, dtype: torch.dtype, backend: Backend, quick: bool) -> list[Row]:
    device = bench_device()
    hidden = torch.randn(N, D, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, D, device=device, dtype=dtype) / D**0.5).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), targets), (hidden, weight))

    def ours() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, backend=backend), (hidden, weight))

    name = f"linear_cross_entropy {N} tokens, D {D}, V {V}"
    runs = {"ours": ours, "plain": plain}
    for run in runs.values():  # libraries' own buffers are theirs, not the loss's
        run()
    peaks = {which: peak_bytes(run) for which, run in runs.items()}
    times = interleaved_ms(runs, repeats=3 if quick or device.type == "cpu" else 10)
    gradients = (N + V) * D * hidden.element_size()
    return [
        row(f"{name}: peak memory over plain's", peaks["ours"] / max(1, peaks["plain"]), "", 1 / 8),
        row(f"{name}: time over plain's", times["ours"][0] / times["plain"][0], "", 1.1),
        *(row(f"{name}: {which} peak", peak / 2**20, "MiB") for which, peak in peaks.items()),
        row(f"{name}: of which gradients", gradients / 2**20, "MiB"),
        *time_rows(name, times),
    ]


if __name__ == "__main__":
    print_table(bench("--quick" in sys.argv))
