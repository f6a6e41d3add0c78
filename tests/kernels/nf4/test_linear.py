"""The product with a 4-bit weight in row tiles is the product with the whole weight."""

import pytest
import torch

from graft.kernels.nf4 import linear
from graft.quant import NF4Linear


@pytest.mark.parametrize(("in_features", "out_features"), [(256, 200), (96, 1100), (41, 123)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_tiles(double_quant: bool, in_features: int, out_features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: tiles cover the rows once, start at a scale's start, and change neither output nor gradient (float64)."""
    torch.manual_seed(0)
    layer = NF4Linear.from_linear(torch.nn.Linear(in_features, out_features), double_quant=double_quant)
    x = torch.randn(3, in_features, dtype=torch.float64, requires_grad=True)
    whole = layer(x)
    (expected,) = torch.autograd.grad(whole.sum(), x)
    monkeypatch.setattr(linear, "TILE", 2**15)
    tiles = linear.row_tiles((out_features, in_features), 64, torch.device("cpu"))
    assert (len(tiles) > 1) == (in_features != 41)  # 41 is odd: no row before the 16,384th starts at a scale's start
    assert [row for tile in tiles for row in range(tile.start, tile.stop)] == list(range(out_features))
    assert torch.allclose(layer(x), whole, rtol=1e-12)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(gradient, expected, rtol=1e-12)


def test_tiles_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: partial sums of the gradient are kept in float32: its error is at most twice that of one bfloat16 product."""
    layer = NF4Linear.from_linear(torch.nn.Linear(256, 2048, bias=False))
    x = torch.randn(3, 256, requires_grad=True)
    (truth,) = torch.autograd.grad(layer(x).sum(), x)
    half = x.detach().bfloat16().requires_grad_()
    (whole,) = torch.autograd.grad(layer(half).sum(), half)
    monkeypatch.setattr(linear, "TILE", 2**15)
    (tiled,) = torch.autograd.grad(layer(half).sum(), half)
    assert (tiled - truth).abs().max() <= 2 * (whole - truth).abs().max() + 1e-5


def test_only_a_tile_is_ever_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: no tensor larger than a tile is made on the way (the point of tiles)."""
    monkeypatch.setattr(linear, "TILE", 2**15)
    layer = NF4Linear.from_linear(torch.nn.Linear(256, 2048, bias=False))
    sizes = []
    original = linear.dequantize_4bit
    monkeypatch.setattr(linear, "dequantize_4bit", lambda *a: sizes.append((w := original(*a)).numel()) or w)
    layer(torch.randn(3, 256, requires_grad=True)).sum().backward()
    assert len(sizes) == 32
    assert max(sizes) <= 2**15
