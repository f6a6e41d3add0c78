"""The short causal convolution: by hand, against F.conv1d, gradients, carried tokens, packed documents."""

import pytest
import torch

from graft.kernels.causal_conv import causal_conv

X = torch.randn(2, 11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_by_hand() -> None:
    """By hand: weights (1, 10) over 1, 2, 3: 10, 1 + 20, 2 + 30."""
    out = causal_conv(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1), torch.tensor([[1.0, 10.0]]))
    assert out.flatten().tolist() == [10.0, 21.0, 32.0]


def test_parity_and_gradients() -> None:
    """Parity with F.conv1d, alone, after other tokens and over packed documents (one shorter than the window, one empty)."""
    cu_seqlens = torch.tensor([0, 1, 5, 5, 11])
    for x, options in ((X, {}), (X[:, 3:], {"before": X[:, :3]}), (X[:1], {"cu_seqlens": cu_seqlens})):
        torch.testing.assert_close(causal_conv(x, W, **options), causal_conv(x, W, backend="reference", **options))
        tensors = [t.clone().requires_grad_() for t in (x, W)]
        assert torch.autograd.gradcheck(lambda x, w, options=options: causal_conv(x, w, **options), tensors)
    torch.testing.assert_close(causal_conv(X[:, 3:], W, before=X[:, :3]), causal_conv(X, W)[:, 3:])


def test_half_precision_is_summed_in_float32() -> None:
    x = X.bfloat16()
    assert torch.equal(causal_conv(x, W.float()), causal_conv(x.float(), W.float()).bfloat16())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(5, 4\), not \(6, 4\)"):
        causal_conv(X, W[:5])
    with pytest.raises(ValueError, match=r"before has shape \(2, 2, 6\), not \(2, 3, 6\)"):
        causal_conv(X, W, before=X[:, :2])
    with pytest.raises(ValueError, match="needs B = 1 and nothing before it, got B = 2"):
        causal_conv(X, W, cu_seqlens=torch.tensor([0, 11]))
