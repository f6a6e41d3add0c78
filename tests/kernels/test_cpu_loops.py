"""Worked by hand, law and parity for the compiled CPU loops: accuracy, odd shapes, and when they run."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from graft.finetune.memory.count import LiveBytes
from graft.kernels import cpu_loops
from graft.kernels.cpu_loops import takes_loops
from graft.kernels.cross_entropy import linear_cross_entropy
from graft.kernels.rms_norm import rms_norm
from graft.kernels.rope import rope
from graft.kernels.swiglu import swiglu

pytest.importorskip("numba")

WIDTHS = (1, 41, 123, 384)


def tensors(*shape: int, n: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * 3 for _ in range(n)]


def angles(T: int, half: int) -> tuple[Tensor, Tensor]:
    table = torch.arange(T)[:, None] / (1.0 + torch.arange(half))
    return table.cos()[None], table.sin()[None]


def test_exp_against_float64():
    """Parity: within 2 units in the last place of float64's exp; NaN stays NaN, infinity is reached, -infinity gives 0."""
    from graft.kernels.numba_exp import exp32
    from graft.kernels.numba_jit import compiled

    @compiled
    def every(x, out):
        for i in range(x.size):
            out[i] = exp32(x[i])

    x = np.concatenate([np.linspace(-87.3, 88.3, 200_001), [0.0, math.nan, math.inf, -math.inf, -200.0]])
    x = x.astype(np.float32)
    got = np.empty_like(x)
    every(x, got)
    want = np.exp(x[:-4].astype(np.float64))
    assert (np.abs(got[:-4] - want) / np.spacing(want.astype(np.float32))).max() < 2
    assert got[-5] == 1
    assert np.isnan(got[-4])
    assert got[-3:].tolist() == [math.inf, 0.0, 0.0]


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 65, 130])
def test_within_the_bar(within_bar, rows, D):
    """Parity with the float32 truth at STYLE's bar, gradients too; 65 and 130 rows end inside a block."""
    gate, up = tensors(rows, D)
    within_bar(lambda b, g, u: swiglu(g, u, backend=b), [gate, up], torch.float32, tested="numba")
    weight = torch.linspace(-1, 2, D)
    within_bar(lambda b, x, w: rms_norm(x, w, eps=1e-5, backend=b), [gate, weight], torch.float32, tested="numba")
    within_bar(
        lambda b, x, w, r: rms_norm(x, w, eps=1e-5, residual=r, backend=b),
        [gate, weight, up],
        torch.float32,
        tested="numba",
    )


@pytest.mark.parametrize("half", [1, 5, 32])
@pytest.mark.parametrize("one_table", [True, False])
def test_rope_within_the_bar(within_bar, half, one_table):
    cos, sin = angles(7, half)
    if not one_table:
        cos, sin = torch.cat([cos, sin]), torch.cat([sin, cos])
    q, k = tensors(2, 6, 7, 2 * half)[0], tensors(2, 2, 7, 2 * half)[1]
    turned = [q, k.transpose(1, 2).contiguous().transpose(1, 2)]
    within_bar(lambda b, q, k: rope(q, k, cos, sin, backend=b), turned, torch.float32, tested="numba")


@pytest.mark.parametrize("V", [1, 41, 123, 1000])
def test_cross_entropy_within_the_bar(within_bar, V):
    hidden, weight = tensors(50, 16)[0] / 3, tensors(V, 16)[0] / 3
    targets = torch.arange(50) % V
    targets[::3] = -100
    within_bar(
        lambda b, h, w: linear_cross_entropy(h, w, targets, z_loss=1e-2, reduction="sum", backend=b),
        [hidden, weight],
        torch.float32,
        tested="numba",
    )


def test_strided(within_bar):
    """gate and up as halves of one projection; rows of a wider tensor; a gradient that is expanded."""
    both = tensors(7, 41, 246)[0]
    within_bar(lambda b, x: swiglu(*x.chunk(2, -1), backend=b), [both], torch.float32, tested="numba")
    wide = tensors(5, 48)[0][:, :24]
    within_bar(lambda b, x: rms_norm(x, torch.ones(24), eps=1e-5, backend=b), [wide], torch.float32, tested="numba")
    x = tensors(5, 24)[0].requires_grad_()
    rms_norm(x, torch.ones(24), eps=1e-5, residual=torch.zeros(5, 24), backend="numba")[1].sum().backward()
    assert torch.equal(x.grad, torch.ones(5, 24))  # only the sum was used: its gradient passes through


def test_threads_change_nothing():
    """Law: the same bits on one thread and on three."""
    before = torch.get_num_threads()
    x, residual = (t.requires_grad_() for t in tensors(2000, 300))
    weight = torch.linspace(-1, 2, 300).requires_grad_()
    found = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            normed, h = rms_norm(x, weight, eps=1e-5, residual=residual, backend="numba")
            gated = swiglu(normed, h, backend="numba")
            found.append([gated, *torch.autograd.grad((gated, normed), (x, residual, weight), (h.detach(),) * 2)])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def test_auto_takes_them_for_training_only(monkeypatch):
    """Law: a gradient is recorded, float32, on the CPU, large; else PyTorch's operators."""
    monkeypatch.setattr(cpu_loops, "SMALLEST", 64)
    x = torch.zeros(8, 8, requires_grad=True)
    assert takes_loops("swiglu", "auto", [x])
    assert not takes_loops("swiglu", "torch", [x])
    assert not takes_loops("swiglu", "auto", [x.detach()])
    assert not takes_loops("swiglu", "auto", [x[:7]])
    assert not takes_loops("swiglu", "auto", [x.double()])
    assert not takes_loops("swiglu", "auto", [x.bfloat16()])
    with torch.no_grad():
        assert not takes_loops("swiglu", "auto", [x])
    chosen = []
    torch.func.vmap(lambda row: chosen.append(takes_loops("swiglu", "auto", [row])) or row)(torch.ones(3, 100))
    assert chosen == [False]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(2, 4, dtype=torch.bfloat16), "it takes float32, got bfloat16"),
        (torch.ones(2, 4, device="meta"), "it needs CPU tensors, got one on meta"),
    ],
)
def test_refused_with_the_reason(monkeypatch, tensor, reason):
    with pytest.raises(ValueError, match=f"swiglu: backend 'numba' can't run here: {reason}"):
        swiglu(tensor, tensor, backend="numba")
    monkeypatch.setattr(cpu_loops, "has_numba", lambda: False)
    with pytest.raises(ValueError, match="numba is not installed"):
        swiglu(torch.ones(2), torch.ones(2), backend="numba")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does, on any Function
def test_compile_takes_the_torch_form():
    """Law: one graph at a training step's size, gradients included."""
    gate, up = (t.requires_grad_() for t in tensors(300, 256))
    run = torch.compile(lambda g, u: swiglu(g, u), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(gate, up), swiglu(gate, up))


def test_fake_tensors_allocate_what_real_ones_do():
    """Law: the peak and what autograd holds are the same bytes, so that memory is predicted right."""

    def peak(make) -> tuple[int, int]:
        x, r, weight, cos, sin = make()
        with LiveBytes() as live:
            live.add([x, r, weight, cos, sin], "weights")
            normed, h = rms_norm(x, weight, eps=1e-5, residual=r, backend="numba")
            out = swiglu(normed, h, backend="numba").view(2, 64, 4, 32).transpose(1, 2)
            q, k = rope(out, out, cos, sin, backend="numba")
            held = live.total
            (q.sum() + k.sum()).backward()
            return held, live.peak()[1].n_bytes

    def real() -> list[Tensor]:
        x, r = (t.requires_grad_() for t in tensors(2, 64, 128))
        return [x, r, torch.ones(128, requires_grad=True), *angles(64, 16)]

    def fake() -> list[Tensor]:
        return [mode.from_tensor(t) for t in real()]

    want = peak(real)
    with FakeTensorMode() as mode:
        assert peak(fake) == want
