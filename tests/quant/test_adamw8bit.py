"""8-bit AdamW follows torch's AdamW, never explodes where gradients are sparse, and resumes to the bit."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graft.kernels import nf4
from graft.kernels.nf4 import numba_cpu, reference
from graft.quant import AdamW8bit, adamw8bit
from graft.quant.codebooks import dynamic8


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 255, 256, 1000, 5000])
def test_blocks_of_8_bits(n: int, signed: bool) -> None:
    """Law: compiled equals reference; each value lies within half a gap of the map (times absmax) of its own."""
    values = torch.randn(n) * torch.logspace(-6, 0, n)
    values = values if signed else values.square()
    bounds = adamw8bit.bounds_of(signed, torch.device("cpu"))
    codebook = torch.tensor(dynamic8(signed))
    codes, absmax = nf4.quantize_8bit(values, bounds, 256)
    expected = reference.quantize_8bit(values, bounds, block_size=256)
    assert torch.equal(codes, expected[0])
    assert torch.equal(absmax, expected[1])
    back = nf4.dequantize_8bit(codes, absmax, codebook, 256)
    assert torch.equal(back, reference.dequantize_8bit(codes, absmax, codebook, block_size=256))
    gap = (
        codebook.diff().max() / 2 + codebook.min().clamp(max=0) + (1 if signed else 0)
    )  # the signed map starts at -0.993
    assert bool(((back - values).abs() <= gap * absmax.repeat_interleave(256)[:n] * (1 + 1e-6)).all())


def test_the_first_guess_is_never_too_high() -> None:
    """Law: every float32 in [-1, 1] whose code is looked up starts at or below its code (10^6 random bit patterns)."""
    bounds = adamw8bit.bounds_of(True, torch.device("cpu"))
    bits = torch.randint(0, 2**32, (10**6,), generator=torch.Generator().manual_seed(0)).to(torch.int64)
    values = bits.to(torch.uint32).view(torch.float32)
    values = torch.cat([values[values.abs() <= 1], torch.tensor([-1.0, 1.0, 0.0, -0.0]), bounds])
    codes = torch.bucketize(values, bounds)
    guess = torch.from_numpy(numba_cpu.first_guess(bounds.numpy().tobytes()))
    started = guess[(values.view(torch.int32).to(torch.int64) >> 16) & 0xFFFF]
    assert bool((started <= codes).all())
    assert (codes - started.to(codes.dtype)).max() <= 2


def test_a_second_moment_is_never_rounded_to_zero() -> None:
    """Law: above zero stays above zero, and zero stays zero, at 1e-30 of the block's absmax."""
    values = torch.tensor([1.0, 1e-30, 0.0, 1e-9])
    codes, absmax = nf4.quantize_8bit(values, adamw8bit.bounds_of(False, torch.device("cpu")), 256)
    back = nf4.dequantize_8bit(codes, absmax, torch.tensor(dynamic8(False)), 256)
    assert (back > 0).tolist() == [True, True, False, True]


def test_follows_torch_adamw() -> None:
    """Parity: over 100 steps to a hundredth of the loss, the curve stays within 1% of the first loss of torch's AdamW."""
    ours, theirs = small_net(), small_net()
    optimizer = AdamW8bit(ours.named_parameters(), learning_rate=1e-2, betas=(0.9, 0.99), weight_decay=0.01)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference_optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99))
    x, y = torch.randn(128, 64), torch.randn(128, 64)
    losses = []
    for _ in range(100):
        for net, opt in ((ours, optimizer), (theirs, reference_optimizer)):
            opt.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
    curves = torch.tensor(losses).view(100, 2)
    assert curves[-1].max() < 0.01 * curves[0, 0]
    assert curves.diff(dim=1).abs().max() < 0.01 * curves[0, 0]
    assert len(optimizer.quantized) == 2
    assert len(optimizer.full) == 2


def test_first_step_is_torchs() -> None:
    """Parity: at the first step nothing is quantized yet, so the update equals torch's in float32's rounding."""
    ours, theirs = small_net(), small_net()
    AdamW = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = AdamW8bit(ours.named_parameters(), learning_rate=1e-2, decay=lambda name, p: True)
    for net, opt in ((ours, optimizer), (theirs, AdamW)):
        net(torch.ones(4, 64)).square().sum().backward()
        opt.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_sparse_gradients_do_not_explode() -> None:
    """Law: rows whose gradient is tiny and then zero move by no more than a few learning rates a step."""
    weight = nn.Parameter(torch.zeros(64, 256))
    optimizer = AdamW8bit([("w", weight)], learning_rate=1e-3, weight_decay=0.0)
    for step in range(20):
        weight.grad = torch.zeros_like(weight)
        weight.grad[:, 0] = 1.0
        if step == 0:
            weight.grad[:, 1:] = 1e-4
        before = weight.detach().clone()
        optimizer.step()
        assert (weight - before).abs().max() <= 5e-3


def test_resume_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: state_tensors -> load_state_tensors in a new process continues to the bit; chunks change nothing."""
    nets = [small_net(), small_net()]
    optimizers = [AdamW8bit(net.named_parameters(), learning_rate=1e-2) for net in nets]
    x = torch.randn(8, 64)

    def advance(net: nn.Module, optimizer: AdamW8bit) -> None:
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step(5e-3)

    for _ in range(3):
        advance(nets[0], optimizers[0])
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_tensors({name: tensor.clone() for name, tensor in optimizers[0].state_tensors().items()})
    advance(nets[0], optimizers[0])
    monkeypatch.setattr(adamw8bit, "CHUNK", 512)
    advance(nets[1], optimizers[1])
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_vectors_do_not_decay() -> None:
    """Law: with a zero gradient a matrix shrinks by lr * weight_decay, a vector of any size stays: 1 - 0.1 * 0.5 = 0.95."""
    named = {"matrix": (64, 96), "small matrix": (8, 8), "vector": (8192,), "small vector": (8,)}
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in named.items()}
    optimizer = AdamW8bit(parameters.items(), learning_rate=0.1, weight_decay=0.5)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 1.0 if "vector" in name else 0.95))


@pytest.mark.parametrize("shape", [(5, 3), (80, 64)])
def test_a_first_gradient_that_comes_late(shape: tuple[int, int]) -> None:
    """Parity: a parameter's first update is torch's, however many steps the others had, also after resuming."""
    early, late = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(shape))
    optimizer = AdamW8bit([("early", early), ("late", late)], learning_rate=0.01, weight_decay=0.0)
    for _ in range(3):
        early.grad = torch.ones(4, 4)
        optimizer.step()
    resumed = AdamW8bit([("early", early), ("late", late)], learning_rate=0.01, weight_decay=0.0)
    resumed.load_state_tensors(optimizer.state_tensors())
    assert (resumed.steps, resumed.n_steps) == ([3, 0], 3)
    theirs = nn.Parameter(torch.ones(shape))
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    late.grad, theirs.grad = gradient.clone(), gradient.clone()
    resumed.step()
    torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0).step()
    assert (1 - late).abs().min() > 0.0099  # a full step, not 0.0055
    torch.testing.assert_close(late, theirs, atol=1e-7, rtol=0)


def test_state_of_an_older_version() -> None:
    """Law: one count for all is every parameter's count; anything else is refused by name."""
    net = small_net()
    optimizer = AdamW8bit(net.named_parameters())
    state = optimizer.state_tensors()
    optimizer.load_state_tensors(state | {"n_steps": torch.tensor(7)})
    assert optimizer.steps == [7] * 4
    for wrong, message in (
        (torch.ones(3, dtype=torch.int64), r"n_steps: expected \(4,\) torch.int64, got \(3,\) torch.int64"),
        (torch.ones(4), r"n_steps: expected \(4,\) torch.int64, got \(4,\) torch.float32"),
        (torch.tensor(-1), r"n_steps: -1 is negative; the checkpoint is damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_tensors(state | {"n_steps": wrong})
    assert optimizer.steps == [7] * 4


def test_bytes_of_the_state() -> None:
    """Worked by hand: 65,536 weights have 2 x 65,536 codes and 2 x 256 float32: 133,120 bytes beside AdamW's 524,288."""
    optimizer = AdamW8bit([("w", nn.Parameter(torch.zeros(256, 256)))])
    state = optimizer.state_tensors()
    assert sum(tensor.nbytes for name, tensor in state.items() if name != "n_steps") == 133_120


def test_on_fake_tensors() -> None:
    """Law: the memory prediction can run the step without numbers."""
    with FakeTensorMode():
        net = small_net()
        optimizer = AdamW8bit(net.named_parameters())
        net(torch.randn(4, 64)).sum().backward()
        optimizer.step()


def test_bad_arguments() -> None:
    net = small_net()
    with pytest.raises(ValueError, match="learning_rate=-1 is negative"):
        AdamW8bit(net.named_parameters(), learning_rate=-1)
    with pytest.raises(ValueError, match=r"betas=\(0.9, 1.0\) must both lie"):
        AdamW8bit(net.named_parameters(), betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="no parameter to train"):
        AdamW8bit([])
    with pytest.raises(ValueError, match=r"parameter w with strides \(1, 64\) is not contiguous"):
        AdamW8bit([("w", torch.zeros(64, 64).T)])
    optimizer = AdamW8bit(net.named_parameters())
    with pytest.raises(ValueError, match=r"optimizer state n_steps: nothing saved"):
        optimizer.load_state_tensors({})
    state = optimizer.state_tensors()
    state["0.weight.exp_avg_q"] = state["0.weight.exp_avg_q"][:5]
    with pytest.raises(
        ValueError, match=r"optimizer state 0.weight.exp_avg_q: expected \(6144,\) torch.uint8, got \(5,\)"
    ):
        optimizer.load_state_tensors(state)
