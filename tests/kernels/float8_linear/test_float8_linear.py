"""float8 products: torch's scaled product against the same rounding in float32, on the CPU."""

import pytest
import torch

from graft.kernels.float8_linear import float8_linear, float8_problem
from graft.kernels.float8_linear.reference import BACKWARD, FORWARD, float8_linear_reference, quantize, rounded


@pytest.mark.parametrize("shape", [(32, 48, 64), (2, 16, 16, 32)])
def test_is_the_reference(shape: tuple[int, ...]) -> None:
    """Parity: output and both gradients, to bfloat16's last place of sums that are float32 in both (2^-8 relative)."""
    generator = torch.Generator().manual_seed(0)
    *rows, d_in, d_out = shape
    x = torch.randn(*rows, d_in, generator=generator).requires_grad_()
    w = torch.randn(d_out, d_in, generator=generator).requires_grad_()
    g = torch.randn(*rows, d_out, generator=generator).to(torch.bfloat16)
    y = float8_linear(x, w)
    y.backward(g)
    flat = x.detach().flatten(0, -2), w.detach(), g.flatten(0, -2).float()
    expected = float8_linear_reference(*flat)
    assert (y.dtype, y.shape) == (torch.bfloat16, (*rows, d_out))
    assert x.grad is not None
    assert w.grad is not None
    for found, truth in zip((y.flatten(0, -2), x.grad.flatten(0, -2), w.grad), expected, strict=True):
        torch.testing.assert_close(found.float(), truth, atol=2**-8 * float(truth.abs().max()), rtol=2**-7)
    exact = flat[0] @ flat[1].T
    assert (
        y.flatten(0, -2).float() - exact
    ).norm() / exact.norm() < 0.06  # e4m3 has 3 bits behind the point: 2^-4 each


def test_rounding_by_hand() -> None:
    """Worked by hand: the largest value 2 becomes 448; 1 is 224 = 1.75 * 2^7, exact. 0.07 is 15.68, between 15 and 16 (steps of 1
    from 8 on): 16, that is 0.0714. In e5m2 2 becomes 57,344 and 0.07 is 2007 of steps 256: 2048, 0.0714."""
    x = torch.tensor([2.0, 1.0, 0.07, 0.0])
    assert rounded(x, FORWARD).tolist() == pytest.approx([2, 1, 16 * 2 / 448, 0])
    assert rounded(x, BACKWARD).tolist() == pytest.approx([2, 1, 2048 * 2 / 57_344, 0])
    codes, scale = quantize(torch.zeros(3), FORWARD)
    assert codes.float().tolist() == [0, 0, 0]
    assert scale > 0


def test_other_sizes_are_bfloat16() -> None:
    """Law: with a side that is no multiple of 16 it is F.linear in bfloat16, with its bias."""
    x, w, b = torch.randn(5, 16), torch.randn(32, 16), torch.randn(32)
    expected = torch.nn.functional.linear(x.to(torch.bfloat16), w.to(torch.bfloat16)) + b.to(torch.bfloat16)
    assert torch.equal(float8_linear(x, w, b), expected)


def test_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert float8_problem("cpu") == "float8 products need a GPU from Hopper on, this is cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    assert float8_problem("cuda:0") == "float8 products need a GPU from Hopper on, this is A100"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert float8_problem("cuda:0") is None
