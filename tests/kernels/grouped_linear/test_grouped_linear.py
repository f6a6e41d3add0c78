"""Worked by hand, parity of the grouped product with a product a group, the Triton form in the interpreter, in PTX and on a GPU."""

import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.kernels.grouped_linear import grouped_linear

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") else []  # CPU tensors here
BACKENDS = ["reference", "torch", *TRITON]
MODULE = "graft.kernels.grouped_linear.triton_grouped_linear"
# Rows of each group, in, out: more than a tile of rows, groups without any, columns that are no multiple of a block's.
SHAPES = [([3, 0, 41, 1], 41, 123), ([0, 0, 5], 16, 8), ([70, 7], 72, 20), ([2] * 5 + [0] * 4, 24, 150)]


def inputs(counts: list[int], n_in: int, n_out: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), n_in, generator=generator) / 2
    weight = torch.randn(len(counts), n_out, n_in, generator=generator) / n_in**0.5
    return x, weight, torch.tensor(counts).cumsum(0).to(torch.int32)


def bar(within_bar, counts, n_in, n_out, dtype, device) -> None:
    x, weight, ends = inputs(counts, n_in, n_out)
    ends = ends.to(device)
    run = lambda backend, x, weight: grouped_linear(x, weight, ends, backend=backend)  # noqa: E731
    within_bar(run, [x.to(device), weight.to(device)], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """Row 0 meets [1 2], rows 1 and 2 meet [3 4]; the group between them is empty."""
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[[1.0, 2.0]], [[9.0, 9.0]], [[3.0, 4.0]]])
    got = grouped_linear(x, weight, torch.tensor([1, 1, 3], dtype=torch.int32), backend=backend)
    assert got.tolist() == [[3.0], [3.0], [4.0]]


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    n_in=st.sampled_from([3, 8, 12]),  # 3: rows that torch's grouped product does not take
    n_out=st.sampled_from([4, 7]),
    seed=st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
def test_equals_one_product_a_group(counts: list[int], n_in: int, n_out: int, seed: int) -> None:
    """Parity: values and both gradients, for empty groups and no rows at all too."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(counts), n_out, n_in, generator=generator)
    x = torch.randn(sum(counts), n_in, generator=generator)
    grad = torch.randn(sum(counts), n_out, generator=generator)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    found = []
    for backend in BACKENDS:
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = grouped_linear(*inputs, ends, backend=backend)
        found.append([out, *torch.autograd.grad(out, inputs, grad)])
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, another, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "weight", "ends", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 5, 6), torch.zeros(2, dtype=torch.int32), "don't fit"),
        (torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.zeros(3, dtype=torch.int32), "one end for each of 2 groups"),
        (torch.zeros(3, 4), torch.zeros(2, 5, 4).half(), torch.zeros(2, dtype=torch.int32), "cast one to the other"),
        (torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.zeros(2), "ends"),
    ],
)
def test_what_is_refused(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_linear(x, weight, ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreter(interpreter, within_bar, shape, dtype):
    bar(within_bar, *shape, dtype, interpreter)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, ([500, 0, 12, 1, 900], 512, 768)])
def test_gpu(cuda, within_bar, shape, dtype):
    bar(within_bar, *shape, dtype, cuda)


def test_strided_inputs(interpreter):
    """Parity: rows that lie apart, and a weight seen transposed."""
    x, weight, ends = inputs([3, 0, 4], 8, 5)
    apart = torch.stack([x, x], 1)[:, 0]
    seen = weight.transpose(1, 2).contiguous().transpose(1, 2)
    got = grouped_linear(apart, seen, ends, backend="triton")
    torch.testing.assert_close(got, grouped_linear(x, weight, ends, backend="reference"))


def test_operator(interpreter):
    """Law: what torch.compile is told of the operator holds, and only the gradients that are asked for are computed."""
    from graft.kernels.grouped_linear import triton_grouped_linear as ops

    x, weight, ends = inputs([3, 0, 4], 8, 5)
    torch.library.opcheck(ops.grouped_linear_op, (x.requires_grad_(), weight.requires_grad_(), ends))
    weight.requires_grad_(False)
    grouped_linear(x, weight, ends, backend="triton").sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_too_many_groups(interpreter):
    weight, ends = torch.zeros(1025, 1, 4), torch.full((1025,), 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="it takes at most 1024 groups, got 1025"):
        grouped_linear(torch.zeros(2, 4), weight, ends, backend="triton")


def test_which_form_a_gpu_runs():
    """Law: PyTorch's own grouped product where it takes the tensors (bfloat16, aligned), the Triton form for all others."""
    from graft.kernels.dispatch import predicting
    from graft.kernels.grouped_linear.torch_grouped_linear import takes

    with predicting("cuda"):
        wide, odd = torch.zeros(4, 8), torch.zeros(4, 9)
        weight = torch.zeros(2, 8, 8)
        assert takes(wide.bfloat16(), weight.bfloat16())
        assert not takes(wide.half(), weight.half())
        assert not takes(odd.bfloat16(), torch.zeros(2, 8, 9).bfloat16())
    assert takes(wide, weight)


@pytest.mark.slow
def test_ptx(compile_kernels, usable_shared):
    """Shipped tiles: nothing spilled, tensor cores (wgmma on sm_90 from 64 rows on), the shared memory of each GPU."""
    from graft.kernels.grouped_linear.triton_grouped_linear import tiles

    strides = dict.fromkeys(("stride_x", "stride_g", "stride_out", "stride_grad"), "i32:16")
    jobs = []
    for arch in (80, 90):
        for kind, itemsize, rows, transposed in (
            ("bf16", 2, 16, False), ("bf16", 2, 500, False), ("bf16", 2, 500, True), ("fp32", 4, 500, False),
        ):  # fmt: skip
            x, tile = f"*{kind}", tiles(rows, itemsize)
            common = {"ends": "*i32", "out": x, "O": "i32:16", "K": "i32:16", "x": x}
            common["PRECISION"] = "tf32x3" if itemsize == 4 else "tf32"
            product = common | tile | {"weight": x, "G": "i32", "BLOCK_G": 64}
            product |= {name: strides[name] for name in ("stride_x", "stride_g", "stride_out")}
            product |= {"stride_o": 1, "stride_k": "i32:16"} if transposed else {"stride_o": "i32:16", "stride_k": 1}
            block = 128 if itemsize == 2 else 64
            gradient = common | {"grad": x, "stride_grad": "i32:16", "stride_x": "i32:16"}
            gradient |= {"BLOCK_N": 32, "BLOCK_O": block, "BLOCK_K": block}
            warps = 8 if tile["BLOCK_M"] == 128 else 4
            jobs.append({"kernel": "grouped_product", "args": product, "num_warps": warps, "arch": arch})
            if not transposed and rows > 16:
                jobs.append({"kernel": "grouped_gradient", "args": gradient, "num_warps": 8, "arch": arch})
    for job in jobs:
        job |= {"module": MODULE, "num_stages": 3}
    for job, made in zip(jobs, compile_kernels(jobs), strict=True):
        assert made.tensor_cores, job
        assert made.spill_bytes == 0, (job, made.spill_bytes)
        assert made.shared <= usable_shared[job["arch"]], (job, made.shared)
        if job["arch"] == 90 and job["args"]["x"] == "*bf16" and job["args"].get("BLOCK_M", 128) >= 64:
            assert "wgmma.mma_async" in made.ptx, job
