"""The compiled CPU path equals the reference to the bit, for every format, dtype and awkward size."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graft.kernels import nf4
from graft.kernels.nf4 import numba_cpu, reference, simd
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
    """Parity of each path that this processor can go, the one for all processors among them."""
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
