"""Worked by hand, law and parity of the reference and torch backends; errors; Triton's numerics are in test_triton.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from graft.kernels.attention import attention

BACKENDS = ["reference", "torch"]
ints = torch.int32


def inputs(B=2, H=4, K=2, T=7, S=7, Dh=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, Dh), (B, K, S, Dh), (B, K, S, Dh)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """q k^T = [[0, log 3]] for one query: weights 1/4 and 3/4 of v = [8, 4] give 5; causal row 0 sees v[0] alone: 8."""
    q = torch.tensor([0.0, 1.0]).reshape(1, 1, 2, 1)
    k = torch.tensor([0.0, math.log(3)]).reshape(1, 1, 2, 1)
    v = torch.tensor([8.0, 4.0]).reshape(1, 1, 2, 1)
    got = attention(q, k, v, scale=1.0, backend=backend)
    torch.testing.assert_close(got.flatten(), torch.tensor([8.0, 5.0]))
    full = attention(q, k, v, causal=False, scale=1.0, backend=backend)
    torch.testing.assert_close(full.flatten(), torch.tensor([6.0, 5.0]))  # row 0: equal scores, the mean


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_by_hand(backend):
    """Scores 0 and 1000 capped at log 3: tanh(1000 / log 3) = 1, so the weights are 1/4 and 3/4 again."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 1000.0]).reshape(1, 1, 2, 1)
    v = torch.tensor([8.0, 4.0]).reshape(1, 1, 2, 1)
    got = attention(q, k, v, scale=1.0, softcap=math.log(3), backend=backend)
    torch.testing.assert_close(got.flatten(), torch.tensor([5.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_is_aligned_to_the_bottom_right(backend):
    """Two queries on five keys: the first sees keys 0..3, the last all; with values 1, 2, 4, 8, 16 the sums tell."""
    q, k = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 5, 1)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).reshape(1, 1, 5, 1)
    torch.testing.assert_close(attention(q, k, v, backend=backend).flatten(), torch.tensor([15 / 4, 31 / 5]))
    windowed = attention(q, k, v, window=2, backend=backend)
    torch.testing.assert_close(windowed.flatten(), torch.tensor([6.0, 12.0]))  # (4 + 8) / 2, (8 + 16) / 2
    lengths = torch.tensor([3], dtype=ints)
    short = attention(q, k, v, key_lengths=lengths, backend=backend)
    torch.testing.assert_close(short.flatten(), torch.tensor([3 / 2, 7 / 3]))  # keys 0..1, then 0..2


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_are_zero_and_so_are_their_gradients(backend):
    q, k, v = inputs(T=9, S=4)
    out = attention(q, k, v, backend=backend)
    dq, dk, _ = torch.autograd.grad(out.sum(), (q, k, v))
    assert not out[:, :, :5].any()
    assert not dq[:, :, :5].any()
    assert out[:, :, 5:].all()
    assert torch.isfinite(dk).all()
    nobody = attention(q, k, v, key_lengths=torch.tensor([0, 4], dtype=ints), backend=backend)
    assert not nobody[0].any()


OPTIONS = {
    "plain": {},
    "full": {"causal": False},
    "window": {"window": 3},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.3},
    "lengths": {"key_lengths": torch.tensor([2, 7], dtype=ints)},
    "lengths, full": {"key_lengths": torch.tensor([0, 5], dtype=ints), "causal": False},
    "lengths, window": {"key_lengths": torch.tensor([6, 3], dtype=ints), "window": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("T", [1, 4, 7])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_torch_is_the_reference(options, T, K):
    tensors = inputs(T=T, K=K)
    grad = torch.randn(2, 4, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for backend in BACKENDS:
        out = attention(*tensors, **options, backend=backend)
        found.append([out, *torch.autograd.grad(out, tensors, grad)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("causal", [True, False])
def test_parity_with_sdpa(causal):
    q, k, v = inputs(T=41, S=41, dtype=torch.float32)
    want = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=causal)
    torch.testing.assert_close(attention(q, k, v, causal=causal, backend="reference"), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"causal": False}])
def test_packed_documents_are_alone(backend, options):
    """Law: a packed row equals its documents one by one; an empty document and tokens past the last border add nothing."""
    q, k, v = inputs(B=1, T=12, S=12)
    borders = torch.tensor([0, 5, 5, 10], dtype=ints)
    got = attention(q, k, v, cu_seqlens=borders, backend=backend, **options)
    for a, b in ((0, 5), (5, 10)):
        alone = attention(*(x[:, :, a:b] for x in (q, k, v)), backend="reference", **options)
        torch.testing.assert_close(got[:, :, a:b], alone)
    assert not got[:, :, 10:].any()


@given(
    T=st.integers(1, 12), S=st.integers(1, 12), G=st.integers(1, 3), K=st.integers(1, 2), window=st.integers(1, 14) | st.none()
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_no_query_sees_the_future(T, S, G, K, window):
    """Law: changing the keys and values that the mask hides changes no bit of the reference."""
    q, k, v = (x.detach() for x in inputs(B=1, H=G * K, K=K, T=T, S=S))
    before = attention(q, k, v, window=window, backend="reference")
    for t in range(T):
        position = t + S - T
        hidden = torch.ones(S, dtype=torch.bool)
        hidden[max(0, position + 1 - (window or S)) : max(0, position + 1)] = False
        other = [torch.where(hidden[:, None], 7.0, x) for x in (k, v)]
        after = attention(q, *other, window=window, backend="reference")
        assert torch.equal(after[:, :, t], before[:, :, t])


def test_decoding_equals_the_full_pass():
    """Law: one query at a time against a growing cache gives the rows of the full pass."""
    q, k, v = (x.detach() for x in inputs(T=7))
    full = attention(q, k, v)
    for t in range(7):
        step = attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        torch.testing.assert_close(step, full[:, :, t : t + 1])
        padded = attention(q[:, :, t : t + 1], k, v, key_lengths=torch.full((2,), t + 1, dtype=ints))
        torch.testing.assert_close(padded, full[:, :, t : t + 1])


@pytest.mark.parametrize("options", [{}, {"causal": False, "softcap": 2.0}, {"window": 2}])
def test_gradcheck(options):
    tensors = inputs(B=1, H=2, K=1, T=4, S=5, Dh=3)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **options, backend="reference"), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_checkpoint_autocast_and_fake_tensors(backend):
    q, k, v = inputs(dtype=torch.float32)
    plain = torch.autograd.grad(attention(q, k, v, backend=backend).sum(), (q, k, v))
    kept = checkpoint(lambda *x: attention(*x, backend=backend), q, k, v, use_reentrant=False)
    for got, want in zip(torch.autograd.grad(kept.sum(), (q, k, v)), plain, strict=True):
        assert torch.equal(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, k, v, backend=backend).dtype == torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(1, 4, 6, 16)
        borders = torch.empty(3, dtype=ints)
        for options in ({}, {"cu_seqlens": borders}, {"key_lengths": torch.empty(1, dtype=ints)}):
            assert attention(fake, fake, fake, backend=backend, **options).shape == (1, 4, 6, 16)


def test_torch_keeps_no_score_matrix():
    """Law: at 2048 tokens the torch backend saves less than one head's scores (16 MB) for the backward pass."""
    q, k, v = (torch.randn(1, 2, 2048, 16, requires_grad=True) for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        attention(q, k, v)
    assert sum(sizes) < 2048 * 2048


def shaped(*shape, **kw):
    return torch.zeros(shape, **kw)


GOOD = (shaped(2, 4, 5, 16), shaped(2, 2, 5, 16), shaped(2, 2, 5, 16))


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ((shaped(4, 5, 16), *GOOD[1:]), {}, r"q \(4, 5, 16\)"),
        ((*GOOD[:2], shaped(2, 2, 6, 16)), {}, r"v \(2, 2, 6, 16\)"),
        ((shaped(3, 4, 5, 16), *GOOD[1:]), {}, r"q \(3, 4, 5, 16\) and k .* differ in batch"),
        ((shaped(2, 4, 5, 32), *GOOD[1:]), {}, "differ in batch or head size"),
        ((shaped(2, 3, 5, 16), *GOOD[1:]), {}, "3 query heads are not a multiple of 2 kv heads"),
        ((GOOD[0].half(), *GOOD[1:]), {}, "k is float32 on cpu but q is float16"),
        ([x.int() for x in GOOD], {}, "attention takes float16, bfloat16, float32, float64, got int32"),
        (GOOD, {"window": 0}, "window=0 with causal=True"),
        (GOOD, {"window": 4, "causal": False}, "window=4 with causal=False"),
        (GOOD, {"softcap": 0.0}, "softcap=0.0 must be > 0"),
        (GOOD, {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens needs B = 1, T = S .* got B=2"),
        ([x[:1] for x in GOOD], {"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens is float32"),
        ([x[:1] for x in GOOD], {"cu_seqlens": torch.tensor([5])}, r"cu_seqlens has shape \(1,\)"),
        ([x[:1] for x in GOOD], {"cu_seqlens": torch.tensor([0, 4, 3])}, r"cu_seqlens \[0, 4, 3\] must start at 0"),
        ([x[:1] for x in GOOD], {"cu_seqlens": torch.tensor([0, 6])}, "end at most at T=5"),
        (GOOD, {"key_lengths": torch.tensor([5])}, r"key_lengths has shape \(1,\)"),
        (GOOD, {"key_lengths": torch.tensor([5, 6])}, "key_lengths span 5..6"),
        (GOOD, {"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_bad_input(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*tensors, **options)


def test_triton_without_a_gpu_says_what_is_missing(monkeypatch):
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="backend 'triton' can't run here: it needs CUDA tensors, got one on cpu"):
        attention(*GOOD, backend="triton")


@pytest.mark.parametrize(
    ("d_head", "options", "message"),
    [(8, {}, "head sizes 16 to 256, got 8"), (264, {}, "got 264"), (16, {"scale": -1.0}, "scale > 0, got -1.0")],
)
def test_triton_says_what_it_does_not_take(interpreter, d_head, options, message):
    x = shaped(1, 1, 4, d_head)
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, backend="triton", **options)
    with pytest.raises(ValueError, match="takes float32, float16, bfloat16, got float64"):
        attention(x.double(), x.double(), x.double(), backend="triton")
    assert attention(x, x, x, **options).shape == x.shape  # auto
