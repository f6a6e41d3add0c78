"""kernels/decode: parity with the plain definition, and what the loops refuse to read."""

import pytest
import torch

from graft.kernels.decode import add_rms_norm_, can_run, place_token_
from graft.kernels.decode.reference import add_rms_norm_reference, place_token_reference

SIZES = [(1, 384), (3, 41), (8, 64), (2, 7)]


@pytest.mark.parametrize(("B", "D"), SIZES)
@pytest.mark.parametrize("with_x", [True, False])
def test_add_rms_norm(B: int, D: int, with_x: bool) -> None:
    """Parity: float32 sums in another order differ by a few ulps of values near 1."""
    generator = torch.Generator().manual_seed(D)
    x, residual = (torch.randn(B, D, generator=generator) for _ in range(2))
    weight = torch.rand(D, generator=generator) + 0.5
    expected, total = add_rms_norm_reference(x if with_x else None, residual.clone(), weight, 1e-6)
    found = add_rms_norm_(x if with_x else None, residual, weight, 1e-6)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("rows_of_angles", [1, 3])
@pytest.mark.parametrize("d_head", [2, 16, 26])
def test_place_token(norms: bool, rows_of_angles: int, d_head: int) -> None:
    """Parity with QK-norm, RoPE and an assignment; the cache's other columns and rows are left alone."""
    generator = torch.Generator().manual_seed(1)
    B, H, K, capacity, column = 3, 4, 2, 9, 5
    q = torch.randn(B, H * d_head, generator=generator)
    k, v = (torch.randn(B, K * d_head, generator=generator) for _ in range(2))
    angles = torch.rand(rows_of_angles, d_head // 2, generator=generator) * 6
    keys, values = (torch.randn(B + 1, K, capacity, d_head, generator=generator) for _ in range(2))
    weights = [torch.rand(d_head, generator=generator) + 0.5 for _ in range(2)] if norms else [None, None]
    expected = place_token_reference(
        q, k, v, angles.cos(), angles.sin(), keys, values, column, weights[0], weights[1], 1e-6
    )
    place_token_(
        q, k, v, angles.cos(), angles.sin(), keys, values, column, q_weight=weights[0], k_weight=weights[1], eps=1e-6
    )
    for found, due in zip((q, keys, values), expected, strict=True):
        torch.testing.assert_close(found, due, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("wrong", ["dtype", "strided", "short", "column", "rows", "angles", "odd"])
def test_wrong_tensors_are_refused_before_an_address_is_taken(wrong: str) -> None:
    q, k, v = torch.randn(2, 32), torch.randn(2, 16), torch.randn(2, 16)
    cos, keys, column = torch.ones(1, 4), torch.zeros(2, 2, 6, 8), 3
    if wrong == "dtype":
        k = k.double()
    elif wrong == "strided":
        v = torch.randn(16, 2).T
    elif wrong == "short":
        k = k[:, :8].contiguous()
    elif wrong == "column":
        column = 6
    elif wrong == "rows":
        q, k, v = (torch.randn(3, t.shape[1]) for t in (q, k, v))
    elif wrong == "angles":
        cos = torch.ones(1, 3)
    else:
        q = torch.randn(2, 33)
    with pytest.raises(ValueError, match=r"expected a contiguous float32|don't fit a cache|cos has 3 values"):
        place_token_(q, k, v, cos, cos.clone(), keys, keys.clone(), column)
    with pytest.raises(ValueError, match="expected a contiguous float32 CPU tensor of 8 values"):
        add_rms_norm_(torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(4), 1e-6)


def test_where_it_can_run() -> None:
    """Not where an operator must be seen: gradients, a fake tensor, autocast, another dtype."""
    x = torch.zeros(2, 8)
    assert not can_run(x)  # gradients are recorded
    with torch.no_grad():
        assert can_run(x)
        assert not can_run(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not can_run(x)
        with torch._subclasses.fake_tensor.FakeTensorMode():
            assert not can_run(torch.zeros(2))
