"""Worked by hand, law, parity with F.silu, and the Triton kernels in the interpreter, in PTX and on a GPU."""

import os
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from graft.kernels.swiglu import swiglu

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") else []  # CPU tensors here
BACKENDS = ["reference", "torch", *(["numba"] if find_spec("numba") else []), *TRITON]
MODULE = "graft.kernels.swiglu.triton_swiglu"


def inputs(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 3 for _ in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """sigmoid(log 3) = 3/4, so silu(log 3) * 4 = 3 log 3 = 3.2958; silu(0) = 0."""
    gate = torch.tensor([0.0, 3.0]).add_(torch.tensor([0.0, torch.tensor(3.0).log() - 3.0]))
    got = swiglu(gate, torch.tensor([7.0, 4.0]), backend=backend)
    torch.testing.assert_close(got, torch.tensor([0.0, 3.295837]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_with_torch(backend):
    gate, up = (t.requires_grad_() for t in inputs(41, 123))
    got, want = swiglu(gate, up, backend=backend), F.silu(gate) * up
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, (gate, up), grad), torch.autograd.grad(want, (gate, up), grad), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_keeps_only_gate_and_up():
    """Law: what the backward pass holds is its inputs, not silu(gate)."""
    gate, up = (t.requires_grad_() for t in inputs(4, 8))
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up, backend="torch")
    assert held == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(41, 123), (3, 2, 64), (2, 1500), (0, 8)])
def test_interpreter(interpreter, within_bar, dtype, shape):
    within_bar(lambda b, g, u: swiglu(g, u, backend=b), inputs(*shape), dtype)


def test_interpreter_strided(interpreter, within_bar):
    """gate and up as halves of one projection, and in transposed order."""
    (both, _) = inputs(7, 41, 246)
    within_bar(lambda b, x: swiglu(*x.chunk(2, -1), backend=b), [both], torch.float32)
    within_bar(lambda b, x: swiglu(*x.transpose(0, 1).chunk(2, -1), backend=b), [both], torch.float32)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_any_shape(shape):
    gate, up = inputs(*shape)
    want = swiglu(gate, up, backend="reference")
    for backend in BACKENDS[1:]:
        torch.testing.assert_close(swiglu(gate, up, backend=backend), want)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    gate, up = (t.double().requires_grad_() for t in inputs(3, 5))
    assert torch.autograd.gradcheck(lambda g, u: swiglu(g, u, backend=backend), (gate, up))


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint(backend):
    gate, up = (t.requires_grad_() for t in inputs(4, 16))
    plain = torch.autograd.grad(swiglu(gate, up, backend=backend).sum(), (gate, up))
    again = checkpoint(lambda g, u: swiglu(g, u, backend=backend), gate, up, use_reentrant=False)
    for a, b in zip(plain, torch.autograd.grad(again.sum(), (gate, up)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does, on any Function
def test_compile():
    gate, up = inputs(4, 16)
    run = torch.compile(lambda g, u: swiglu(g, u), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(gate, up), swiglu(gate, up))


def test_registered_ops(interpreter):
    from graft.kernels.swiglu import triton_swiglu as ops

    torch.library.opcheck(ops.swiglu_op, tuple(t.requires_grad_() for t in inputs(4, 16)))


def test_bad_input(monkeypatch, interpreter):
    import triton

    gate, up = inputs(2, 4)
    with pytest.raises(ValueError, match=r"up has shape \(4,\), not \(2, 4\); it has gate's shape"):
        swiglu(gate, up[0])
    with pytest.raises(ValueError, match="gate is float32 but up is float16; cast one to the other"):
        swiglu(gate, up.half())
    with pytest.raises(ValueError, match="up has dtype int32"):
        swiglu(gate, up.int())
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(
        ValueError, match="swiglu: backend 'triton' can't run here: it needs CUDA tensors, got one on cpu"
    ):
        swiglu(gate, up, backend="triton")


def test_ptx(compile_kernels):
    """16-byte accesses, nothing spilled, no shared memory."""
    forward = {"gate": "*bf16", "up": "*bf16", "out": "*bf16", "F": "i32:16", "BLOCK": 1024}
    forward |= {"stride_gate": "i32:16", "stride_up": "i32:16"}
    backward = {k: v for k, v in forward.items() if k != "out"}
    backward |= {"grad": "*bf16", "d_gate": "*bf16", "d_up": "*bf16", "stride_grad": "i32:16"}
    kernels = {"swiglu_forward": forward, "swiglu_backward": backward}
    jobs = [
        {"module": MODULE, "kernel": kernel, "arch": arch, "args": args}
        for arch in (80, 90)
        for kernel, args in kernels.items()
    ]
    for compiled in compile_kernels(jobs):
        assert (compiled.spill_bytes, compiled.shared) == (0, 0)
        assert "ld.global.v4" in compiled.ptx
        assert "st.global.v4" in compiled.ptx


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu(cuda, within_bar, dtype):
    for shape in ((41, 123), (300, 4096)):
        within_bar(lambda b, g, u: swiglu(g, u, backend=b), [t.to(cuda) for t in inputs(*shape)], dtype)
