"""4-bit quantization on the CPU beside bitsandbytes, interleaved in one run: `python bench/quant.py [--quick] [--threads N]`.

Prints for each size and dtype: bitsandbytes' median, ours, both spreads (10th to 90th percentile) and the ratio. Dequantization
is measured as each library is used: bitsandbytes makes a new tensor each time (`dequantize_4bit(out=...)` raises on
the CPU), graft writes into one buffer that is there; the row "new tensor" is ours without that.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch

from graft.quant import NF4Linear, dequantize_nf4, quantize_nf4

BARS = {"quantize": 10.0, "dequantize": 3.0}


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, taken in turns so that what else the machine does hits all alike."""
    for run in candidates.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def spread(times: list[float]) -> str:
    """Median and 10th to 90th percentile."""
    deciles = statistics.quantiles(times, n=10)
    return f"{statistics.median(times):9.3f} ms ({deciles[0]:.3f}-{deciles[-1]:.3f})"


def compare(label: str, times: dict[str, list[float]], theirs: str, bar: float | None) -> None:
    """One line for each candidate beside the peer."""
    base = statistics.median(times[theirs])
    print(f"{label:42} {theirs:14} {spread(times[theirs])}")
    for name, values in times.items():
        if name == theirs:
            continue
        ratio = base / statistics.median(values)
        verdict = "" if bar is None or name != "graft" else f"  bar {bar:g}x: {'met' if ratio >= bar else 'NOT met'}"
        print(f"{'':42} {name:14} {spread(values)}  {ratio:5.1f}x{verdict}")


def formats(shape: tuple[int, int], dtype: torch.dtype, double: bool, rounds: int) -> None:
    """Quantize and dequantize one weight."""
    weight = (torch.randn(shape) * 0.02).to(dtype)
    packed, state = quantize_nf4(weight, double_quant=double)
    theirs, their_state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    assert torch.equal(packed, theirs)
    buffer = torch.empty_like(weight)
    assert torch.equal(dequantize_nf4(packed, state, out=buffer), bnb.dequantize_4bit(theirs, their_state))
    label = f"{shape[0]} x {shape[1]} {str(dtype)[6:]}{', double' if double else ''}"
    quantizing = {
        "bitsandbytes": lambda: bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double),
        "graft": lambda: quantize_nf4(weight, double_quant=double),
    }
    compare(f"quantize {label}", interleaved(quantizing, rounds), "bitsandbytes", BARS["quantize"])
    dequantizing = {
        "bitsandbytes": lambda: bnb.dequantize_4bit(theirs, their_state),
        "graft": lambda: dequantize_nf4(packed, state, out=buffer),
        "new tensor": lambda: dequantize_nf4(packed, state),
        "a fill": lambda: buffer.fill_(1.0),
    }
    compare(f"dequantize {label}", interleaved(dequantizing, rounds * 4), "bitsandbytes", BARS["dequantize"])


def products(shape: tuple[int, int], n_tokens: int, rounds: int) -> None:
    """Forward and input gradient of one linear layer: frozen full precision, ours in 4 bits, bitsandbytes' Linear4bit."""
    import bitsandbytes as library

    linear = torch.nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)
    ours = NF4Linear.from_linear(linear)
    theirs = library.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4", compute_dtype=torch.float32)
    theirs.weight = library.nn.Params4bit(linear.weight.data.clone(), quant_type="nf4", module=theirs)
    theirs = theirs.to("cpu").train()
    x = torch.randn(n_tokens, shape[1], requires_grad=True)
    y = torch.randn(n_tokens, shape[0])

    def step(layer: torch.nn.Module) -> None:
        x.grad = None
        layer(x).backward(y)

    candidates = {"nn.Linear": lambda: step(linear), "graft": lambda: step(ours), "bitsandbytes": lambda: step(theirs)}
    times = interleaved(candidates, rounds)
    compare(f"forward + backward {shape[0]} x {shape[1]}, {n_tokens} tokens", times, "nn.Linear", None)


def main() -> None:
    """Parse, print the machine, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it runs")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.threads} thread(s)")
    rounds = 3 if options.quick else 15
    for shape in [(256, 384)] if options.quick else [(4096, 4096), (1024, 384)]:
        for dtype in (torch.float32, torch.bfloat16):
            for double in (False, True):
                formats(shape, dtype, double, rounds if shape[0] > 1024 else rounds * 10)
    for shape, n_tokens in [((256, 384), 64)] if options.quick else [((1024, 384), 512), ((4096, 4096), 512)]:
        products(shape, n_tokens, 3 if options.quick else 5 if shape[0] > 1024 else 40)


if __name__ == "__main__":
    main()
