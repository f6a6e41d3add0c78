"""Requantization after a merge, and its error."""

import pytest
import torch
from torch import nn

from graft.quant import NF4Linear, dequantize_nf4, requantize


def layer_of(double_quant: bool = False) -> NF4Linear:
    torch.manual_seed(0)
    return NF4Linear.from_linear(nn.Linear(256, 128).bfloat16(), double_quant=double_quant)


def test_nothing_merged_is_the_same_weight() -> None:
    """Law: merging zero into a one-level weight gives its bytes and scales back, without error."""
    layer = layer_of()
    packed, state, error = requantize(layer, torch.zeros(128, 256))
    assert torch.equal(packed, layer.packed)
    assert torch.equal(state.absmax, layer.absmax)
    assert error.rms == error.relative == 0


@pytest.mark.parametrize("double_quant", [True, False])
def test_error_is_measured(double_quant: bool) -> None:
    """Law: the reported error is the distance of the merged weight from base + update, and a usual one (about 10%)."""
    layer = layer_of(double_quant)
    delta = torch.randn(128, 2) @ torch.randn(2, 256) * 1e-3
    packed, state, error = requantize(layer, delta)
    wanted = layer.dequantize(torch.float32) + delta
    difference = dequantize_nf4(packed, state, dtype=torch.float32) - wanted
    assert error.rms == pytest.approx(difference.square().mean().sqrt().item())
    assert error.relative == pytest.approx(error.rms / wanted.square().mean().sqrt().item())
    assert error.of_update == pytest.approx(error.rms / delta.square().mean().sqrt().item())
    assert 0 < error.relative < 0.1
    assert state.dtype == torch.bfloat16
    layer.set_packed_(packed, state)
    assert torch.equal(layer.packed, packed)


def test_refuses_a_delta_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"delta is \(256, 128\), the layer's weight is \(128, 256\)"):
        requantize(layer_of(), torch.zeros(256, 128))


def test_refuses_a_delta_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="32768 of 32768 values are not finite"):
        requantize(layer_of(), torch.full((128, 256), float("inf")))
