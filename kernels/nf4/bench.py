"""4-bit weights: dequantization, decoding, training products: python -m graft.kernels.nf4.bench [--quick]

The peer is bitsandbytes where it is installed. Where it isn't, its rows are missing, and dequantization is held against the copy
bandwidth for the bytes that any implementation of the format must move (0.516 read, 2 written, for each weight in bfloat16).
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measure import (
    Row,
    bandwidth_rows,
    bench_device,
    graphed,
    interleaved_ms,
    our_backend,
    print_table,
    row,
    time_rows,
)
from . import DoubleQuantized, PackedWeight, dequantize_4bit, linear_4bit, quantize_4bit, quantize_absmax
from .linear import FUSED_ROWS

BLOCK_SIZE = 64


class Weight:
    """A random double-quantized weight (out, in) and, if bitsandbytes is here, the same in its hands."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.shape = shape
        full = torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
        # The kernels' speed does not depend on the values of the codebooks, so evenly spaced ones will do without a peer.
        codebook = torch.linspace(-1, 1, 16, device=device)
        nested_codebook = torch.linspace(-1, 1, 256, device=device)
        self.packed, absmax = quantize_4bit(full, codebook, BLOCK_SIZE)
        mean = absmax.mean()
        absmax_q, absmax_scale = quantize_absmax(absmax - mean, nested_codebook)
        double = DoubleQuantized(absmax_q, absmax_scale, mean, nested_codebook)
        self.weight = PackedWeight(self.packed, codebook, double, BLOCK_SIZE, shape)
        self.peer: tuple[Any, Tensor, Any] | None = None
        if device.type == "cuda":
            try:
                bitsandbytes: Any = import_module("bitsandbytes")
            except ImportError:
                return
            packed, state = bitsandbytes.functional.quantize_4bit(full, quant_type="nf4", compress_statistics=True)
            self.peer = (bitsandbytes, packed, state)

    def dequantize(self) -> Tensor:
        return dequantize_4bit(self.weight, torch.bfloat16)

    def times(self, x: Tensor, backend: str) -> Tensor:
        return linear_4bit(x, self.weight, backend=backend)  # pyright: ignore[reportArgumentType]


def bench(quick: bool) -> list[Row]:
    device, rows = bench_device(), []
    for shape in [(64, 128)] if quick else [(4096, 4096), (8192, 28672)]:
        weight = Weight(shape, device)
        rows += dequantization(weight, quick) + decoding(weight, quick)
    shape = (64, 128) if quick else (4096, 4096)
    return rows + training(Weight(shape, device), quick)


def dequantization(weight: Weight, quick: bool) -> list[Row]:
    """Against the copy bandwidth and bitsandbytes."""
    runs: dict[str, Callable[[], Any]] = {"ours": weight.dequantize}
    if weight.peer is not None:
        library, packed, state = weight.peer
        runs["bitsandbytes"] = lambda: library.functional.dequantize_4bit(packed, state)
    n = weight.shape[0] * weight.shape[1]
    n_bytes = n // 2 + n // BLOCK_SIZE + n // BLOCK_SIZE // 256 * 4 + 2 * n
    name = f"nf4 dequantize {weight.shape[0]} x {weight.shape[1]}"
    rows = bandwidth_rows(name, runs, n_bytes, quick=quick, bar=0.7)
    times = {r["name"].split(": ")[1].split(" ")[0]: r["value"] for r in rows if r["unit"] == "ms"}
    if "bitsandbytes" in times:
        rows.append(row(f"{name}: time over bitsandbytes'", times["ours"] / times["bitsandbytes"], "", 1.0))
    return rows


def decoding(weight: Weight, quick: bool) -> list[Row]:
    """One row: ours against dequantize + matmul and bitsandbytes' gemv, without launch overhead where it can be taken away."""
    x = torch.randn(1, weight.shape[1], device=weight.packed.device, dtype=torch.bfloat16)
    ours = our_backend()
    runs = {
        "ours": graphed(lambda: weight.times(x, ours)),
        "dequantize + matmul": graphed(lambda: F.linear(x, weight.dequantize())),
    }
    if weight.peer is not None:
        library, packed, state = weight.peer
        runs["bitsandbytes"] = graphed(lambda: library.matmul_4bit(x, packed.t(), quant_state=state))
    name = f"nf4 gemv {weight.shape[0]} x {weight.shape[1]}"
    times = interleaved_ms(runs, repeats=3 if quick else 30)
    n = weight.shape[0] * weight.shape[1]
    rows = [
        row(f"{name}: time over {other}", times["ours"][0] / times[other][0], "", 1.0)
        for other in runs
        if other != "ours"
    ]
    return rows + time_rows(name, times, n // 2 + n // BLOCK_SIZE)


def training(weight: Weight, quick: bool) -> list[Row]:
    """Forward + input gradient at several numbers of rows: where the fused products stop paying (FUSED_ROWS)."""
    rows: list[Row] = []
    for n_rows in (2, 20) if quick else (16, 64, 256, 1024, 4096):
        x = torch.randn(n_rows, weight.shape[1], device=weight.packed.device, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(n_rows, weight.shape[0], device=x.device, dtype=torch.bfloat16)

        def step(backend: str, x: Tensor = x, grad: Tensor = grad) -> Tensor:
            return torch.autograd.grad(weight.times(x, backend), x, grad)[0]

        name = f"nf4 forward + backward {weight.shape[0]} x {weight.shape[1]}, {n_rows} rows"
        times = interleaved_ms(
            {"fused": lambda: step(our_backend()), "dequantize": lambda: step("torch")}, repeats=3 if quick else 20
        )
        ratio = times["fused"][0] / times["dequantize"][0]
        bar = 1.0 if n_rows <= FUSED_ROWS else None  # what auto takes may not be the slower one
        rows += [row(f"{name}: fused over dequantize", ratio, "", bar), *time_rows(name, times)]
    return rows


if __name__ == "__main__":
    print_table(bench("--quick" in sys.argv))
