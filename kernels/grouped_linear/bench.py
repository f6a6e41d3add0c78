"""Grouped products in Triton, forward + backward, against PyTorch's own and a loop of linears.

python -m graft.kernels.grouped_linear.bench [--quick]
"""

import sys

import torch

from ..dispatch import Backend
from ..measure import Row, bandwidth_rows, bench_device, forward_backward, our_backend, print_table
from . import grouped_linear


def bench(quick: bool) -> list[Row]:
    device = bench_device()
    N, G, n_in, n_out = (64, 4, 32, 48) if quick else (16384, 64, 2048, 1536)
    dtype = torch.bfloat16
    x, grad = (torch.randn(N, size, device=device, dtype=dtype) for size in (n_in, n_out))
    weight = torch.randn(G, n_out, n_in, device=device, dtype=dtype)
    ends = torch.sort(torch.randint(0, N + 1, (G,), device=device)).values.to(torch.int32)
    ends[-1] = N
    backends: dict[str, Backend] = {"ours": our_backend(), "torch": "torch", "loop": "reference"}
    runs = {
        name: forward_backward(lambda a, w, b=backend: grouped_linear(a, w, ends, backend=b), (x, weight), (grad,))
        for name, backend in backends.items()
    }
    n_bytes = (2 * weight.numel() + 3 * (x.numel() + grad.numel())) * x.element_size()
    return bandwidth_rows(f"grouped_linear {N} rows, {G} of ({n_out}, {n_in})", runs, n_bytes, quick=quick, bar=0.3)


if __name__ == "__main__":
    print_table(bench("--quick" in sys.argv))
