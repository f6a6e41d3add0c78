"""A pretraining step on the CPU beside transformers', interleaved in one run: `python bench/pretrain.py [--quick] [--threads N]`.

The same weights, the same batch: forward, backward and fused AdamW of a Llama-shaped model (vocabulary 8192, d_model 384,
6 layers, 6 heads on 2, d_ff 1024, float32), at 2048 and at 256 tokens a step. Loss and gradients are compared first. Each
round runs every candidate once, in turns; a ratio is that of two neighbours in one round, so that what else the machine
does hits both alike. `without loops` is graft with PyTorch's operators in place of its compiled CPU loops. The clock is the
processor time of all threads; --wall takes the wall clock. Memory is the highest sum of live tensors above weights, moments
and batch. --compiled compiles all, graft as `--set compile=true` does.
`litgpt` has the same weights (its loss is compared too; left out where it isn't installed), `nanochat` is its model at this size
(bench/pretrain_peers.py): fused AdamW for both.
"""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pretrain_peers import has_litgpt, litgpt_of, nanochat_like
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from graft.base.loss import n_labels, next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer, initialize_
from graft.base.optim.adamw import AdamW
from graft.base.run import TrainConfig
from graft.base.training.compiled import compile_layers
from graft.finetune.memory.count import LiveBytes
from graft.kernels import cpu_loops

CONFIG = ModelConfig(8192, 384, 6, 6, 2, 64, 1024, 256, qk_norm=False)
TINY = ModelConfig(512, 64, 2, 4, 2, 16, 192, 64, qk_norm=False)
BAR, MEMORY_BAR = 0.88, 0.60
LEARNING_RATE, BETAS, DECAY = 1e-4, (0.9, 0.95), 0.1


def peer_of(model: Transformer) -> LlamaForCausalLM:
    """transformers' Llama with the same weights."""
    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.d_head,
        intermediate_size=c.d_ff,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    peer = LlamaForCausalLM(config)
    peer.load_state_dict(model.state_dict())
    return peer.train()


@contextmanager
def without_loops() -> Iterator[None]:
    """Within the block no tensor is large enough for the compiled loops."""
    smallest, cpu_loops.SMALLEST = cpu_loops.SMALLEST, 2**62
    try:
        yield
    finally:
        cpu_loops.SMALLEST = smallest


class Pair:
    """One batch, and the losses of both libraries on it."""

    def __init__(self, config: ModelConfig, batch_size: int, compiled: bool) -> None:
        self.compiled = compiled
        self.ours = Transformer(config).train()
        initialize_(self.ours, seed=0)
        self.theirs = peer_of(self.ours)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (batch_size, config.max_seq_len), generator=generator)
        last = torch.full((batch_size, 1), -100)
        self.batch = {"ids": ids, "targets": torch.cat([ids[:, 1:], last], 1)}
        self.n = n_labels(self.batch)
        if compiled:
            compile_layers(self.ours, TrainConfig(compile=True))
        self.their_model = torch.compile(self.theirs) if compiled else self.theirs

    def loss_of_ours(self) -> Tensor:
        return next_token_loss(self.ours, self.batch) / self.n

    def loss_of_theirs(self) -> Tensor:
        return self.their_model(input_ids=self.batch["ids"], labels=self.batch["ids"]).loss

    def check(self) -> None:
        """Raises ValueError unless loss and every gradient agree to float32's rounding."""
        losses = [self.loss_of_ours(), self.loss_of_theirs()]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=2e-6, atol=0)
        theirs = dict(self.theirs.named_parameters())
        worst = 0.0
        for name, ours in self.ours.named_parameters():
            peer = theirs[name].grad
            assert ours.grad is not None, f"{name} has no gradient here"
            assert peer is not None, f"{name} has no gradient in transformers"
            worst = max(worst, float((ours.grad - peer).norm() / peer.norm()))
        if not worst < 1e-5:
            raise ValueError(f"gradients differ by {worst:.2g} of their norm; expected below 1e-5")
        print(f"losses {losses[0]:.6f} and {losses[1]:.6f}; largest relative difference of a gradient {worst:.1e}")

    def steps(self) -> dict[str, Callable[[], None]]:
        """Each candidate's whole step."""
        ours = AdamW(self.ours.named_parameters(), learning_rate=LEARNING_RATE, betas=BETAS, weight_decay=DECAY)
        theirs = torch.optim.AdamW(
            self.theirs.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=DECAY, fused=True
        )

        def graft() -> None:
            self.loss_of_ours().backward()
            ours.step()
            ours.zero_grad()

        def graft_without_loops() -> None:
            with without_loops():
                graft()

        def transformers() -> None:
            self.loss_of_theirs().backward()
            theirs.step()
            theirs.zero_grad()

        return {"graft": graft, "without loops": graft_without_loops, "transformers": transformers} | self.others()

    def others(self) -> dict[str, Callable[[], None]]:
        """The steps of other libraries' models."""
        ids, targets = self.batch["ids"], self.batch["targets"]
        nanochat = nanochat_like(self.ours)
        losses: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]] = {
            "nanochat": (nanochat, lambda run, ids, targets: run(ids, targets))
        }
        if has_litgpt():
            losses["litgpt"] = litgpt_of(self.ours)
            litgpt, loss = losses["litgpt"]
            torch.testing.assert_close(loss(litgpt, ids, targets), self.loss_of_ours(), rtol=2e-6, atol=0)
        return {name: self.step_of(model, loss) for name, (model, loss) in losses.items()}

    def step_of(self, model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Callable[[], None]:
        """A whole step of a peer."""
        run: Any = torch.compile(model) if self.compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=DECAY, fused=True)

        def step() -> None:
            loss(run, self.batch["ids"], self.batch["targets"]).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step


def peak_bytes(model: nn.Module, step: Callable[[], None]) -> int:
    """The highest sum of live tensors that one step makes, the gradients among them."""
    gc.collect()
    with LiveBytes() as live:
        live.add(model.parameters(), "weights")
        before = live.total
        step()
        return live.peak()[1].n_bytes - before


def measure(
    candidates: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Milliseconds of each in every round, the order turned by one from round to round; two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for i in range(-2, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            candidates[name]()
            if i >= 0:
                times[name].append((clock() - start) * 1e3)
    return times


def spread(values: list[float], digits: int) -> str:
    """Median and 10th to 90th percentile."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return f"{statistics.median(values):.{digits}f} ({deciles[0]:.{digits}f}-{deciles[-1]:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: does it run?")
    parser.add_argument("--rounds", type=int, help="default: 12 at 2048 tokens a step, 60 at 256")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="the wall clock in place of processor time")
    parser.add_argument("--compiled", action="store_true", help="torch.compile both")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = TINY if arguments.quick else CONFIG
    clock = time.perf_counter if arguments.wall else time.process_time
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {arguments.threads} threads")
    for batch_size, rounds in ((8, 12), (1, 60)):
        rounds = arguments.rounds or (3 if arguments.quick else rounds)
        pair = Pair(config, batch_size, arguments.compiled)
        print(f"\n{batch_size * config.max_seq_len} tokens a step")
        pair.check()
        pair.ours.zero_grad()
        pair.theirs.zero_grad()
        candidates = pair.steps()
        times = measure(candidates, rounds, clock)
        if not arguments.compiled:  # compiled code allocates beside PyTorch's operators
            models = {"graft": pair.ours, "transformers": pair.theirs}
            memory = {name: peak_bytes(model, candidates[name]) for name, model in models.items()}
            ratio = memory["graft"] / memory["transformers"]
            figures = ", ".join(f"{name} {n / 2**20:.1f} MiB" for name, n in memory.items())
            print(f"memory beside weights and moments: {figures}: {ratio:.2f} (bar {MEMORY_BAR})")
        for name, values in times.items():
            ratios = [a / b for a, b in zip(values, times["transformers"], strict=True)]
            print(f"{name:14} {spread(values, 1):>28} ms   {spread(ratios, 3)} of transformers'")


if __name__ == "__main__":
    main()
