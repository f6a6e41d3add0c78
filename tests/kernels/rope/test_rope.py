"""Worked by hand, law, parity with transformers, and the Triton kernel in the interpreter, in PTX and on a GPU."""

import math
import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from graft.kernels.rope import rope

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") else []  # CPU tensors here
BACKENDS = ["reference", "torch", *(["numba"] if find_spec("numba") else []), *TRITON]
MODULE = "graft.kernels.rope.triton_rope"


def inputs(B: int, H: int, K: int, T: int, Dh: int, *, tables: int = 1, seed: int = 0) -> list[torch.Tensor]:
    """q, k, cos, sin with angles position * 10000^(-2 i / Dh); with tables = B each row of the batch starts elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, n, T, Dh, generator=generator) for n in (H, K))
    start = torch.randint(0, 50, (tables, 1), generator=generator)
    angles = (start + torch.arange(T)).unsqueeze(-1) * 10000 ** (-torch.arange(0, Dh, 2) / Dh)
    return [q, k, angles.cos(), angles.sin()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """A quarter turn takes the pair (x_0, x_2) = (1, 3) to (-3, 1) and leaves (x_1, x_3) = (2, 4), whose angle is 0."""
    q = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 1, 4)
    angles = torch.tensor([math.pi / 2, 0]).view(1, 1, 2)
    got, _ = rope(q, q.clone(), angles.cos(), angles.sin(), backend=backend)
    torch.testing.assert_close(got.flatten(), torch.tensor([-3.0, 2, 1, 4]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_with_transformers(backend):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, cos, sin = inputs(2, 4, 2, 9, 16, tables=2)
    want = modeling.apply_rotary_pos_emb(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    for got, expected in zip(rope(q, k, cos, sin, backend=backend), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_depend_on_distance_only(backend):
    """Law: q_t . k_s is the same when both move by one position, and a turn keeps lengths."""
    q, k, cos, sin = inputs(1, 1, 1, 12, 32)
    q, k = q[:, :, :1].expand(-1, -1, 12, -1), k[:, :, :1].expand(-1, -1, 12, -1)
    turned_q, turned_k = rope(q, k, cos, sin, backend=backend)
    scores = (turned_q @ turned_k.transpose(-1, -2))[0, 0]
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], atol=1e-4, rtol=1e-4)  # angles up to 61 in float32
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 4, 2, 7, 16), (1, 3, 3, 41, 24), (1, 40, 8, 3, 64), (2, 2, 1, 0, 8)])
def test_interpreter(interpreter, within_bar, dtype, shape):
    q, k, cos, sin = inputs(*shape, tables=shape[0])
    within_bar(lambda b, q, k: rope(q, k, cos, sin, backend=b), [q, k], dtype)


def test_interpreter_strided(interpreter, within_bar):
    """Heads behind time, as a projection leaves them; q and k as slices of one tensor; one table for the whole batch."""
    q, k, cos, sin = inputs(2, 4, 2, 7, 16)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    within_bar(lambda b, q, k: rope(q, k, cos, sin, backend=b), [q, k], torch.float32)
    both = torch.randn(2, 7, 6, 16)
    run = lambda b, x: rope(*x.transpose(1, 2).split((4, 2), 1), cos, sin, backend=b)  # noqa: E731
    within_bar(run, [both], torch.float32)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 20), st.booleans())
@settings(max_examples=15, deadline=None)
def test_any_shape(B, H, K, T, half, own_tables):
    q, k, cos, sin = inputs(B, H, K, T, 2 * half, tables=B if own_tables else 1)
    want = rope(q, k, cos, sin, backend="reference")
    for backend in BACKENDS[1:]:
        for a, b in zip(rope(q, k, cos, sin, backend=backend), want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace(backend):
    """Law: the same numbers, in the tensors that came in."""
    q, k, cos, sin = inputs(2, 4, 2, 7, 16)
    want = rope(q, k, cos, sin, backend=backend)
    got = rope(q, k, cos, sin, inplace=True, backend=backend)
    assert got[0].data_ptr() == q.data_ptr()
    assert got[1].data_ptr() == k.data_ptr()
    for a, b in zip((q, k), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    q, k, cos, sin = (t.double() for t in inputs(2, 2, 1, 3, 4))
    run = lambda q, k: rope(q, k, cos, sin, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, (q.requires_grad_(), k.requires_grad_()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint(backend):
    q, k, cos, sin = inputs(2, 2, 1, 3, 4)
    q.requires_grad_()
    run = lambda q: rope(q, k, cos, sin, backend=backend)[0].square().sum()  # noqa: E731
    (plain,) = torch.autograd.grad(run(q), q)
    (recomputed,) = torch.autograd.grad(checkpoint(run, q, use_reentrant=False), q)
    assert torch.equal(plain, recomputed)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does, on any Function
def test_compile():
    q, k, cos, sin = inputs(2, 2, 1, 3, 4)
    run = torch.compile(lambda q, k: rope(q, k, cos, sin), backend="aot_eager", fullgraph=True)
    for a, b in zip(run(q, k), rope(q, k, cos, sin), strict=True):
        torch.testing.assert_close(a, b)


def test_registered_ops(interpreter):
    from graft.kernels.rope import triton_rope as ops

    q, k, cos, sin = inputs(2, 2, 1, 3, 4)
    torch.library.opcheck(ops.rope_inplace_op, (q.clone(), k.clone(), cos, sin))
    torch.library.opcheck(ops.rope_op, (q.requires_grad_(), k.requires_grad_(), cos, sin, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 4, 7)}, r"q and k have shapes \(2, 4, 7\) and \(2, 2, 7, 16\); it takes \(B, H, T, Dh\)"),
        ({"q": (2, 4, 7, 15), "k": (2, 2, 7, 15)}, "the head size 15 is odd"),
        ({"k": (2, 2, 6, 16)}, r"k \(2, 2, 6, 16\) and q \(2, 4, 7, 16\) differ in more than the number of heads"),
        ({"cos": (1, 7, 16)}, r"cos has shape \(1, 7, 16\); it takes \(2, 7, 8\) or \(1, 7, 8\)"),
        ({"cos": (2, 7, 8)}, r"cos \(2, 7, 8\) torch.float32 and sin \(1, 7, 8\) torch.float32 must be of one kind"),
    ],
)
def test_bad_shapes(change, message):
    shapes = {"q": (2, 4, 7, 16), "k": (2, 2, 7, 16), "cos": (1, 7, 8), "sin": (1, 7, 8)} | change
    with pytest.raises(ValueError, match=message):
        rope(*(torch.zeros(shape) for shape in shapes.values()))


def test_bad_input(monkeypatch, interpreter):
    import triton

    q, k, cos, sin = inputs(2, 2, 1, 3, 4)
    with pytest.raises(ValueError, match="q has dtype int64"):
        rope(q.long(), k, cos, sin)
    with pytest.raises(ValueError, match="inplace=True, but gradients of q or k are recorded"):
        rope(q.clone().requires_grad_(), k, cos, sin, inplace=True)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(
        ValueError, match="rope: backend 'triton' can't run here: it needs CUDA tensors, got one on cpu"
    ):
        rope(q, k, cos, sin, backend="triton")


def test_ptx(compile_kernels):
    """Head size 128: 16-byte accesses, nothing spilled, no shared memory."""
    args = {"q": "*bf16", "k": "*bf16", "q_out": "*bf16", "k_out": "*bf16", "cos": "*fp32", "sin": "*fp32"}
    args |= {"T": "i32", "H": "i32", "K": "i32", "SIGN": 1, "HALF": 64, "BLOCK_H": 16, "BLOCK_HALF": 64}
    for tensor, axes in (("q", "bht"), ("k", "bht"), ("qo", "bht"), ("ko", "bht"), ("cos", "bt"), ("sin", "bt")):
        args |= {f"{tensor}_{axis}": "i32:16" for axis in axes} | {f"{tensor}_d": 1}
    jobs = [{"module": MODULE, "kernel": "rope_kernel", "arch": arch, "args": args} for arch in (80, 90)]
    for compiled in compile_kernels(jobs):
        assert (compiled.spill_bytes, compiled.shared) == (0, 0)
        assert "ld.global.v4" in compiled.ptx
        assert "st.global.v4" in compiled.ptx


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu(cuda, within_bar, dtype):
    q, k, cos, sin = (t.to(cuda) for t in inputs(2, 32, 8, 300, 128, tables=2))
    within_bar(lambda b, q, k: rope(q, k, cos, sin, backend=b), [q, k], dtype)
