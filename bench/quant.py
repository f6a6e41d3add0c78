"""4-bit quantization on the CPU beside bitsandbytes, interleaved in one run: `python bench/quant.py [--quick] [--threads N]`.

Prints for each size and dtype: bitsandbytes' median, ours, both spreads (10th to 90th percentile) and the ratio.
Dequantization is measured as each library can be used: bitsandbytes makes a new tensor each time
(`dequantize_4bit(out=...)` raises on the CPU), graft can write into one buffer that is there ("graft") and make a new one
too ("new tensor"). Then whole training steps (LoRA, QLoRA, and PEFT + bitsandbytes on the same model) and one linear layer.
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch

from graft.base.loss import next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer
from graft.finetune.adapters.lora import LoraConfig, attach_lora
from graft.quant import NF4Linear, dequantize_nf4, quantize_linears_, quantize_nf4

BARS = {"quantize": 10.0, "dequantize": 3.0}


def interleaved(
    candidates: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Milliseconds of each, taken in turns so that what else the machine does hits all alike; after two calls to warm up."""
    for run in candidates.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = clock()
            run()
            times[name].append((clock() - start) * 1e3)
    return times


def spread(times: list[float]) -> str:
    """Median and 10th to 90th percentile."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return f"{statistics.median(times):9.3f} ms ({deciles[0]:.3f}-{deciles[-1]:.3f})"


def compare(label: str, times: dict[str, list[float]], theirs: str, bar: float | None) -> None:
    """One line for each candidate beside the peer."""
    base = statistics.median(times[theirs])
    print(f"{label:42} {theirs:14} {spread(times[theirs])}")
    for name, values in times.items():
        if name == theirs:
            continue
        ratio = base / statistics.median(values)
        verdict = (
            ""
            if bar is None or name not in ("graft", "new tensor")
            else f"  bar {bar:g}x: {'met' if ratio >= bar else 'NOT met'}"
        )
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


def products(shape: tuple[int, int], n_tokens: int, rounds: int, clock: Callable[[], float]) -> None:
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
    times = interleaved(candidates, rounds, clock)
    compare(f"forward + backward {shape[0]} x {shape[1]}, {n_tokens} tokens", times, "nn.Linear", None)


def steps(config: ModelConfig, batch_size: int, rounds: int, clock: Callable[[], float]) -> None:
    """A whole training step (forward, backward, AdamW) of the same model: our LoRA, our QLoRA, PEFT + bitsandbytes."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    torch.manual_seed(0)
    plain = Transformer(config)
    models = {"LoRA": plain, "graft": copy.deepcopy(plain), "PEFT + bitsandbytes": copy.deepcopy(plain)}
    quantize_linears_(models["graft"])
    names = quantize_linears_(models["PEFT + bitsandbytes"], backend="bitsandbytes")
    attach_lora(models["LoRA"], LoraConfig(rank=16))
    attach_lora(models["graft"], LoraConfig(rank=16))
    peer = models["PEFT + bitsandbytes"].requires_grad_(False)
    inject_adapter_in_model(PeftConfig(r=16, lora_alpha=32, target_modules=names), peer)
    ids = torch.randint(0, config.vocab_size, (batch_size, config.max_seq_len + 1))
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:]}

    def step_of(model: torch.nn.Module) -> Callable[[], None]:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

        def step() -> None:
            loss = next_token_loss(model, batch) / batch["targets"].numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    times = interleaved({name: step_of(model.train()) for name, model in models.items()}, rounds, clock)
    label = f"step, d_model {config.d_model}, {config.n_layers} layers, {batch_size} x {config.max_seq_len} tokens"
    compare(label, times, "LoRA", None)
    # Ratios of the same round: what slows the machine for a while slows both.
    for label, (above, below), met in (
        ("QLoRA over our LoRA, bar 1.05", ("graft", "LoRA"), lambda ratio: ratio <= 1.05),
        ("PEFT + bitsandbytes over ours, bar 1", ("PEFT + bitsandbytes", "graft"), lambda ratio: ratio > 1),
    ):
        ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
        deciles = statistics.quantiles(ratios, n=10, method="inclusive")
        ratio = statistics.median(ratios)
        verdict = "met" if met(ratio) else "NOT met"
        print(f"{'':42} {label}: {ratio:.3f} ({deciles[0]:.3f}-{deciles[-1]:.3f}) {verdict}")


def main() -> None:
    """Parse, print the machine, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time for layers and steps: for a busy machine"
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.threads} thread(s)")
    rounds = 3 if options.quick else 15
    for shape in [(256, 384)] if options.quick else [(4096, 4096), (1024, 384)]:
        for dtype in (torch.float32, torch.bfloat16):
            for double in (False, True):
                formats(shape, dtype, double, rounds if shape[0] > 1024 else rounds * 10)
    d_ff = {128: 384, 384: 1024, 1024: 2816}
    for d_model, n_layers in [(128, 2)] if options.quick else [(384, 4), (1024, 2)]:
        config = ModelConfig(
            vocab_size=4096,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=d_model // 64,
            n_kv_heads=d_model // 128,
            d_head=64,
            d_ff=d_ff[d_model],
            max_seq_len=64 if options.quick else 256,
        )
        for batch_size in (1, 2) if options.quick else (1, 4):
            steps(config, batch_size, 3 if options.quick else 60 // (1 + batch_size), clock)
    for shape, n_tokens in [((256, 384), 64)] if options.quick else [((1024, 384), 512), ((4096, 4096), 512)]:
        products(shape, n_tokens, 3 if options.quick else 5 if shape[0] > 1024 else 40, clock)


if __name__ == "__main__":
    main()
