"""The codebooks are derived; here they meet bitsandbytes' published and generated values."""

import bitsandbytes.functional as bnb
import pytest
import torch

from graft.quant import codebooks

FORMATS_MD = """-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
-0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1"""


def test_nf4_is_the_published_one() -> None:
    """Parity: our quantiles of N(0, 1) give bitsandbytes' 16 float32 values to the bit."""
    assert codebooks.nf4() == tuple(float(value) for value in FORMATS_MD.split(","))
    assert torch.equal(torch.tensor(codebooks.nf4()), bnb.get_4bit_type("nf4", device="cpu"))


def test_fp4_is_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(codebooks.fp4()), bnb.get_4bit_type("fp4", device="cpu"))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_bitsandbytes(signed: bool) -> None:
    assert torch.equal(torch.tensor(codebooks.dynamic8(signed)), bnb.create_dynamic_map(signed=signed))


def test_int4_by_hand() -> None:
    """Worked by hand: steps of 1/7 with zero in the middle, 16th code unused."""
    values = torch.tensor(codebooks.int4()[:15])
    assert torch.allclose(values.diff(), torch.full((14,), 1 / 7))
    assert values[7] == 0
    assert codebooks.codebook("int4")[15] == 1


def test_each_has_an_exact_zero_and_one() -> None:
    for name in codebooks.QUANT_TYPES:
        values = codebooks.codebook(name)
        assert len(values) == 16
        assert 0.0 in values
        assert max(values) == 1.0
