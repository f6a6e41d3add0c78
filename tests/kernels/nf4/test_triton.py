"""Triton's dequantization and products: numerics in the interpreter, PTX for real GPUs, numerics on a GPU."""

import pytest
import torch
from torch import nn

from graft.kernels import nf4
from graft.kernels.nf4 import reference
from graft.quant import NF4Linear, quantize_4bit

DEQUANTIZE, PRODUCT = "graft.kernels.nf4.triton_dequantize", "graft.kernels.nf4.triton_product"
SHAPES = [(64, 64), (41, 130), (123, 96), (5, 33), (1, 7)]


def product_of(layer: NF4Linear):
    """run(backend, x) -> y for the bar's check; the bias is the layer's."""

    def run(backend: str, x: torch.Tensor) -> torch.Tensor:
        bias = None if layer.bias is None else layer.bias.to(x.device, x.dtype)
        return nf4.linear_4bit(x, moved(layer.state.weight(layer.packed), x.device), bias, backend=backend)

    return run


def layer_of(in_features: int, out_features: int, *, bias: bool = True, double_quant: bool = True) -> NF4Linear:
    torch.manual_seed(0)
    return NF4Linear.from_linear(nn.Linear(in_features, out_features, bias=bias), double_quant=double_quant)


def check_dequantize(device: torch.device, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> None:
    """Triton's weight equals the reference's to the bit."""
    from graft.kernels.nf4.triton_dequantize import dequantize_4bit_triton, dequantize_absmax_triton

    for block_size in (32, 64, 256):
        packed, state = quantize_4bit(torch.randn(shape), "nf4", block_size=block_size, double_quant=double_quant)
        weight = state.weight(packed)
        ours = dequantize_4bit_triton(moved(weight, device), dtype)
        assert torch.equal(ours.cpu(), reference.dequantize_4bit(weight, dtype))
        if state.double is not None:
            double = moved(weight, device).scales
            assert torch.equal(dequantize_absmax_triton(*double).cpu(), state.absmax)


def moved(weight: nf4.PackedWeight, device: torch.device) -> nf4.PackedWeight:
    return nf4.PackedWeight.of([t.to(device) for t in weight.tensors], weight.block_size, weight.shape)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize(interpreter, shape, dtype, double_quant):
    check_dequantize(interpreter, shape, dtype, double_quant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("n_rows", "in_features", "out_features"), [(1, 130, 41), (3, 64, 123), (7, 96, 70), (70, 130, 41)]
)
def test_product(interpreter, within_bar, n_rows, in_features, out_features, double_quant, dtype):
    """Law: output and input gradient of both kernels (few rows: gemv) within STYLE.md's bar."""
    layer = layer_of(in_features, out_features, double_quant=double_quant)
    x = torch.randn(n_rows, in_features)
    within_bar(product_of(layer), [x], dtype)


def test_strides_and_leading_axes(interpreter, within_bar):
    """Law: x may be a view, with any leading axes, or have no rows."""
    layer = layer_of(64, 41, bias=False)
    within_bar(product_of(layer), [torch.randn(2, 5, 128)[..., ::2]], torch.float32)
    within_bar(product_of(layer), [torch.randn(64, 9).T], torch.float32)
    assert product_of(layer)("triton", torch.empty(0, 3, 64)).shape == (0, 3, 41)


def test_refuses_odd_rows(interpreter):
    with pytest.raises(ValueError, match="in_features must be even, got 41"):
        product_of(layer_of(41, 8))("triton", torch.randn(2, 41))


def test_refuses_without_a_gpu():
    import triton

    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter takes CPU tensors")
    with pytest.raises(ValueError, match="nf4: backend 'triton' can't run here: it needs CUDA tensors"):
        product_of(layer_of(64, 8))("triton", torch.randn(2, 64))


def test_reference_backend():
    """Parity: the reference product equals the compiled one."""
    layer = layer_of(64, 41)
    x = torch.randn(3, 64)
    assert torch.equal(product_of(layer)("reference", x), product_of(layer)("torch", x))


@pytest.mark.slow
def test_ptx(compile_kernels, usable_shared):
    """Every kernel compiles for sm_80 and sm_90 at its shipped tiles: tensor cores used, shared memory fits, no spills."""
    jobs = []
    for arch in (80, 90):
        scales = {"absmax": "*u8", "absmax_scale": "*fp32", "absmax_mean": "*fp32", "nested_codebook": "*fp32"}
        nested = {"NESTED": True, "NESTED_BLOCK": 256, "BLOCK_SIZE": 64}
        weight = {"packed": "*u8", "codebook": "*fp32", "O": "i32:16", "K": "i32:16"}
        tile = {"BLOCK_SIZE": 64, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
        args = (
            scales
            | nested
            | {"packed": "*u8", "codebook": "*fp32", "out": "*bf16", "n": "i32:16", "n_blocks": "i32:16"}
        )
        jobs.append({"module": DEQUANTIZE, "kernel": "dequantize", "arch": arch, "args": args | {"ROWS": 64}})
        args = weight | scales | nested | {"x": "*bf16", "y": "*bf16", "bias": "*bf16", "stride_x": "i32:16"}
        args |= {"HAS_BIAS": True, "BLOCK_O": 4, "BLOCK_B": 512}
        jobs.append({"module": PRODUCT, "kernel": "gemv", "arch": arch, "args": args})
        args = (
            weight
            | tile
            | {"absmax": "*fp32", "x": "*bf16", "y": "*bf16", "bias": "*bf16", "M": "i32", "stride_x": "i32:16"}
        )
        jobs.append({"module": PRODUCT, "kernel": "forward_product", "arch": arch, "args": args | {"HAS_BIAS": True}})
        args = weight | tile | {"absmax": "*fp32", "dy": "*bf16", "dx": "*bf16", "M": "i32", "stride_dy": "i32:16"}
        jobs.append({"module": PRODUCT, "kernel": "backward_product", "arch": arch, "args": args})
    for job, compiled in zip(jobs, compile_kernels(jobs), strict=True):
        name = f"{job['kernel']} on sm_{job['arch']}"
        assert compiled.shared <= usable_shared[86], f"{name}: {compiled.shared} bytes of shared memory"
        assert compiled.spill_bytes == 0, f"{name} spills {compiled.spill_bytes} bytes ({compiled.registers} registers)"
        if "product" in job["kernel"]:
            assert compiled.tensor_cores, name
            assert job["arch"] < 90 or "wgmma" in compiled.ptx, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_on_a_gpu(cuda, within_bar, double_quant, dtype):
    for shape in (*SHAPES, (1024, 384)):
        check_dequantize(cuda, shape, dtype, double_quant)
    for n_rows in (1, 3, 41, 300):
        layer = layer_of(384, 1000, double_quant=double_quant)
        within_bar(product_of(layer), [torch.randn(n_rows, 384, device=cuda)], dtype)
