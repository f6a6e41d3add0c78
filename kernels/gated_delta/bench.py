"""The gated delta rule, forward + backward, against its recurrence: python -m graft.kernels.gated_delta.bench [--quick]"""

import sys

import torch
import torch.nn.functional as F

from ..measure import Row, bandwidth_rows, bench_device, forward_backward, print_table
from . import gated_delta


def bench(quick: bool) -> list[Row]:
    device = bench_device()
    B, H, T, D = (1, 2, 96, 16) if quick else (4, 32, 2048, 128)
    q, k = (F.normalize(torch.randn(B, H, T, D, device=device), dim=-1) for _ in range(2))
    v, grad = (torch.randn(B, H, T, D, device=device) for _ in range(2))
    log_decay, beta = -torch.rand(B, H, T, device=device), torch.rand(B, H, T, device=device)
    inputs = (q, k, v, log_decay, beta)
    runs = {
        "ours": forward_backward(lambda *x: gated_delta(*x)[0], inputs, (grad,)),
        "torch": forward_backward(lambda *x: gated_delta(*x, backend="reference")[0], inputs, (grad,)),
    }
    n_bytes = 8 * v.numel() * v.element_size()  # q, k, v, their gradients, the output and its gradient
    return bandwidth_rows(f"gated_delta ({B}, {H}, {T}, {D})", runs, n_bytes, quick=quick, bar=0.05)


if __name__ == "__main__":
    print_table(bench("--quick" in sys.argv))
