"""Worked by hand, law, parity with F.cross_entropy, and the Triton kernel in the interpreter, in PTX and on a GPU."""

import math
import os
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from graft.kernels.cross_entropy import linear_cross_entropy, torch_cross_entropy

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") else []  # CPU tensors here
BACKENDS = ["reference", "torch", *(["numba"] if find_spec("numba") else []), *TRITON]
REDUCTIONS = ["mean", "sum", "none"]
MODULE = "graft.kernels.cross_entropy.triton_cross_entropy"


def inputs(N: int, D: int, V: int, *, seed: int = 0) -> list[torch.Tensor]:
    """hidden, weight and targets of which about a third are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator) / D**0.5
    targets = torch.randint(0, V, (N,), generator=generator)
    return [hidden, weight, targets.where(torch.rand(N, generator=generator) > 0.3, -100)]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of few tokens in both backends, so that small tests have several of them."""
    monkeypatch.setattr(torch_cross_entropy, "chunk_rows", lambda V: 16)
    if TRITON:
        from graft.kernels.cross_entropy import triton_cross_entropy

        monkeypatch.setattr(triton_cross_entropy, "chunk_rows", lambda N, V, itemsize: 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Logits [log 3, 0] give probabilities [3/4, 1/4] and lse = log 4: the loss of target 1 is log 4, its gradient in the
    logits [3/4, -3/4]; with z_loss 1/2 they are log 4 + log(4)^2 / 2 and p (1 + log 4) - onehot."""
    hidden = torch.tensor([[math.log(3.0)]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]), backend=backend)
    loss.backward()
    torch.testing.assert_close(loss.item(), math.log(4))
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.75]]))
    torch.testing.assert_close(weight.grad, torch.tensor([[0.75], [-0.75]]) * math.log(3))
    lse = math.log(4)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]), z_loss=0.5, backend=backend)
    torch.testing.assert_close(loss.item(), lse + lse**2 / 2)
    (grad,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(grad, torch.tensor([[0.75 * (1 + lse)]]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_with_torch(backend, reduction, small_chunks):
    hidden, weight, targets = inputs(41, 24, 123)
    hidden.requires_grad_()
    weight.requires_grad_()
    got = linear_cross_entropy(hidden, weight, targets, reduction=reduction, backend=backend)
    want = F.cross_entropy(hidden @ weight.T, targets, reduction=reduction)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    expected = torch.autograd.grad(want, (hidden, weight), grad)
    for a, b in zip(torch.autograd.grad(got, (hidden, weight), grad), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_label(backend):
    """Law: nothing to learn is a loss of 0 with gradients of 0, under every reduction."""
    for N in (0, 5):
        for reduction in REDUCTIONS:
            hidden, weight, _ = inputs(N, 8, 11)
            hidden.requires_grad_()
            weight.requires_grad_()
            loss = linear_cross_entropy(hidden, weight, torch.full((N,), -100), reduction=reduction, backend=backend)
            loss.sum().backward()
            assert torch.equal(loss, torch.zeros(N) if reduction == "none" else torch.tensor(0.0))
            assert torch.equal(hidden.grad, torch.zeros(N, 8))
            assert torch.equal(weight.grad, torch.zeros(11, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignore_index_and_accumulation(backend):
    """Law: ignored tokens weigh nothing; the sums of two halves are the sum of the whole."""
    hidden, weight, targets = inputs(20, 8, 11)
    kept = targets != -100
    options = {"reduction": "sum", "backend": backend}
    whole = linear_cross_entropy(hidden, weight, targets, **options)
    torch.testing.assert_close(whole, linear_cross_entropy(hidden[kept], weight, targets[kept], **options))
    halves = [
        linear_cross_entropy(h, weight, t, **options) for h, t in zip(hidden.split(10), targets.split(10), strict=True)
    ]
    torch.testing.assert_close(whole, sum(halves))
    renamed = linear_cross_entropy(hidden, weight, targets.where(kept, 3), ignore_index=3, **options)
    only = kept & (targets != 3)
    torch.testing.assert_close(renamed, linear_cross_entropy(hidden[only], weight, targets[only], **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend):
    """Law: logits of thousands neither overflow nor underflow: the gap is the loss."""
    hidden, weight = torch.tensor([[3000.0]]), torch.tensor([[1.0], [0.5], [-1.0]])
    losses = linear_cross_entropy(hidden.expand(3, 1), weight, torch.arange(3), reduction="none", backend=backend)
    torch.testing.assert_close(losses, torch.tensor([0.0, 1500.0, 6000.0]))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice(backend, reduction, small_chunks):
    """Law: a second backward pass, whose gradients are made anew, equals the first; the first's are not touched by it."""
    hidden, weight, targets = inputs(41, 24, 60)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = 3 * linear_cross_entropy(hidden, weight, targets, reduction=reduction, backend=backend).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_frozen_weight_costs_no_product():
    """Law: 3 matrix products when both need gradients, 2 when one does, 1 when none does or under no_grad."""

    class Products(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
            return func(*args, **(kwargs or {}))

    def products(hidden_grad: bool, weight_grad: bool) -> int:
        hidden, weight, targets = inputs(20, 8, 11)
        hidden.requires_grad_(hidden_grad)
        weight.requires_grad_(weight_grad)
        with Products() as mode:
            loss = linear_cross_entropy(hidden, weight, targets)
            if loss.requires_grad:
                loss.backward()
        assert (weight.grad is None) != weight_grad
        return mode.n

    assert [products(h, w) for h, w in ((True, True), (True, False), (False, True), (False, False))] == [3, 2, 2, 1]
    with torch.no_grad():
        assert products(True, False) == 1


def test_frozen_weight_costs_no_product_in_triton(interpreter, monkeypatch):
    """The same, where an opaque operator hides its products."""
    from graft.kernels.cross_entropy import triton_cross_entropy

    sums = []
    monkeypatch.setattr(triton_cross_entropy, "add_product_", lambda *args: sums.append(args))
    hidden, weight, targets = inputs(20, 8, 11)
    linear_cross_entropy(hidden.requires_grad_(), weight, targets, backend="triton").backward()
    assert sums == []
    linear_cross_entropy(hidden, weight.requires_grad_(), targets, backend="triton").backward()
    assert len(sums) == 1


def test_never_holds_all_logits():
    """Law: no tensor made on the way is as large as tokens x vocabulary, or even an eighth of it."""

    class Largest(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                self.n = max(self.n, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    N, D, V = 2048, 8, 1000
    hidden, weight, targets = inputs(N, D, V)
    with pytest.MonkeyPatch.context() as patch, Largest() as mode:
        patch.setattr(torch_cross_entropy, "CHUNK_BYTES", 0)  # the chunks of a large vocabulary, at a small one
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets).backward()
    assert mode.n <= N * V / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_interpreter(interpreter, within_bar, dtype, reduction, small_chunks):
    hidden, weight, targets = inputs(41, 24, 123)
    options = {"reduction": reduction, "z_loss": 1e-3}
    within_bar(lambda b, h, w: linear_cross_entropy(h, w, targets, **options, backend=b), [hidden, weight], dtype)


def test_interpreter_long_rows(interpreter, within_bar, monkeypatch):
    """A vocabulary of several tiles, which is no multiple of one, and strided inputs."""
    from graft.kernels.cross_entropy import triton_cross_entropy

    monkeypatch.setattr(triton_cross_entropy, "BLOCK_V", 64)
    hidden, weight, targets = inputs(9, 6, 300)
    hidden, weight = hidden.T.contiguous().T, torch.stack((weight, weight), -1)[..., 0]
    within_bar(lambda b, h, w: linear_cross_entropy(h, w, targets, backend=b), [hidden, weight], torch.float32)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 50), st.sampled_from(REDUCTIONS), st.booleans())
@settings(max_examples=20, deadline=None)
def test_any_shape(N, D, V, reduction, z_loss):
    hidden, weight, targets = inputs(N, D, V)
    options = {"reduction": reduction, "z_loss": 0.01 * z_loss}
    results = []
    for backend in BACKENDS:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(*leaves, targets, **options, backend=backend)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend, reduction):
    hidden, weight, targets = inputs(5, 3, 4)
    options = {"reduction": reduction, "z_loss": 0.1, "backend": backend}
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, **options), leaves)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_autocast_keeps_master_gradients(backend):
    """Under autocast the products are half, the loss and the gradients of float32 leaves are float32."""
    hidden, weight, targets = inputs(41, 24, 60)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    want = F.cross_entropy(hidden @ weight.T, targets)
    assert abs(loss.item() - want.item()) < 2e-3  # float16's 2^-11 of logits up to 4
    assert loss.item() != want.item()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does, on any Function
def test_compile_and_fake():
    hidden, weight, targets = inputs(20, 8, 11)
    hidden.requires_grad_()
    run = torch.compile(lambda h: linear_cross_entropy(h, weight, targets), backend="aot_eager", fullgraph=True)
    (got,), (want,) = (
        torch.autograd.grad(f(hidden), hidden) for f in (run, lambda h: linear_cross_entropy(h, weight, targets))
    )
    torch.testing.assert_close(got, want)
    with FakeTensorMode():
        fake = torch.empty(20, 8, requires_grad=True)
        linear_cross_entropy(fake, torch.empty(11, 8), torch.zeros(20).long()).backward()
        assert fake.grad.shape == (20, 8)


def test_registered_ops(interpreter):
    from graft.kernels.cross_entropy.triton_cross_entropy import linear_cross_entropy_op

    hidden, weight, targets = inputs(20, 8, 11)
    for needs in ((True, True), (False, False)):
        torch.library.opcheck(
            linear_cross_entropy_op, (hidden, weight, targets, torch.ones(1), -100, 0.0, *needs, torch.float32)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": torch.zeros(1, 5, 8)},
            r"hidden \(1, 5, 8\) and weight \(11, 8\) don't fit; .* flatten batch and time",
        ),
        ({"weight": torch.zeros(11, 9)}, r"hidden \(5, 8\) and weight \(11, 9\) don't fit"),
        ({"hidden": torch.zeros(5, 8).int()}, "hidden has dtype int32"),
        ({"targets": torch.zeros(4).long()}, r"targets has shape \(4,\), not \(5,\)"),
        ({"targets": torch.zeros(5)}, "targets has dtype float32; it takes int64 or int32"),
        ({"targets": torch.tensor([0, 1, 11, 0, 0])}, "target 11 is outside the vocabulary of 11"),
        (
            {"targets": torch.tensor([0, 1, -1, 0, 0])},
            "target -1 is outside the vocabulary of 11; .* ignore_index=-100",
        ),
        ({"reduction": "average"}, "unknown reduction 'average'; choose mean, sum or none"),
        ({"weight": torch.zeros(11, 8, device="meta")}, "weight is on meta but hidden is on cpu"),
    ],
)
def test_bad_input(change, message):
    arguments = {"hidden": torch.zeros(5, 8), "weight": torch.zeros(11, 8), "targets": torch.zeros(5).long()} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_triton_refuses(monkeypatch, interpreter):
    import triton

    hidden, weight, targets = inputs(5, 8, 11)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(
        ValueError, match="linear_cross_entropy: backend 'triton' can't run here: it needs CUDA tensors"
    ):
        linear_cross_entropy(hidden, weight, targets, backend="triton")


def test_ptx(compile_kernels):
    """16-byte accesses, nothing spilled, shared memory for the two reductions only."""
    args = {
        "logits": "*bf16",
        "targets": "*i64",
        "row_scale": "*fp32",
        "losses": "*fp32",
        "V": "i32:16",
        "stride": "i32:16",
    }
    args |= {"stride_scale": "i32", "ignore_index": "i32", "z_loss": "fp32", "BLOCK_V": 8192}
    jobs = [
        {
            "module": MODULE,
            "kernel": "cross_entropy_rows",
            "arch": arch,
            "num_warps": 16,
            "args": args | {"NEED_GRAD": grad},
        }
        for arch in (80, 90)
        for grad in (True, False)
    ]
    for job, compiled in zip(jobs, compile_kernels(jobs), strict=True):
        assert compiled.spill_bytes == 0
        assert compiled.shared <= 1024
        assert "ld.global.v4" in compiled.ptx
        assert ("st.global.v4" in compiled.ptx) == job["args"]["NEED_GRAD"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu(cuda, within_bar, dtype):
    hidden, weight, targets = (t.to(cuda) for t in inputs(3000, 128, 5003))
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "z_loss": 1e-3}
        within_bar(lambda b, h, w: linear_cross_entropy(h, w, targets, **options, backend=b), [hidden, weight], dtype)  # noqa: B023


@pytest.mark.gpu
def test_gpu_master_weights(cuda, monkeypatch):
    """Under autocast weight's gradient is summed in float32 by cuBLAS: over 24 chunks it stays as near as one product."""
    from graft.kernels.cross_entropy import triton_cross_entropy

    monkeypatch.setattr(triton_cross_entropy, "chunk_rows", lambda N, V, itemsize: 128)
    hidden, weight, targets = (t.to(cuda) for t in inputs(3000, 128, 5003))
    weight.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        linear_cross_entropy(hidden, weight, targets, backend="triton").backward()
    (want,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), weight)
    assert weight.grad.dtype == torch.float32
    assert (weight.grad - want).norm() / want.norm() < 2**-7  # bfloat16's rounding of logits, probabilities and hidden
