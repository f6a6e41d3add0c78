"""Grouped LoRA: an adapter per row against one for all rows: python -m graft.kernels.grouped_lora.bench [--quick]

Both run as CUDA graphs, so that what is compared is the GPU's time; with a cold L2 cache, as in decoding, where the base
model's weights have just streamed through it.
"""

import sys

import torch

from ..measure import Row, bench_device, graphed, interleaved_ms, our_backend, print_table, row, time_rows
from . import grouped_lora


def bench(quick: bool) -> list[Row]:
    device, backend = bench_device(), our_backend()
    n_rows, d_model, rank = (4, 64, 8) if quick else (32, 4096, 16)
    x = torch.randn(n_rows, d_model, device=device, dtype=torch.bfloat16)
    lora_a, lora_b = (
        [torch.randn(*shape, device=device, dtype=torch.bfloat16) for _ in range(n_rows)]
        for shape in ((rank, d_model), (d_model, rank))
    )
    own, one = torch.arange(n_rows, device=device), torch.zeros(n_rows, device=device, dtype=torch.long)
    scales = torch.ones(n_rows, device=device)

    def ours(rows):
        return lambda: grouped_lora(x, lora_a, lora_b, rows, scales, backend=backend)

    with torch.no_grad():
        runs = {
            "an adapter per row": graphed(ours(own)),
            "one adapter": graphed(ours(one)),
            "one adapter, two matmuls": graphed(lambda: x @ lora_a[0].T @ lora_b[0].T),
        }
        times = interleaved_ms(runs, repeats=3 if quick else 50)
    name = f"grouped_lora {n_rows} rows, {n_rows} adapters, rank {rank}, {d_model} x {d_model}"
    ratio = times["an adapter per row"][0] / times["one adapter"][0]
    return [row(f"{name}: over one adapter", ratio, "", 1.15), *time_rows(name, times)]


if __name__ == "__main__":
    print_table(bench("--quick" in sys.argv))
