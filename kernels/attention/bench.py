"""Attention against PyTorch's SDPA backends: python -m graft.kernels.attention.bench [--quick] [--tune]

Rates count 4 B H T S Dh operations forward and 10 backward, half of that where causal, as FlashAttention's papers do.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..measure import Row, bench_device, graphed, interleaved_ms, our_backend, peak_bytes, print_table, row
from . import attention

PEERS = {"FA2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
Runs = dict[str, Callable[[], Any]]


def bench(quick: bool) -> list[Row]:
    lengths = [64] if quick else [4096, 8192, 16384]
    rows = [r for T in lengths for r in forward(T, quick) + backward(T, quick)]
    return rows + memory(128 if quick else 16384) + packed(quick) + decoding(quick)


def tensors(B: int, H: int, K: int, T: int, Dh: int, S: int | None = None) -> list[Tensor]:
    """q, k, v in bfloat16 on a GPU (the interpreter would truncate it: float32 there)."""
    device = bench_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = (B, H, T, Dh), (B, K, S or T, Dh), (B, K, S or T, Dh)
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def sizes(T: int, quick: bool) -> list[Tensor]:
    """16,384 tokens in all, 16 heads of 128: d_model 2048, the setting of the published figures."""
    return tensors(1, 2, 2, T, 16) if quick else tensors(16384 // T, 16, 16, T, 128)


def peers(make: Callable[[Callable[[Tensor, Tensor, Tensor], Tensor]], Callable[[], Any]]) -> Runs:
    """SDPA's backends that run here, each as `make` builds it."""

    def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run

    found: Runs = {}
    for name, backend in PEERS.items() if torch.cuda.is_available() else [("FA2", SDPBackend.FLASH_ATTENTION)]:
        with suppress(RuntimeError):  # a backend that this build or GPU lacks
            run = make(sdpa(backend))
            run()
            found[name] = run
    return found


def compare(name: str, runs: Runs, n_ops: float, quick: bool, best_bar: float | None) -> list[Row]:
    times = interleaved_ms(runs, repeats=2 if quick else 20)
    ours = times["ours"][0]
    rows = []
    if "FA2" in times:
        rows.append(row(f"{name}: speed over FlashAttention-2's", times["FA2"][0] / ours, "x", 1.0, least=True))
    if len(times) > 1 and best_bar is not None:
        best = min(median for run, (median, _, _) in times.items() if run != "ours")
        rows.append(row(f"{name}: speed over the best SDPA backend's", best / ours, "x", best_bar, least=True))
    for run, (median, low, high) in times.items():
        rows.append(row(f"{name}: {run} ({low:.3f}-{high:.3f} ms)", n_ops / median / 1e9, "TFLOPs"))
    return rows


def forward(T: int, quick: bool) -> list[Row]:
    q, k, v = sizes(T, quick)
    runs: Runs = {"ours": lambda: attention(q, k, v, backend=our_backend())}
    runs |= peers(lambda sdpa: lambda: sdpa(q, k, v))
    return compare(f"attention forward, causal, T {T}", runs, 2 * q.numel() * T, quick, 0.85)


def backward(T: int, quick: bool) -> list[Row]:
    q, k, v = (x.requires_grad_() for x in sizes(T, quick))
    grad = torch.randn_like(q)

    def make(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        out = run(q, k, v)
        return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    runs = {"ours": make(lambda q, k, v: attention(q, k, v, backend=our_backend()))} | peers(make)
    return compare(f"attention backward, causal, T {T}", runs, 5 * q.numel() * T, quick, None)


def memory(T: int) -> list[Row]:
    """Memory forward over inputs + outputs + log-sum-exp; on a CPU the interpreter's own arrays count too."""
    q, k, v = (x.requires_grad_() for x in (tensors(1, 2, 2, T, 16) if T <= 128 else tensors(1, 16, 16, T, 128)))
    inputs = sum(x.numel() * x.element_size() for x in (q, k, v))
    fair = inputs + q.numel() * q.element_size() + q[..., 0].numel() * 4
    rise = peak_bytes(lambda: attention(q, k, v, backend=our_backend()))
    return [row(f"attention memory, T {T}: over inputs + outputs + lse", (inputs + rise) / fair, "x", 1.05)]


def packed(quick: bool) -> list[Row]:
    """Eight documents in one row against the same eight as a batch, forward and backward."""
    n, T, H, Dh = (2, 32, 2, 16) if quick else (8, 2048, 16, 128)
    row_of = [x.requires_grad_() for x in tensors(1, H, H, n * T, Dh)]
    batch = [x.requires_grad_() for x in tensors(n, H, H, T, Dh)]
    borders = torch.arange(0, n * T + 1, T, device=bench_device(), dtype=torch.int32)
    grads = torch.randn_like(row_of[0]), torch.randn_like(batch[0])

    def both(inputs: list[Tensor], grad: Tensor, cu_seqlens: Tensor | None) -> Callable[[], Any]:
        def run() -> Any:
            return torch.autograd.grad(attention(*inputs, cu_seqlens=cu_seqlens, backend=our_backend()), inputs, grad)

        return run

    runs = {"packed": both(row_of, grads[0], borders), "batch": both(batch, grads[1], None)}
    times = interleaved_ms(runs, repeats=2 if quick else 20)
    name = f"attention packed, {n} x {T}, forward + backward: time over the batch's"
    return [row(name, times["packed"][0] / times["batch"][0], "x", 1.10)]


def decoding(quick: bool) -> list[Row]:
    """One query a row against a cache: bytes of keys and values a second, and SDPA's time."""
    B, H, K, S, Dh = (2, 2, 1, 64, 16) if quick else (8, 32, 8, 16384, 128)
    q, k, v = tensors(B, H, K, 1, Dh, S)
    with torch.no_grad():
        runs = {
            "ours": graphed(lambda: attention(q, k, v, backend=our_backend())),
            "torch": graphed(lambda: attention(q, k, v, backend="torch")),
        }
        times = interleaved_ms(runs, repeats=2 if quick else 30)
    n_bytes = 2 * k.numel() * k.element_size()
    name = f"attention decode, {B} x {S} keys, {H} heads on {K}"
    return [
        row(f"{name}: speed over SDPA's", times["torch"][0] / times["ours"][0], "x"),
        row(f"{name}: ours", n_bytes / times["ours"][0] / 1e6, "GB/s"),
    ]


def tune(Dh: int, T: int = 8192) -> None:
    """Time tiles near the shipped ones and print the five fastest of each kernel."""
    from .tiles import Tile
    from .triton_attention import backward as run_backward
    from .triton_attention import forward as run_forward

    q, k, v = tensors(16384 // T, 2048 // Dh, 2048 // Dh, T, Dh)
    options = (None, None, True, Dh**-0.5, None, None)
    out, lse = run_forward(q, k, v, *options)
    saved = (torch.randn_like(out), q, k, v, out, lse)
    tiles = [Tile(*t) for t in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))]
    report(f"forward {Dh}", {t: lambda t=t: run_forward(q, k, v, *options, tile=t) for t in tiles})
    tiles = [Tile(*t) for t in product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))]
    base = Tile(32, 32, 4, 1)  # of the kernel that is not looked at; its time is added to all alike
    report(f"dq {Dh}", {t: lambda t=t: run_backward(*saved, *options, tiles=(t, base)) for t in tiles})
    report(f"dkdv {Dh}", {t: lambda t=t: run_backward(*saved, *options, tiles=(base, t)) for t in tiles})


def report(name: str, runs: dict[Any, Callable[[], Any]]) -> None:
    """The five fastest; tiles that don't fit the GPU are left out."""
    from triton.runtime.errors import OutOfResources

    fits = {}
    for tile, run in runs.items():
        with suppress(OutOfResources):
            run()
            fits[tile] = run
    times = interleaved_ms(fits, repeats=5)
    for tile in sorted(times, key=lambda t: times[t][0])[:5]:
        print(f"{name:<14} {times[tile][0]:.3f} ms  {tile}")


if __name__ == "__main__":
    if "--tune" in sys.argv:
        for d_head in (64, 128, 256):
            tune(d_head)
    else:
        print_table(bench("--quick" in sys.argv))
