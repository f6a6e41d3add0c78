"""RMSNorm with the residual add, forward + backward, against copy bandwidth and PyTorch: python -m graft.kernels.rms_norm.bench"""

import sys

import torch
import torch.nn.functional as F

from ..measure import Row, bandwidth_rows, bench_device, forward_backward, our_backend, print_table
from . import rms_norm


def bench(quick: bool) -> list[Row]:
    device, backend = bench_device(), our_backend()
    N, D = (16, 128) if quick else (16384, 4096)
    x, residual, d_normed, d_stream = (torch.randn(N, D, device=device, dtype=torch.bfloat16) for _ in range(4))
    weight = torch.randn(D, device=device, dtype=torch.bfloat16)

    def plain(x, residual, weight):
        stream = x + residual
        return F.rms_norm(stream, (D,), weight, 1e-6), stream

    def ours(x, residual, weight):
        return rms_norm(x, weight, eps=1e-6, residual=residual, backend=backend)

    inputs, grads = (x, residual, weight), (d_normed, d_stream)
    runs = {name: forward_backward(f, inputs, grads) for name, f in (("ours", ours), ("torch", plain))}
    n_bytes = 8 * x.numel() * x.element_size()  # x, residual -> normed, stream; their gradients, stream -> one gradient
    return bandwidth_rows(f"rms_norm + residual {N} x {D}", runs, n_bytes, quick=quick, bar=0.8)


if __name__ == "__main__":
    print_table(bench("--quick" in sys.argv))
