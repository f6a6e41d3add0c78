"""AVX2's decoding on any processor: the permutation, its one special instruction, is emulated here."""

import platform
from typing import Any

import numba
import numpy as np
import pytest
import torch
from llvmlite import ir

from graft.kernels.nf4 import PackedWeight, reference, simd
from graft.kernels.nf4.numba_cpu import DTYPES, LIKE
from graft.quant.codebooks import codebook

BLOCK_SIZE = 128


def emulated(builder: Any, instruction: str, table: Any, indices: Any) -> Any:
    """vpshufb permutes 16 bytes at a time, and writes 0 where the index has its highest bit."""
    assert instruction == "avx2.pshuf.b"
    result = ir.Constant(table.type, ir.Undefined)
    for lane in range(table.type.count):
        given = builder.extract_element(indices, ir.Constant(simd.I32, lane))
        index = builder.zext(builder.and_(given, ir.Constant(given.type, 15)), simd.I32)
        index = builder.add(index, ir.Constant(simd.I32, lane // 16 * 16))
        value = builder.extract_element(table, index)
        is_high = builder.icmp_signed("<", given, ir.Constant(given.type, 0))
        value = builder.select(is_high, ir.Constant(value.type, 0), value)
        result = builder.insert_element(result, value, ir.Constant(simd.I32, lane))
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_is_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity at several passes a block, from a block that is not the first, and not a byte beyond the last."""
    if dtype == torch.float16 and platform.machine() == "x86_64" and "+f16c" not in simd.features():
        pytest.skip("rounding to float16 needs F16C")
    monkeypatch.setattr(simd, "permute", emulated)
    decode_blocks, n_steps = simd.decode_blocks, BLOCK_SIZE // (2 * simd.STEP)

    @numba.njit
    def run(packed: Any, first: Any, n_blocks: Any, values: Any, scales: Any, out: Any) -> None:
        decode_blocks(packed, first, n_blocks, n_steps, values, scales, out)

    values = torch.tensor(codebook("nf4"))
    packed, absmax = reference.quantize_4bit(torch.randn(6, BLOCK_SIZE), values, block_size=BLOCK_SIZE)
    out = torch.full((6, BLOCK_SIZE), 7.0).to(dtype)
    bits = out.view(dtype if dtype == torch.float32 else torch.int16).numpy().reshape(-1).view(LIKE[dtype].dtype)
    run(packed.numpy().reshape(-1), BLOCK_SIZE // 2, 4, values.numpy(), absmax[1:].numpy().astype(np.float32), bits)
    expected = reference.dequantize_4bit(PackedWeight(packed, values, absmax, BLOCK_SIZE, out.shape), dtype)
    assert torch.equal(out[1:5], expected[1:5])
    assert (out[[0, 5]] == 7).all()
