"""Worked by hand, law, and the Triton kernels in the interpreter, in PTX and on a GPU."""

import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from graft.kernels.grouped_lora import grouped_lora

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") else []  # CPU tensors here
BACKENDS = ["reference", "torch", *TRITON]
MODULE = "graft.kernels.grouped_lora.triton_grouped_lora"


def inputs(N: int, d_in: int, d_out: int, ranks: list[int], seed: int = 0):
    """x, the As, the Bs, rows in which every adapter and -1 occur if N allows, and scales; values of order one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, d_in, generator=generator)
    lora_a = [torch.randn(r, d_in, generator=generator) / d_in**0.5 for r in ranks]
    lora_b = [torch.randn(d_out, r, generator=generator) / r**0.5 for r in ranks]
    rows = torch.randint(-1, len(ranks), (N,), generator=generator)
    rows[: len(ranks)] = torch.arange(len(ranks))[:N]
    return x, lora_a, lora_b, rows, [0.5 / (i + 1) for i in range(len(ranks))]


def bar(within_bar, N, d_in, d_out, ranks, dtype, device="cpu"):
    x, lora_a, lora_b, rows, scales = inputs(N, d_in, d_out, ranks)
    n, rows = len(ranks), rows.to(device)

    def run(backend, x, *matrices):
        return grouped_lora(x, matrices[:n], matrices[n:], rows, scales, backend=backend)

    within_bar(run, [t.to(device) for t in (x, *lora_a, *lora_b)], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Adapter 0 (rank 1): x A^T = 1 + 2 = 3, times B = [1, 2, 0] and scale 2 -> [6, 12, 0]. Adapter 1 (rank 2) swaps x and
    scales by 1/2: [1, 2] -> [1, 0.5, 0]. Row 2 has none: zeros."""
    a0, b0 = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [2.0], [0.0]])
    a1, b1 = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    got = grouped_lora(x, [a0, a1], [b0, b1], torch.tensor([0, 1, -1]), [2.0, 0.5], backend=backend)
    torch.testing.assert_close(got, torch.tensor([[6.0, 12, 0], [1, 0.5, 0], [0, 0, 0]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_adapter_is_plain_lora(backend):
    x, lora_a, lora_b, _, _ = inputs(5, 16, 24, [4, 8])
    got = grouped_lora(x, lora_a, lora_b, torch.full((5,), 1), torch.tensor([3.0, 0.25]), backend=backend)
    torch.testing.assert_close(got, 0.25 * (x @ lora_a[1].T @ lora_b[1].T))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_independent(backend):
    """Law: a row's delta doesn't change with its neighbours, and no adapter at all gives zeros."""
    x, lora_a, lora_b, rows, scales = inputs(9, 16, 24, [4, 8, 3])
    together = grouped_lora(x, lora_a, lora_b, rows, scales, backend=backend)
    for n in range(9):
        alone = grouped_lora(x[n : n + 1], lora_a, lora_b, rows[n : n + 1], scales, backend=backend)
        torch.testing.assert_close(together[n : n + 1], alone)
    nothing = grouped_lora(x, lora_a, lora_b, torch.full((9,), -1, dtype=torch.int32), scales, backend=backend)
    assert torch.equal(nothing, torch.zeros(9, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 1200, 41, [8, 3]), (5, 41, 123, [3, 16, 5])])
def test_interpreter_rowwise(interpreter, within_bar, dtype, shape):
    bar(within_bar, *shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(5, 41, 123, [3, 16, 5]), (70, 130, 70, [3, 16]), (33, 40, 50, [100])])
def test_interpreter_tiles(interpreter, within_bar, dtype, shape, monkeypatch):
    """Many rows: tiles of them, several adapters in one tile, tensor cores on a GPU."""
    from graft.kernels.grouped_lora import triton_grouped_lora

    monkeypatch.setattr(triton_grouped_lora, "ROWWISE", 0)
    bar(within_bar, *shape, dtype)


@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=4))
@settings(max_examples=12, deadline=None)
def test_any_shape(N, d_in, d_out, ranks):
    x, lora_a, lora_b, rows, scales = inputs(N, d_in, d_out, ranks)
    want = grouped_lora(x, lora_a, lora_b, rows, scales, backend="reference")
    for backend in BACKENDS[1:]:
        got = grouped_lora(x, lora_a, lora_b, rows, scales, backend=backend)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    x, lora_a, lora_b, rows, scales = inputs(5, 4, 3, [2, 1])
    leaves = [t.double().requires_grad_() for t in (x, *lora_a, *lora_b)]
    run = lambda x, *m: grouped_lora(x, m[:2], m[2:], rows, scales, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_adapters_and_checkpoint(backend):
    x, lora_a, lora_b, rows, scales = inputs(5, 16, 24, [4, 8])
    x.requires_grad_()
    run = lambda x: grouped_lora(x, lora_a, lora_b, rows, scales, backend=backend).square().sum()  # noqa: E731
    (plain,) = torch.autograd.grad(run(x), x)
    (recomputed,) = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), x)
    assert torch.equal(plain, recomputed)


def test_compile_and_fake():
    """Where rows can't be read, torch's form falls back to one of fixed shapes."""
    x, lora_a, lora_b, rows, scales = inputs(5, 16, 24, [4, 8])
    run = torch.compile(lambda x: grouped_lora(x, lora_a, lora_b, rows, scales), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x), grouped_lora(x, lora_a, lora_b, rows, scales))
    with FakeTensorMode() as mode:
        fake = grouped_lora(
            *(mode.from_tensor(x), [torch.empty(4, 16)], [torch.empty(24, 4)]), torch.empty(5).long(), [1.0]
        )
    assert fake.shape == (5, 24)


def test_registered_ops(interpreter):
    from graft.kernels.grouped_lora import triton_grouped_lora as ops

    x, lora_a, lora_b, rows, _ = inputs(5, 16, 24, [4, 8])
    leaves = ([t.requires_grad_() for t in matrices] for matrices in (lora_a, lora_b))
    torch.library.opcheck(ops.grouped_lora_op, (x.requires_grad_(), *leaves, rows.int(), torch.ones(2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 5, 16)}, r"x has shape \(1, 5, 16\); it takes \(N, in\)"),
        ({"x": torch.zeros(5, 16).int()}, "x has dtype int32"),
        ({"rows": torch.zeros(4).long()}, r"rows has shape \(4,\), not \(5,\)"),
        ({"rows": torch.zeros(5)}, "rows has dtype float32; it takes int64 or int32"),
        ({"rows": torch.tensor([0, 1, 2, 0, 0])}, r"rows span 0..2; each must be in -1..1"),
        ({"rows": torch.zeros(5, device="meta").long()}, "rows is on meta, the other inputs are on cpu"),
        ({"scales": [1.0]}, "2 lora_a, 2 lora_b and 1 scales; give one of each"),
        ({"lora_a": [], "lora_b": [], "scales": []}, "0 lora_a, 0 lora_b and 0 scales"),
        (
            {"lora_a": [torch.zeros(4, 16), torch.zeros(8, 15)]},
            r"adapter 1 has lora_a \(8, 15\) and lora_b \(24, 8\); it takes \(R, 16\) and \(24, R\)",
        ),
    ],
)
def test_bad_input(change, message):
    x, lora_a, lora_b, rows, scales = inputs(5, 16, 24, [4, 8])
    arguments = {"x": x, "lora_a": lora_a, "lora_b": lora_b, "rows": rows, "scales": scales} | change
    with pytest.raises(ValueError, match=message):
        grouped_lora(**arguments)


def test_triton_refuses(monkeypatch, interpreter):
    import triton

    x, lora_a, lora_b, rows, scales = inputs(5, 16, 24, [300])
    with pytest.raises(ValueError, match="its ranks are at most 256, got 300"):
        grouped_lora(x, lora_a, lora_b, rows, scales, backend="triton")
    with pytest.raises(ValueError, match="all adapters must have one dtype, got float16, float32"):
        grouped_lora(x, [lora_a[0][:8].half()], [lora_b[0][:, :8]], rows, scales, backend="triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="it needs CUDA tensors, got one on cpu"):
        grouped_lora(x, [lora_a[0][:8]], [lora_b[0][:, :8]], rows, scales, backend="triton")


def test_ptx(compile_kernels, usable_shared):
    """Shipped tiles at ranks 16 and 256: nothing spilled; many rows on tensor cores (wgmma at rank 16 on sm_90)."""
    from graft.kernels.grouped_lora.triton_grouped_lora import ROWWISE, tiles

    common = {"table": "*i64", "like": "*bf16", "ranks": "*i32", "rows": "*i32", "sums": "*fp32", "N": "i32"}
    common |= {"n_adapters": "i32", "TRANSPOSED": False, "ALIGNED": True, "RANKS_OF": 16}
    shrink = common | {"x": "*bf16", "K": "i32:16", "stride_x": "i32:16", "per_split": "i32:16"}
    expand = common | {"out": "*bf16", "O": "i32:16", "n_splits": "i32", "scales": "*fp32"}
    gradient = {"sums": "*fp32", "x": "*bf16", "rows": "*i32", "scales": "*fp32", "grads": "*fp32", "N": "i32"}
    gradient |= {"C": "i32:16", "stride_x": "i32:16", "n_splits": "i32", "BLOCK_N": 32, "BLOCK_C": 64, "BLOCK_R": 16}
    jobs = []
    for arch in (80, 90):
        for N, block_r in ((ROWWISE, 16), (ROWWISE + 1, 16), (ROWWISE + 1, 256)):
            tile = tiles(N, block_r)
            blocks = {"BLOCK_M": tile["rows"], "BLOCK_R": block_r}
            jobs += [
                {"kernel": "shrink", "args": shrink | blocks | {"BLOCK_K": tile["cols"]}},
                {"kernel": "expand", "args": expand | blocks | {"BLOCK_O": tile["cols"]}},
            ]
            for job in jobs[-2:]:
                job |= {"module": MODULE, "arch": arch, "num_warps": tile["num_warps"]}
        jobs.append({"module": MODULE, "kernel": "weight_gradient", "arch": arch, "args": gradient})
    for job, compiled in zip(jobs, compile_kernels(jobs), strict=True):
        assert compiled.spill_bytes == 0, job
        assert compiled.shared <= usable_shared[86], job
        assert "ld.global.v4" in compiled.ptx or "cp.async.cg" in compiled.ptx, job  # 16 bytes at a time
        assert compiled.tensor_cores == (job["args"].get("BLOCK_M") != 1), job
        if job["arch"] == 90 and job["args"].get("BLOCK_M") == 64:
            assert "wgmma.mma_async" in compiled.ptx, job


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu(cuda, within_bar, dtype):
    for shape in ((5, 41, 123, [3, 16, 5]), (32, 512, 768, [16] * 32), (300, 512, 768, [16, 64, 256])):
        bar(within_bar, *shape, dtype, device=cuda)
