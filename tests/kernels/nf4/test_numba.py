"""The compiled CPU path equals the reference to the bit, for every format, dtype and awkward size."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from graft.kernels import nf4
from graft.kernels.nf4 import DoubleQuantized, PackedWeight, numba_cpu, reference, simd
from graft.quant import dequantize_nf4, quantize_nf4
from graft.quant.codebooks import codebook, dynamic8

SHAPES = [(64, 64), (5, 33), (1, 7), (123, 41), (300, 2), (100, 513), (1, 1)]
DYNAMIC = torch.tensor(dynamic8())


def weight_of(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    if kind == "zeros":
        weight *= 0
    if kind == "tiny":
        weight *= 1e-37
    if kind == "mixed":
        weight[::2] = 0
        weight *= torch.logspace(-6, 2, shape[1])
    return weight.to(dtype)


@pytest.mark.parametrize("kind", ["randn", "zeros", "tiny", "mixed"])
@pytest.mark.parametrize("dtype", numba_cpu.DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_equals_the_reference(quant_type: str, dtype: torch.dtype, kind: str) -> None:
    """Parity of both levels, both ways, at block sizes below and above the weight's size."""
    values = torch.tensor(codebook(quant_type))
    for shape in SHAPES:
        for block_size in (32, 64, 256):
            weight = weight_of(shape, dtype, kind)
            packed, absmax = numba_cpu.quantize_4bit(weight, values, block_size=block_size)
            expected = reference.quantize_4bit(weight, values, block_size=block_size)
            assert torch.equal(packed, expected[0])
            assert torch.equal(absmax, expected[1])
            mean = absmax.mean()
            q, scale = numba_cpu.quantize_absmax(absmax - mean, DYNAMIC)
            expected = reference.quantize_8bit_by_table(absmax - mean, DYNAMIC, block_size=256)
            assert torch.equal(q, expected[0])
            assert torch.equal(scale, expected[1])
            double = DoubleQuantized(q, scale, mean, DYNAMIC)
            assert torch.equal(numba_cpu.dequantize_absmax(*double), reference.dequantize_absmax(*double))
            for scales in (absmax, double):
                packed_weight = PackedWeight(packed, values, scales, block_size, shape)
                ours = nf4.dequantize_4bit(packed_weight, dtype)
                assert torch.equal(ours, reference.dequantize_4bit(packed_weight, dtype))


def packed_weight_of(
    weight: torch.Tensor, *, block_size: int = 64, double_quant: bool = False, quant_type: str = "nf4"
) -> PackedWeight:
    """A weight through the compiled quantization."""
    values = torch.tensor(codebook(quant_type))
    packed, absmax = nf4.quantize_4bit(weight, values, block_size)
    scales = absmax
    if double_quant:
        mean = absmax.mean()
        scales = DoubleQuantized(*nf4.quantize_absmax(absmax - mean, DYNAMIC), mean, DYNAMIC)
    return PackedWeight(packed, values, scales, block_size, tuple(weight.shape))


@pytest.mark.parametrize("block_size", [32, 64, 96])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", numba_cpu.DTYPES)
@pytest.mark.parametrize("avx2", [True, False])
def test_with_and_without_avx2(
    avx2: bool, dtype: torch.dtype, double_quant: bool, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity of each path that this processor can go; blocks of 32 and 96 take the one for all processors with AVX2 too."""
    if avx2 and not simd.uses_avx2():
        pytest.skip("this processor has no AVX2; test_simd.py tests it with its permutation emulated")
    monkeypatch.setattr(numba_cpu, "uses_avx2", lambda: avx2)
    weight = weight_of((300, 513), dtype, "mixed")  # more blocks than one second-level scale covers, and a rest
    packed = packed_weight_of(weight, block_size=block_size, double_quant=double_quant)
    out = torch.full_like(weight, float("nan"))
    nf4.dequantize_4bit_(out, packed)
    assert torch.equal(out, reference.dequantize_4bit(packed, dtype))


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7F800000, -0x800000])
@pytest.mark.parametrize("dtype", numba_cpu.DTYPES)
@pytest.mark.parametrize("avx2", [True, False])
def test_a_scale_that_is_not_finite(avx2: bool, dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file's NaN (whose bits rounding could carry over to a zero's) and infinity are seen in the weight."""
    if avx2 and not simd.uses_avx2():
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(numba_cpu, "uses_avx2", lambda: avx2)
    packed = packed_weight_of(weight_of((4, 64), torch.float32, "randn"))
    packed.scales.view(torch.int32)[1] = bits
    out = torch.empty(4, 64, dtype=dtype)
    nf4.dequantize_4bit_(out, packed)
    torch.testing.assert_close(out, reference.dequantize_4bit(packed, dtype), rtol=0, atol=0, equal_nan=True)


def test_numba_told_to_compile_for_a_lesser_processor(tmp_path: Path) -> None:
    """An instruction that LLVM's target lacks would abort the process."""
    code = "import torch; from graft.quant import quantize_nf4, dequantize_nf4; "
    code += "print(dequantize_nf4(*quantize_nf4(torch.ones(4, 64))).sum().item())"
    settings = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)
    assert done.stdout == "256.0\n", done.stderr


def test_an_empty_weight() -> None:
    """Nothing is written for nothing."""
    values, none = torch.tensor(codebook("nf4")), torch.empty(0)
    nf4.dequantize_4bit_(torch.empty(0, 64), PackedWeight(none.to(torch.uint8), values, none, 64, (0, 64)))


class Recorder(TorchDispatchMode):
    """Writes down the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning")
def test_who_looks_at_operators_sees_one() -> None:
    """Laws of the direct call: modes, transforms, tracers and default devices find the operator as if there were none."""
    weight = weight_of((8, 64), torch.float32, "randn")
    packed, state = quantize_nf4(weight, double_quant=False)
    truth, x = dequantize_nf4(packed, state), torch.randn(2, 64)
    with Recorder() as mode:
        seen = dequantize_nf4(packed, state)
    assert torch.equal(seen, truth)
    assert mode.seen == ["graft.dequantize_4bit.default"]
    for device in ("meta", "cpu"):
        with torch.device(device):
            found = dequantize_nf4(packed, state)
        assert torch.equal(found, truth)
    graph = make_fx(lambda p: dequantize_nf4(p, state), pre_dispatch=True)(packed)
    assert "graft.dequantize_4bit" in graph.code
    assert torch.equal(graph(packed), truth)
    gradient = torch.func.grad(lambda x: (x @ dequantize_nf4(packed, state).T).square().sum())(x)
    torch.testing.assert_close(gradient, 2 * x @ truth.T @ truth)
    traced = torch.jit.trace(lambda x: x @ dequantize_nf4(packed, state).T, (x,))
    torch.testing.assert_close(traced(x), x @ truth.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", numba_cpu.DTYPES)
def test_refuses_what_is_not_finite(dtype: torch.dtype, value: float) -> None:
    """Both paths say the same."""
    weight = torch.zeros(5, 33, dtype=dtype)
    weight[4, 32] = value
    for quantize in (numba_cpu.quantize_4bit, reference.quantize_4bit):
        with pytest.raises(ValueError, match=f"1 of 165 values are not finite, the first is {value} at 164"):
            quantize(weight, torch.tensor(codebook("nf4")), block_size=64)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_change_nothing(n_threads: int, double_quant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: split over threads, the bytes and values are the same, and a value that is not finite is still found."""
    weight = weight_of((300, 257), torch.float32, "mixed")
    packed = packed_weight_of(weight, double_quant=double_quant)
    whole = nf4.dequantize_4bit(packed, torch.float32)
    monkeypatch.setattr(numba_cpu, "PART", 1024)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    again = packed_weight_of(weight, double_quant=double_quant)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, packed.tensors, strict=True))
    assert torch.equal(nf4.dequantize_4bit(packed, torch.float32), whole)
    weight[-1, -1] = float("nan")
    with pytest.raises(ValueError, match="1 of 77100 values are not finite"):
        packed_weight_of(weight)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_where_the_result_goes_is_checked() -> None:
    """The result is written by address too: memory that isn't there, or isn't in one piece, is refused."""
    packed = packed_weight_of(weight_of((64, 128), torch.bfloat16, "randn"))
    wide = torch.zeros(64, 256)
    with FakeTensorMode():
        fake = torch.empty(64, 128)
    for out in (wide[:, :128], torch.empty(64, 128, device="meta"), torch.empty(64, 128).double(), torch.empty(8191)):
        with pytest.raises(ValueError, match="out: expected 8192 values in contiguous CPU memory, got"):
            nf4.dequantize_4bit_(out, packed)
    assert not wide.any()
    for out, weight in ((fake, packed), (torch.empty(64, 128), packed._replace(packed=fake_like(packed.packed)))):
        with pytest.raises(ValueError, match="a fake tensor has no memory to read"):
            nf4.dequantize_4bit_(out, weight)


def fake_like(tensor: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(tensor.shape, dtype=tensor.dtype)


@pytest.mark.parametrize("block_size", [16, 48])
def test_blocks_that_are_no_multiple_of_32(block_size: int) -> None:
    """The vector loop takes 32 values at a time; other blocks go the way of other processors."""
    packed = packed_weight_of(weight_of((16, 96), torch.float32, "randn"), block_size=block_size)
    out = torch.full((16, 96), float("nan"))
    nf4.dequantize_4bit_(out, packed)
    assert torch.equal(out, reference.dequantize_4bit(packed, torch.float32))


def test_tensors_that_do_not_lie_side_by_side() -> None:
    """Law: strides change nothing; the loops get contiguous copies."""
    packed = packed_weight_of(weight_of((64, 256), torch.float32, "randn"), double_quant=True)
    spread = [torch.stack([t.flatten()] * 2, 1)[:, 0].view(t.shape) for t in packed.tensors]
    assert not spread[2].is_contiguous()
    strided = PackedWeight.of(spread, 64, packed.shape)
    assert torch.equal(nf4.dequantize_4bit(strided, torch.float32), nf4.dequantize_4bit(packed, torch.float32))
    assert torch.equal(nf4.dequantize_absmax(*strided.scales), packed.scales.absmax())


def test_a_lazily_negated_weight() -> None:
    """Its memory has the other sign."""
    weight, values = weight_of((8, 64), torch.float32, "randn"), torch.tensor(codebook("nf4"))
    turned = torch._neg_view(weight)
    assert torch.equal(
        numba_cpu.quantize_4bit(turned, values, block_size=64)[0],
        reference.quantize_4bit(-weight, values, block_size=64)[0],
    )
