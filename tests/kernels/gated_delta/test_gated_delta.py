"""The gated delta rule: by hand, chunks against the recurrence, carried states, packed documents, half precision."""

import pytest
import torch
import torch.nn.functional as F

from graft.kernels.gated_delta import gated_delta


def inputs(B: int, H: int, T: int, Dk: int, Dv: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D, dtype=torch.float64, generator=generator) for D in (Dk, Dk, Dv))
    log_decay, beta = (torch.rand(B, H, T, dtype=torch.float64, generator=generator) for _ in range(2))
    tensors = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, -log_decay, beta]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_by_hand(backend: str) -> None:
    """By hand, Dk = Dv = 1, k = 1: S becomes beta 2, then half of it decays and a quarter of the rest is replaced by v = 5:
    2 -> 1 -> 1 + 0.25 (5 - 1) = 2; o = S q."""
    one = torch.ones(1, 1, 2, 1)
    v = torch.tensor([2.0, 5.0]).view(1, 1, 2, 1)
    log_decay, beta = torch.tensor([[[1.0, 0.5]]]).log(), torch.tensor([[[1.0, 0.25]]])
    out, state = gated_delta(3 * one, one, v, log_decay, beta, backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([6.0, 6.0]))
    torch.testing.assert_close(state.flatten(), torch.tensor([2.0]))


@pytest.mark.parametrize("T", [1, 5, 64, 130])
def test_chunks_equal_the_recurrence(T: int) -> None:
    """Law: output, last state and every gradient, to float64's rounding; lengths around a chunk's 64 tokens."""
    tensors = [*inputs(2, 3, T, 6, 5), torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)]
    found = []
    for backend in ("torch", "reference"):
        out, state = gated_delta(*tensors[:5], state=tensors[5], backend=backend)
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + state.square().sum()
        found.append([out, state, *torch.autograd.grad(loss, tensors)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-10)


def test_a_state_carries_a_text_on() -> None:
    """Law: two pieces, the second from the first's state, are one text; tokens of beta 0 and decay 1 change no state."""
    tensors = inputs(2, 2, 100, 8, 4)
    whole, last = gated_delta(*tensors)
    first, state = gated_delta(*(t[:, :, :37] for t in tensors))
    second, state = gated_delta(*(t[:, :, 37:] for t in tensors), state=state)
    torch.testing.assert_close(torch.cat([first, second], 2), whole)
    torch.testing.assert_close(state, last)
    q, k, v, log_decay, beta = (t[:, :, :9] for t in tensors)
    torch.testing.assert_close(gated_delta(q, k, v, 0 * log_decay, 0 * beta, state=last)[1], last)


def test_packed_documents_do_not_meet() -> None:
    """Law: each document's output and gradients are those of the document alone, across and within chunks; one is empty."""
    tensors, cu_seqlens = inputs(1, 2, 150, 6, 5), torch.tensor([0, 3, 70, 70, 135, 150])
    tensors[3] = (tensors[3].detach() / 100).requires_grad_()  # what a document left would last beyond a chunk
    out, _ = gated_delta(*tensors, cu_seqlens=cu_seqlens)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    found = torch.autograd.grad((out * weights).sum(), tensors)
    alone = [gated_delta(*(t[:, :, a:b] for t in tensors))[0] for a, b in ((0, 3), (3, 70), (70, 135), (135, 150))]
    torch.testing.assert_close(out, torch.cat(alone, 2))
    expected = torch.autograd.grad((torch.cat(alone, 2) * weights).sum(), tensors)
    torch.testing.assert_close(found, expected)


def test_half_precision_is_computed_in_float32() -> None:
    """Parity: bfloat16's result is the float32 one, rounded once; under autocast too."""
    tensors = [t.detach() for t in inputs(1, 2, 70, 8, 8, torch.bfloat16)]
    exact, _ = gated_delta(*(t.float() for t in tensors))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = gated_delta(*tensors)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, exact.bfloat16())


def test_what_does_not_fit_is_refused() -> None:
    tensors = [t.detach() for t in inputs(2, 2, 5, 4, 4)]
    with pytest.raises(ValueError, match=r"beta has shape \(2, 2, 4\), not \(2, 2, 5\)"):
        gated_delta(*tensors[:4], tensors[4][:, :, :4])
    with pytest.raises(ValueError, match="needs B = 1 and no state, got B = 2"):
        gated_delta(*tensors, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"q has shape \(2, 2, 0, 4\)"):
        gated_delta(*(t[:, :, :0] for t in tensors))
    with pytest.raises(ValueError, match="no Triton form is written"):
        gated_delta(*(t.float() for t in tensors), backend="triton")
