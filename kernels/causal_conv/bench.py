"""The short causal convolution, forward + backward, against F.conv1d: python -m graft.kernels.causal_conv.bench [--quick]"""

import sys

import torch

from ..measure import Row, bandwidth_rows, bench_device, forward_backward, print_table
from . import causal_conv


def bench(quick: bool) -> list[Row]:
    device = bench_device()
    B, T, C = (1, 64, 48) if quick else (4, 2048, 8192)
    x, grad = (torch.randn(B, T, C, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(C, 4, device=device)
    runs = {
        "ours": forward_backward(causal_conv, (x, weight), (grad,)),
        "torch": forward_backward(lambda *a: causal_conv(*a, backend="reference"), (x, weight), (grad,)),
    }
    n_bytes = 4 * x.numel() * x.element_size()  # x, out, their gradients
    return bandwidth_rows(f"causal_conv ({B}, {T}, {C}), K = 4", runs, n_bytes, quick=quick, bar=0.3)


if __name__ == "__main__":
    print_table(bench("--quick" in sys.argv))
