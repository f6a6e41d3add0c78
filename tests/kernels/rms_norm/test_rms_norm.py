"""Worked by hand, law, parity with F.rms_norm, and the Triton kernels in the interpreter, in PTX and on a GPU."""

import os
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from graft.kernels.rms_norm import rms_norm

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") else []  # CPU tensors here
BACKENDS = ["reference", "torch", *(["numba"] if find_spec("numba") else []), *TRITON]
MODULE = "graft.kernels.rms_norm.triton_rms_norm"


def inputs(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) for s in (shape, shape[-1:], shape)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """mean([3, 4]^2) + 3.5 = 16, so [3, 4] / 4 * [1, 2] = [0.75, 2]; with 1 added to each: (16 + 25) / 2 + 3.5 = 24."""
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0])
    torch.testing.assert_close(rms_norm(x, weight, eps=3.5, backend=backend), torch.tensor([[0.75, 2.0]]))
    normed, stream = rms_norm(x, weight, eps=3.5, residual=torch.ones(1, 2), backend=backend)
    torch.testing.assert_close(stream, torch.tensor([[4.0, 5.0]]))
    torch.testing.assert_close(normed, torch.tensor([[4 / 24**0.5, 10 / 24**0.5]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_with_torch(backend):
    x, weight, _ = inputs(3, 41, 123)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-5, backend=backend), F.rms_norm(x, (123,), weight, 1e-5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_stay_zero(backend):
    """Law: eps keeps a padded row finite, forward and backward."""
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), eps=1e-6, backend=backend)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    x, weight = torch.randn(0, 3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = rms_norm(x, weight, eps=1e-6, backend=backend)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 8)
    assert torch.equal(weight.grad, torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(41, 123), (3, 2, 64), (5, 2500)])
def test_interpreter(interpreter, within_bar, dtype, shape):
    x, weight, residual = inputs(*shape)
    within_bar(lambda b, x, w: rms_norm(x, w, eps=1e-5, backend=b), [x, weight], dtype)
    within_bar(lambda b, x, w, r: rms_norm(x, w, eps=1e-5, residual=r, backend=b), [x, weight, residual], dtype)


def test_interpreter_strided(interpreter, within_bar):
    """Rows that are slices of wider ones, and rows in transposed order."""
    _, weight, residual = inputs(2, 7, 5, 24)
    wide = torch.randn(2, 7, 5, 48)[..., :24]
    within_bar(
        lambda b, x, w, r: rms_norm(x, w, eps=1e-5, residual=r, backend=b),
        [wide, weight, residual.transpose(1, 2).contiguous().transpose(1, 2)],
        torch.float32,
    )


@given(st.lists(st.integers(1, 5), min_size=0, max_size=2), st.integers(1, 70), st.booleans())
@settings(max_examples=15, deadline=None)
def test_any_shape(lead, D, with_residual):
    """Law: one function, whatever the backend and the shape."""
    x, weight, residual = inputs(*lead, D)
    added = {"residual": residual} if with_residual else {}
    want = rms_norm(x, weight, eps=1e-5, **added, backend="reference")
    for backend in BACKENDS[1:]:
        torch.testing.assert_close(rms_norm(x, weight, eps=1e-5, **added, backend=backend), want)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    x, weight, residual = (t.double().requires_grad_() for t in inputs(3, 5))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=1e-3, backend=backend), (x, weight))
    assert torch.autograd.gradcheck(
        lambda x, w, r: rms_norm(x, w, eps=1e-3, residual=r, backend=backend), (x, weight, residual)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weight_and_checkpoint(backend):
    """Law: a recomputed forward pass gives the same gradient; a frozen weight gets none."""
    x, weight, residual = inputs(4, 16)
    x.requires_grad_()

    def run(x):
        return sum(rms_norm(x, weight, eps=1e-5, residual=residual, backend=backend)).sum()

    (plain,) = torch.autograd.grad(run(x), x)
    (recomputed,) = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), x)
    assert torch.equal(plain, recomputed)
    assert weight.grad is None


def test_mixed_dtypes_follow_the_stream():
    """Under autocast a float16 branch is added to a float32 stream."""
    x, weight, residual = inputs(4, 16)
    for backend in set(BACKENDS) - {"numba"}:  # the compiled loops take float32 alone
        half = x.half().requires_grad_()
        normed, stream = rms_norm(half, weight, eps=1e-5, residual=residual, backend=backend)
        (normed + stream).sum().backward()
        assert normed.dtype == stream.dtype == torch.float32
        assert half.grad.dtype == torch.float16


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does, on any Function
def test_compile():
    x, weight, residual = inputs(4, 16)
    run = torch.compile(lambda x: rms_norm(x, weight, eps=1e-5, residual=residual), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x), rms_norm(x, weight, eps=1e-5, residual=residual))


def test_registered_ops(interpreter):
    from graft.kernels.rms_norm import triton_rms_norm as ops

    x, weight, residual = (t.requires_grad_() for t in inputs(4, 16))
    torch.library.opcheck(ops.rms_norm_op, (x, weight, 1e-5))
    torch.library.opcheck(ops.add_rms_norm_op, (x, residual, weight, 1e-5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, "x has dtype int64; it takes float32, float16, bfloat16, float64"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
        ({"weight": torch.ones(5)}, r"weight has shape \(5,\), not \(4,\); it has one entry per feature of x \(2, 4\)"),
        ({"residual": torch.ones(4)}, r"residual has shape \(4,\), not \(2, 4\)"),
        ({"weight": torch.ones(4, device="meta")}, "weight is on meta but x is on cpu; move them"),
        ({"eps": -1.0}, "eps must be >= 0, got -1.0"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": torch.ones(2, 4), "weight": torch.ones(4), "eps": 1e-5, **arguments})


def test_triton_refuses(monkeypatch, interpreter):
    import triton

    long = torch.ones(1, 16385)
    with pytest.raises(ValueError, match="its rows are at most 16384 long, got 16385"):
        rms_norm(long, long[0], eps=1e-5, backend="triton")
    with pytest.raises(ValueError, match="it takes float32, float16, bfloat16, got float64"):
        rms_norm(torch.ones(2, 4).double(), torch.ones(4).double(), eps=1e-5, backend="triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="it needs CUDA tensors, got one on cpu"):
        rms_norm(torch.ones(2, 4), torch.ones(4), eps=1e-5, backend="triton")


def test_ptx(compile_kernels):
    """Every shipped tile: 16-byte accesses, no spilled registers up to rows of 8192 (16384 spills a little, backward)."""
    from graft.kernels.rms_norm.triton_rms_norm import tile

    pointers = {n: "*bf16" for n in ("weight", "y", "h_out", "dy", "dh", "h", "dx", "x", "residual")}
    pointers |= {n: "*fp32" for n in ("rstd", "rstd_out", "dw_table")}
    strides = {n: "i32:16" for n in ("D", "stride_x", "stride_residual", "stride_dy", "stride_dh", "stride_h")}
    every = {**pointers, **strides, "N": "i32", "eps": "fp32", "HAS_RESIDUAL": True, "HAS_DH": True, "NEED_DW": True}
    kernels = {
        "rms_norm_forward": "x residual weight y h_out rstd_out N D stride_x stride_residual eps HAS_RESIDUAL",
        "rms_norm_backward": "dy dh h weight rstd dx dw_table N D stride_dy stride_dh stride_h HAS_DH NEED_DW",
    }
    jobs = []
    for arch in (80, 90):
        for D in (128, 4096, 8192):
            shape = tile(D)
            warps = shape.pop("num_warps")
            for kernel, names in kernels.items():
                args = {name: every[name] for name in names.split()} | shape
                jobs.append({"module": MODULE, "kernel": kernel, "arch": arch, "num_warps": warps, "args": args})
    for compiled in compile_kernels(jobs):
        assert compiled.spill_bytes == 0
        assert compiled.shared <= 32 * 1024
        assert "ld.global.v4" in compiled.ptx
        assert "st.global.v4" in compiled.ptx


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu(cuda, within_bar, dtype):
    for shape in ((41, 123), (300, 64), (1000, 4096), (7, 16384)):
        tensors = [t.to(cuda) for t in inputs(*shape)]
        within_bar(lambda b, x, w, r: rms_norm(x, w, eps=1e-5, residual=r, backend=b), tensors, dtype)
