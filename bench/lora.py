"""LoRA beside PEFT on the CPU, interleaved in one run: `python bench/lora.py [--quick] [--rounds N] [--only step|decode]`.

step: a training step (forward, backward, AdamW) with rank 16 on every linear, of graft, of PEFT on transformers' model with
the same weights, and of PEFT's layers inside graft's model (which compares the layers alone). The losses of the first steps are
printed beside each other first.
decode: greedy tokens for a batch of 8 with three adapters, with 3 and with 50 adapters in memory, against the bare base and
against PEFT's `adapter_names`; the first tokens of both are compared first.

Processor time of one thread, so that other programs disturb little; medians and 10th to 90th percentiles over rounds.
"""

import argparse
import copy
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers

from graft.base.loss import next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import save_model
from graft.base.model.transformer import Transformer, initialize_
from graft.finetune.adapters.lora import LoraConfig, LoRALinear, LowRank, attach_lora, lora_layers, wrapped
from graft.finetune.adapters.selection import adapters_off, use_adapters

S = ModelConfig(
    vocab_size=8192, d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, d_head=64, d_ff=1024, max_seq_len=256
)
RANK, ALPHA = 16, 32
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time of each, in turns, after one call to warm up."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            times[name].append((time.process_time() - start) * 1e3)
    return times


def report(times: dict[str, list[float]], ratios: list[tuple[str, str, str, float]]) -> None:
    """Each candidate's median, and the ratios of the same rounds with the bar that they must not exceed."""
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        print(f"  {name:34} {statistics.median(values):9.1f} ms ({deciles[0]:.1f}-{deciles[-1]:.1f})")
    for label, above, below, bar in ratios:
        pairs = [a / b for a, b in zip(times[above], times[below], strict=True)]
        deciles = statistics.quantiles(pairs, n=10, method="inclusive")
        verdict = "met" if statistics.median(pairs) <= bar else "NOT met"
        print(f"  {label}: {statistics.median(pairs):.3f} ({deciles[0]:.3f}-{deciles[-1]:.3f}), bar {bar:g}: {verdict}")


def two_models(config: ModelConfig) -> tuple[Transformer, torch.nn.Module]:
    """The same random base as graft's model and as transformers'."""
    model = Transformer(config)
    initialize_(model, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, peer


def same_adapter(model: Transformer, peer: torch.nn.Module, name: str) -> None:
    """Give PEFT's layers the weights of graft's adapter."""
    for path, layer in lora_layers(model):
        module = peer.get_submodule(path)
        module.lora_A[name].weight.data.copy_(layer.updates[name].lora_a)
        module.lora_B[name].weight.data.copy_(layer.updates[name].lora_b)


def steps(config: ModelConfig, batch_size: int, rounds: int) -> None:
    """A training step of each, and the losses of the steps."""
    ours, hf = two_models(config)
    inside = copy.deepcopy(ours)
    setting = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(hf, setting)
    inside.requires_grad_(False)
    peft.inject_adapter_in_model(setting, inside)
    attach_lora(ours, LoraConfig(rank=RANK, alpha=ALPHA))
    same_adapter(ours, theirs.base_model.model, "default")
    same_adapter(ours, inside, "default")
    ids = torch.randint(0, config.vocab_size, (batch_size, config.max_seq_len + 1))
    batch = {"ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    losses: dict[str, list[float]] = {}

    def step_of(name: str, model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> Callable[[], None]:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
        losses[name] = []

        def step() -> None:
            loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())

        return step

    n = batch["targets"].numel()
    candidates = {
        "graft": step_of("graft", ours, lambda: next_token_loss(ours, batch) / n),
        "PEFT, transformers": step_of(
            "PEFT, transformers",
            theirs,
            lambda: theirs(batch["ids"], labels=batch["targets"], shift_labels=batch["targets"]).loss,
        ),
        "PEFT's layers in graft's model": step_of(
            "PEFT's layers in graft's model", inside, lambda: next_token_loss(inside, batch) / n
        ),
    }
    times = interleaved(candidates, rounds)
    print(f"training step, {batch_size} x {config.max_seq_len} tokens, rank {RANK} on every linear")
    for name, values in losses.items():
        print(f"  {name:34} losses {', '.join(f'{value:.6f}' for value in values[:4])}")
    report(
        times,
        [
            ("graft over PEFT on transformers", "graft", "PEFT, transformers", 0.85),
            ("graft over PEFT's layers in graft's model", "graft", "PEFT's layers in graft's model", 1.0),
        ],
    )


def decode(config: ModelConfig, batch_size: int, rounds: int, n_new: int) -> None:
    """Greedy decoding with three adapters in a batch: the loop is written out here, the same for each candidate."""
    ours, hf = two_models(config)
    ours.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    setting = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(hf, setting, adapter_name="a0").eval()
    paths = [path for path, module in ours.named_modules() if path.rpartition(".")[2] in LINEARS]
    for i in range(3):
        if i:
            theirs.add_adapter(f"a{i}", setting)
        _random_adapter(ours, paths, f"a{i}", generator)
        same_adapter(ours, theirs.base_model.model, f"a{i}")
    names = ["a0", "a1", "a2", None] * (batch_size // 4)
    ids = torch.randint(0, config.vocab_size, (batch_size, 32), generator=generator)

    def tokens_of_peft() -> torch.Tensor:
        adapter_names = [name or "__base__" for name in names]
        return theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=adapter_names, max_new_tokens=n_new,
            min_new_tokens=n_new, do_sample=False, pad_token_id=0,
        )[:, 32:]  # fmt: skip

    def tokens_of_graft(rows: list[str | None] | None) -> torch.Tensor:
        from graft.base.generate.engine import generate_ids

        with adapters_off(ours) if rows is None else use_adapters(ours, rows):
            return torch.tensor(generate_ids(ours, ids.tolist(), max_new_tokens=n_new))

    with torch.inference_mode():
        mine, peer = tokens_of_graft(names), tokens_of_peft()
    print(f"decoding, batch {batch_size}, prompt 32, {n_new} new tokens, three adapters and the base in the batch")
    print(f"  tokens equal to PEFT's: {(mine == peer).float().mean().item():.3f}")
    candidates = {
        "graft, bare base": lambda: tokens_of_graft(None),
        "graft, 3 adapters": lambda: tokens_of_graft(names),
        "PEFT adapter_names": tokens_of_peft,
    }
    ratios = [
        ("3 adapters over the bare base", "graft, 3 adapters", "graft, bare base", 1 / 0.84),
        ("3 adapters over PEFT", "graft, 3 adapters", "PEFT adapter_names", 1 / 1.3),
    ]
    with torch.inference_mode():
        report(interleaved(candidates, rounds), ratios)
    for i in range(3, 50):
        _random_adapter(ours, paths, f"a{i}", generator)
    del candidates["PEFT adapter_names"]
    print("  the same with 50 adapters in memory")
    with torch.inference_mode():
        report(interleaved(candidates, rounds), ratios[:1])


def _random_adapter(model: Transformer, paths: list[str], name: str, generator: torch.Generator) -> None:
    for path in paths:
        layer: LoRALinear = wrapped(model, path)
        a = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
        b = torch.randn(layer.out_features, RANK, generator=generator) * 0.02
        layer.add(name, LowRank(a, b, ALPHA / RANK, trained=False))


def main() -> None:
    """Parse, print the machine, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", choices=("step", "decode"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, peft {peft.__version__}, one thread"
    )
    config, batch_size, rounds, n_new = S, 8, options.rounds, 96
    if options.quick:
        config = ModelConfig(
            vocab_size=256, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_ff=128, max_seq_len=64
        )
        rounds, n_new = 3, 8
    if options.only != "decode":
        steps(config, batch_size, rounds)
    if options.only != "step":
        decode(config, batch_size, rounds, n_new)


if __name__ == "__main__":
    main()
