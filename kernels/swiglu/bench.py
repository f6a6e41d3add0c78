"""SwiGLU forward + backward against copy bandwidth and PyTorch: python -m graft.kernels.swiglu.bench [--quick]"""

import sys

import torch
import torch.nn.functional as F

from ..measure import Row, bandwidth_rows, bench_device, forward_backward, our_backend, print_table
from . import swiglu


def bench(quick: bool) -> list[Row]:
    device, backend = bench_device(), our_backend()
    N, d_ff = (4, 384) if quick else (16384, 11008)
    gate, up, grad = (torch.randn(N, d_ff, device=device, dtype=torch.bfloat16) for _ in range(3))
    runs = {
        "ours": forward_backward(lambda g, u: swiglu(g, u, backend=backend), (gate, up), (grad,)),
        "torch": forward_backward(lambda g, u: F.silu(g) * u, (gate, up), (grad,)),
    }
    n_bytes = 8 * gate.numel() * gate.element_size()  # gate, up -> out; grad, gate, up -> two gradients
    return bandwidth_rows(f"swiglu {N} x {d_ff}", runs, n_bytes, quick=quick, bar=0.8)


if __name__ == "__main__":
    print_table(bench("--quick" in sys.argv))
