"""Recomputation against torch.utils.checkpoint: gradients to the bit, dropout, autocast, memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graft.base.model.recompute import recompute
from graft.finetune.memory.measure import cpu_allocations


class Layer(nn.Module):
    """Products, a dropout and a nonlinearity; counts how often it runs."""

    def __init__(self, *, dropout: float = 0.5) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(dropout)
        self.n_runs = 0

    def forward(self, x: Tensor, scale: float) -> Tensor:
        self.n_runs += 1
        return x + scale * self.down(self.drop(torch.tanh(self.up(x))))


def gradients(run: Callable[..., Tensor], *, autocast: bool, needs_input: bool) -> list[Tensor]:
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(3))
    x = torch.randn(4, 16, requires_grad=needs_input)
    h = x
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for layer in layers:
            h = run(layer, h, 0.7)
    h.float().square().sum().backward()
    found = [p.grad for p in layers.parameters()] + ([x.grad] if needs_input else [])
    assert all(layer.n_runs == (1 if run is plain else 2) for layer in layers)
    return [g for g in found if g is not None]


def plain(layer: nn.Module, *args: object) -> Tensor:
    return layer(*args)


def torchs(layer: nn.Module, *args: object) -> Tensor:
    return checkpoint(layer, *args, use_reentrant=False)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("needs_input", [False, True])
def test_gradients_equal_those_without_and_torchs(autocast: bool, needs_input: bool) -> None:
    """Parity, to the bit: dropout draws the same numbers again, and autocast is as it was in the forward pass."""
    options = {"autocast": autocast, "needs_input": needs_input}
    ours, without, peer = (gradients(run, **options) for run in (recompute, plain, torchs))
    assert len(ours) == len(without) == 12 + needs_input
    for a, b, c in zip(ours, without, peer, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_random_state_goes_on_as_without() -> None:
    """Law: the second run draws from a copy of the state."""
    states = []
    for run in (recompute, plain):
        gradients(run, autocast=False, needs_input=True)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_memory_is_torchs() -> None:
    """Parity with torch.utils.checkpoint by PyTorch's own allocator; below what keeping the activations takes."""

    def peak(run: Callable[..., Tensor]) -> int:
        torch.manual_seed(0)
        layers = nn.ModuleList(Layer(dropout=0.0) for _ in range(6))
        with cpu_allocations() as found:
            h = torch.randn(2000, 16)
            for layer in layers:
                h = run(layer, h, 0.7)
            h.sum().backward()
        return found[0]

    assert abs(peak(recompute) - peak(torchs)) < 16_384  # random states and Python's own scalars
    assert peak(recompute) < 0.6 * peak(plain)


def test_nothing_is_kept_without_gradients() -> None:
    layer = Layer(dropout=0.0)
    with torch.no_grad():
        out = recompute(layer, torch.randn(2, 16), 1.0)
    assert out.grad_fn is None
    assert layer.n_runs == 1
