"""Grouped products in Triton, forward + backward, against PyTorch's own and a loop of linears.

python -m graft.kernels.grouped_linear.bench [--quick]
"""

import sys
from collections.abc import Callable
from typing import Any

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

    def both(backend: Backend) -> Callable[[], Any]:
        return forward_backward(lambda a, w: grouped_linear(a, w, ends, backend=backend), (x, weight), (grad,))

    runs = {"ours": both(our_backend()), "torch": both("torch"), "loop": both("reference")}
    n_bytes = (2 * weight.numel() + 3 * (x.numel() + grad.numel())) * x.element_size()
    return bandwidth_rows(f"grouped_linear {N} rows, {G} of ({n_out}, {n_in})", runs, n_bytes, quick=quick, bar=0.3)


if __name__ == "__main__":
    print_table(bench("--quick" in sys.argv))
