"""Both instruction sets' decoding, on any processor: the permutation, their one special instruction, is emulated here."""

import platform
from typing import Any

import numba
import numpy as np
import pytest
import torch
from llvmlite import ir

from graft.kernels.nf4 import reference, simd
from graft.kernels.nf4.numba_cpu import DTYPES, LIKE
from graft.quant.codebooks import codebook

BLOCK_SIZE = 128


def emulated(builder: Any, instruction: str, table: Any, indices: Any) -> Any:
    """vpermps and vpermw permute a whole register by an index's low bits; vpshufb 16 bytes at a time, and writes 0 where the
    index has its highest bit."""
    n = table.type.count
    by_bytes = "pshuf" in instruction
    group = 16 if by_bytes else n
    result = ir.Constant(table.type, ir.Undefined)
    for lane in range(n):
        given = builder.extract_element(indices, ir.Constant(simd.I32, lane))
        index = builder.and_(given, ir.Constant(given.type, group - 1))
        index = index if index.type == simd.I32 else builder.zext(index, simd.I32)
        index = builder.add(index, ir.Constant(simd.I32, lane // group * group))
        value = builder.extract_element(table, index)
        if by_bytes:
            is_high = builder.icmp_signed("<", given, ir.Constant(given.type, 0))
            value = builder.select(is_high, ir.Constant(value.type, 0), value)
        result = builder.insert_element(result, value, ir.Constant(simd.I32, lane))
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", simd.STEP)
def test_decoding_is_the_reference(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity at several passes a block, from a block that is not the first, and not a byte beyond the last."""
    if dtype == torch.float16 and platform.machine() == "x86_64" and "+f16c" not in simd.features():
        pytest.skip("rounding to float16 needs F16C")
    monkeypatch.setattr(simd, "permute", emulated)
    step = simd.STEP[name]
    decode_blocks = simd._decode_blocks(step, getattr(simd, name))
    n_steps = BLOCK_SIZE // (2 * step)

    @numba.njit
    def run(packed: Any, first: Any, n_blocks: Any, values: Any, scales: Any, out: Any) -> None:
        decode_blocks(packed, first, n_blocks, n_steps, values, scales, out)

    values = torch.tensor(codebook("nf4"))
    packed, absmax = reference.quantize_4bit(torch.randn(6, BLOCK_SIZE), values, block_size=BLOCK_SIZE)
    out = torch.full((6, BLOCK_SIZE), 7.0).to(dtype)
    bits = out.view(dtype if dtype == torch.float32 else torch.int16).numpy().reshape(-1).view(LIKE[dtype].dtype)
    run(packed.numpy().reshape(-1), BLOCK_SIZE // 2, 4, values.numpy(), absmax[1:].numpy().astype(np.float32), bits)
    expected = reference.dequantize_4bit(packed, absmax, values, block_size=BLOCK_SIZE, shape=out.shape, dtype=dtype)
    assert torch.equal(out[1:5], expected[1:5])
    assert (out[[0, 5]] == 7).all()
