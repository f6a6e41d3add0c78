"""RoPE forward + backward against copy bandwidth and the definition: python -m graft.kernels.rope.bench [--quick]"""

import sys

import torch

from ..measure import Row, bandwidth_rows, bench_device, forward_backward, our_backend, print_table
from . import rope


def bench(quick: bool) -> list[Row]:
    device, backend = bench_device(), our_backend()
    B, T, H, K, Dh = (1, 4, 4, 2, 32) if quick else (4, 4096, 32, 8, 128)
    # (B, T, heads, Dh) in memory, as a projection leaves them
    q, k, dq, dk = (
        torch.randn(B, T, heads, Dh, device=device, dtype=torch.bfloat16).transpose(1, 2) for heads in (H, K, H, K)
    )
    angles = torch.rand(1, T, Dh // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    runs = {
        "ours": forward_backward(lambda q, k: rope(q, k, cos, sin, backend=backend), (q, k), (dq, dk)),
        "torch": forward_backward(lambda q, k: rope(q, k, cos, sin, backend="reference"), (q, k), (dq, dk)),
    }
    n_bytes = 4 * (q.numel() + k.numel()) * q.element_size()  # q, k -> q, k and the same for their gradients
    return bandwidth_rows(f"rope {B} x {T}, {H} + {K} heads of {Dh}", runs, n_bytes, quick=quick, bar=0.8)


if __name__ == "__main__":
    print_table(bench("--quick" in sys.argv))
