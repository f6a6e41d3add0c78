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
from graft.kernels.nf4 import numba_cpu, reference, simd
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
            q, scale = numba_cpu.quantize_absmax(absmax - mean, DYNAMIC, block_size=256)
            expected = reference.quantize_8bit_by_table(absmax - mean, DYNAMIC, block_size=256)
            assert torch.equal(q, expected[0])
            assert torch.equal(scale, expected[1])
            decoded = reference.dequantize_absmax(q, scale, mean, DYNAMIC, nested_block_size=256)
            assert torch.equal(numba_cpu.dequantize_absmax(q, scale, mean, DYNAMIC), decoded)
            for absmax_q, nested, scales in ((absmax, (), absmax), (q, (scale, mean, DYNAMIC), decoded)):
                truth = reference.dequantize_4bit(
                    packed, scales, values, block_size=block_size, shape=shape, dtype=dtype
                )
                ours = nf4.dequantize_4bit(packed, absmax_q, nested, values, block_size, list(shape), dtype)
                assert torch.equal(ours, truth)


@pytest.mark.parametrize("block_size", [32, 64, 96])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", numba_cpu.DTYPES)
@pytest.mark.parametrize("instructions", [None, *simd.FEATURES])
def test_every_instruction_set(
    instructions: str | None, dtype: torch.dtype, double_quant: bool, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity of each path that this processor can go; blocks of 32 and 96 take the one for all processors with AVX2 too."""
    if instructions and not simd.has(instructions):
        pytest.skip(f"this processor has no {instructions}; test_simd.py tests it with its permutation emulated")
    monkeypatch.setattr(numba_cpu, "instruction_set", lambda: instructions)
    values = torch.tensor(codebook("nf4"))
    weight = weight_of((300, 513), dtype, "mixed")  # more blocks than one second-level scale covers, and a rest
    packed, absmax = numba_cpu.quantize_4bit(weight, values, block_size=block_size)
    level1, nested, scales = absmax, (), absmax
    if double_quant:
        mean = absmax.mean()
        level1, scale = numba_cpu.quantize_absmax(absmax - mean, DYNAMIC, block_size=256)
        nested = (scale, mean, DYNAMIC)
        scales = reference.dequantize_absmax(level1, *nested, nested_block_size=256)
    out = torch.full_like(weight, float("nan"))
    numba_cpu.dequantize_4bit_(out, packed, level1, nested, values, block_size=block_size)
    assert torch.equal(
        out, reference.dequantize_4bit(packed, scales, values, block_size=block_size, shape=out.shape, dtype=dtype)
    )


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7F800000, -0x800000])
@pytest.mark.parametrize("dtype", numba_cpu.DTYPES)
@pytest.mark.parametrize("instructions", [None, *simd.FEATURES])
def test_a_scale_that_is_not_finite(
    instructions: str | None, dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged file's NaN (whose bits rounding could carry over to a zero's) and infinity are seen in the weight."""
    if instructions and not simd.has(instructions):
        pytest.skip(f"this processor has no {instructions}")
    monkeypatch.setattr(numba_cpu, "instruction_set", lambda: instructions)
    values = torch.tensor(codebook("nf4"))
    packed, absmax = numba_cpu.quantize_4bit(weight_of((4, 64), torch.float32, "randn"), values, block_size=64)
    absmax.view(torch.int32)[1] = bits
    out = torch.empty(4, 64, dtype=dtype)
    numba_cpu.dequantize_4bit_(out, packed, absmax, (), values, block_size=64)
    expected = reference.dequantize_4bit(packed, absmax, values, block_size=64, shape=out.shape, dtype=dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_numba_told_to_compile_for_a_lesser_processor(tmp_path: Path) -> None:
    """An instruction that LLVM's target lacks would abort the process."""
    code = "import torch; from graft.quant import quantize_nf4, dequantize_nf4; "
    code += "print(dequantize_nf4(*quantize_nf4(torch.ones(4, 64))).sum().item())"
    settings = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)
    assert done.stdout == "256.0\n", done.stderr


def test_an_empty_weight_and_odd_blocks() -> None:
    """Nothing is written for nothing; a block of 33 has no place in bytes."""
    values, none = torch.tensor(codebook("nf4")), torch.empty(0)
    numba_cpu.dequantize_4bit_(torch.empty(0, 64), none.to(torch.uint8), none, (), values, block_size=64)
    packed, absmax = numba_cpu.quantize_4bit(torch.ones(66), values, block_size=66)
    with pytest.raises(ValueError, match="block_size must be even, got 33"):
        numba_cpu.dequantize_4bit_(torch.empty(66), packed, absmax.repeat(2), (), values, block_size=33)


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
    values = torch.tensor(codebook("nf4"))
    packed, absmax = numba_cpu.quantize_4bit(weight, values, block_size=64)
    level1, nested = absmax, ()
    if double_quant:
        mean = absmax.mean()
        level1, scale = numba_cpu.quantize_absmax(absmax - mean, DYNAMIC, block_size=256)
        nested = (scale, mean, DYNAMIC)
    whole = nf4.dequantize_4bit(packed, level1, nested, values, 64, list(weight.shape), torch.float32)
    monkeypatch.setattr(numba_cpu, "PART", 1024)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    again = numba_cpu.quantize_4bit(weight, values, block_size=64)
    assert torch.equal(again[0], packed)
    assert torch.equal(again[1], absmax)
    parts = nf4.dequantize_4bit(packed, level1, nested, values, 64, list(weight.shape), torch.float32)
    assert torch.equal(parts, whole)
    weight[-1, -1] = float("nan")
    with pytest.raises(ValueError, match="1 of 77100 values are not finite"):
        numba_cpu.quantize_4bit(weight, values, block_size=64)


def test_a_state_of_another_weight_is_refused() -> None:
    """The loops read by address, so each tensor's size is asked for before: a wrong one is an error, never foreign memory."""
    weight = weight_of((64, 256), torch.float32, "randn")
    values, out = torch.tensor(codebook("nf4")), torch.empty(64, 256)
    packed, absmax = numba_cpu.quantize_4bit(weight, values, block_size=64)
    mean = absmax.mean()
    level1, scale = numba_cpu.quantize_absmax(absmax - mean, DYNAMIC, block_size=256)
    right = [packed, level1, values, scale, mean, DYNAMIC]
    for place, name in enumerate(("packed", "absmax", "codebook", "absmax_scale", "absmax_mean", "nested_codebook")):
        wrong = list(right)
        wrong[place] = wrong[place].flatten()[:-1].clone()
        with pytest.raises(ValueError, match=rf"^{name} has \d+ bytes on cpu; \d+ on cpu are due"):
            numba_cpu.dequantize_4bit_(out, wrong[0], wrong[1], wrong[3:], wrong[2], block_size=64)
    turned = torch.stack([absmax, absmax], 1)[:, 0]  # the right numbers, not side by side
    numba_cpu.dequantize_4bit_(out, packed, turned, (), values, block_size=64)
    assert torch.equal(
        out, reference.dequantize_4bit(packed, absmax, values, block_size=64, shape=out.shape, dtype=out.dtype)
    )


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_where_the_result_goes_is_checked() -> None:
    """The result is written by address too: memory that isn't there, or isn't in one piece, is refused."""
    weight = weight_of((64, 128), torch.bfloat16, "randn")
    values = torch.tensor(codebook("nf4"))
    packed, absmax = numba_cpu.quantize_4bit(weight, values, block_size=64)
    wide = torch.zeros(64, 256)
    with FakeTensorMode():
        fake = torch.empty(64, 128)
    for out in (wide[:, :128], torch.empty(64, 128, device="meta"), fake, torch.empty(64, 128, dtype=torch.float64)):
        with pytest.raises(ValueError, match="contiguous CPU memory is due"):
            numba_cpu.dequantize_4bit_(out, packed, absmax, (), values, block_size=64)
    assert not wide.any()
    with pytest.raises(ValueError, match="a fake tensor has no memory to read"):
        numba_cpu.dequantize_4bit_(torch.empty(64, 128), fake_like(packed), absmax, (), values, block_size=64)


def fake_like(tensor: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(tensor.shape, dtype=tensor.dtype)


@pytest.mark.parametrize("block_size", [16, 48])
def test_blocks_that_are_no_multiple_of_32(block_size: int) -> None:
    """The vector loop takes 32 values at a time; other blocks go the way of other processors."""
    weight = weight_of((16, 96), torch.float32, "randn")
    values = torch.tensor(codebook("nf4"))
    packed, absmax = numba_cpu.quantize_4bit(weight, values, block_size=block_size)
    out = torch.full_like(weight, float("nan"))
    numba_cpu.dequantize_4bit_(out, packed, absmax, (), values, block_size=block_size)
    expected = reference.dequantize_4bit(
        packed, absmax, values, block_size=block_size, shape=out.shape, dtype=torch.float32
    )
    assert torch.equal(out, expected)


def test_a_lazily_negated_weight() -> None:
    """Its memory has the other sign."""
    weight, values = weight_of((8, 64), torch.float32, "randn"), torch.tensor(codebook("nf4"))
    turned = torch._neg_view(weight)
    assert torch.equal(
        numba_cpu.quantize_4bit(turned, values, block_size=64)[0],
        reference.quantize_4bit(-weight, values, block_size=64)[0],
    )
