"""AdamW over a model's tensors against torch.optim and copy bandwidth: python -m graft.kernels.adamw.bench [--quick]"""

import sys
from typing import Any

import torch

from ..measure import Row, bandwidth_rows, bench_device, print_table
from . import adamw_update_
from .reference import adamw_reference_


def bench(quick: bool) -> list[Row]:
    """There is no Triton kernel to judge: the rows say what one would have to beat."""
    device = bench_device()
    width, layers = (64, 2) if quick else (4096 if device.type == "cuda" else 512, 8)
    shapes = [(width, width)] * 4 * layers + [(3 * width, width)] * 3 * layers + [(width,)] * 2 * layers
    params = [torch.randn(shape, device=device) for shape in shapes]
    grads = [torch.randn_like(p) for p in params]
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in params] for _ in range(2))
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    for p, g in zip(theirs, grads, strict=True):
        p.grad = g
    ours: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    fused = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    foreach = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)
    runs = {
        "ours": lambda: adamw_update_(params, grads, exp_avgs, exp_avg_sqs, step=1, **ours),
        "definition": lambda: adamw_reference_(params, grads, exp_avgs, exp_avg_sqs, steps=[1] * len(params), **ours),
        "torch.optim fused": fused.step,
        "torch.optim foreach": foreach.step,
    }
    n_params = sum(p.numel() for p in params)
    name = f"adamw {n_params / 1e6:.0f}M parameters"
    return bandwidth_rows(name, runs, 7 * 4 * n_params, quick=quick, bar=0.8)  # 4 tensors read, 3 written


if __name__ == "__main__":
    print_table(bench("--quick" in sys.argv))
