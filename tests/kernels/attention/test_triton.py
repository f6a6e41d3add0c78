"""Numerics of the Triton kernels, in the interpreter and on a GPU, by STYLE.md's bar; laws that they alone could break."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from graft.kernels.attention import attention

ints = torch.int32


def inputs(B=1, H=2, K=1, T=41, S=41, Dh=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, Dh), (B, K, S, Dh), (B, K, S, Dh)
    return [torch.randn(s, generator=generator) for s in shapes]


def borders(*edges):
    return torch.tensor(edges, dtype=ints)


CASES = {
    "plain": (inputs(), {}),
    "123 keys, 41 queries": (inputs(B=2, H=4, K=2, T=41, S=123, Dh=32), {}),
    "more queries than keys": (inputs(T=41, S=7), {}),
    "full": (inputs(K=2, T=41, S=123), {"causal": False}),
    "padded head size": (inputs(T=41, Dh=24), {}),
    "window": (inputs(T=150, S=150), {"window": 37}),
    "softcap": (inputs(B=2, T=70, S=70), {"softcap": 2.0}),
    "documents": (inputs(T=150, S=150), {"cu_seqlens": borders(0, 3, 3, 90, 147)}),
    "documents, window": (inputs(T=150, S=150), {"cu_seqlens": borders(0, 70, 150), "window": 9}),
    "documents, full": (inputs(T=41, S=41), {"cu_seqlens": borders(0, 20, 41), "causal": False}),
    "key lengths": (inputs(B=3, T=7, S=123), {"key_lengths": borders(0, 5, 123)}),
    "key lengths, window": (inputs(B=2, T=7, S=123), {"key_lengths": borders(50, 100), "window": 5}),
    "one query": (inputs(B=2, H=4, K=2, T=1, S=123), {}),
}


def run(options):
    """For within_bar. The torch backend soft-caps in float32, so plain torch in the same dtype is written out here."""

    def go(backend, q, k, v):
        if backend != "torch" or "softcap" not in options:
            return attention(q, k, v, **options, backend=backend)
        cap, groups = options["softcap"], q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.tanh(q @ k.mT * (q.shape[-1] ** -0.5 / cap)) * cap
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~past, float("-inf")).softmax(-1) @ v

    return go


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_interpreter(interpreter, within_bar, case, dtype):
    tensors, options = CASES[case]
    within_bar(run(options), tensors, dtype)


def test_strided_inputs(interpreter, within_bar):
    """Heads split by a view, and every second position of a longer key tensor: no copy, and out merges by a view."""
    qkv = torch.randn(2, 41, 6, 16, generator=torch.Generator().manual_seed(0)).transpose(
        1, 2
    )  # (B, 4 + 2 heads, T, Dh)
    q = qkv[:, :4]
    k, v = inputs(B=2, K=2, S=82)[1:]
    tensors = [q, k[:, :, ::2], v[:, :, 1::2]]
    within_bar(lambda backend, *x: attention(*x, backend=backend), tensors, torch.float32)
    heads = torch.randn(2, 41, 4, 16).transpose(1, 2)
    merged = attention(heads, heads, heads, backend="triton").transpose(1, 2)
    assert merged.is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float16, {"key_lengths": borders(300, 0, 213)}),
        (torch.float32, {"window": 70, "softcap": 2.0, "key_lengths": borders(300, 0, 213)}),
    ],
)
def test_decoding_splits_the_keys(interpreter, dtype, options):
    """T = 1 without gradients takes the split kernels: within the bar of the reference, whatever the number of splits."""
    from graft.kernels.attention.triton_attention import decode

    q, k, v = (x.to(dtype) for x in inputs(B=3, H=3, K=1, T=1, S=300, Dh=24))
    truth = attention(q.float(), k.float(), v.float(), **options, backend="reference")
    rough = attention(q, k, v, **options, backend="torch")
    allowed = 2 * (rough - truth).abs().max() + 1e-5
    for n_splits in (None, 1, 4):
        lengths, window, softcap = (options.get(name) for name in ("key_lengths", "window", "softcap"))
        got = decode(q, k, v, lengths, 24**-0.5, window, softcap, n_splits=n_splits)
        assert (got - truth).abs().max() <= allowed
    with torch.no_grad():
        assert torch.equal(
            attention(q, k, v, **options, backend="triton"), decode(q, k, v, lengths, 24**-0.5, window, softcap)
        )


def test_gradients_repeat_bit_for_bit_and_under_checkpoint(interpreter):
    q, k, v = (x.requires_grad_() for x in inputs())

    def gradients(run):
        return torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v))

    once = gradients(lambda *x: attention(*x, backend="triton"))
    again = gradients(lambda *x: checkpoint(lambda *y: attention(*y, backend="triton"), *x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_saves_what_flash_attention_saves(interpreter):
    """Law: q, k, v, out and the log-sum-exp are kept, nothing that grows with T x S."""
    q, k, v = (x.requires_grad_() for x in inputs(T=150, S=150))
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        attention(q, k, v, backend="triton")
    assert sorted(shapes) == sorted([(1, 2, 150, 16)] * 2 + [(1, 1, 150, 16)] * 2 + [(1, 2, 150)])


def test_nan_past_the_key_length_is_not_read(interpreter):
    """A cache's unused end may hold anything."""
    q, k, v = inputs(T=3, S=60)
    k[:, :, 50:], v[:, :, 50:] = float("nan"), float("nan")
    lengths = borders(50)
    want = attention(q, k[:, :, :50], v[:, :, :50], backend="reference")
    torch.testing.assert_close(attention(q, k, v, key_lengths=lengths, backend="triton"), want)
    newest = attention(q[:, :, -1:], k, v, key_lengths=lengths, backend="triton")
    torch.testing.assert_close(newest, want[:, :, -1:])


def test_empty_inputs(interpreter):
    q, k, v = inputs(T=0)
    assert attention(q, k, v, backend="triton").shape == (1, 2, 0, 16)
    q, k, v = inputs(S=0)
    assert not attention(q, k, v, backend="triton").any()
    assert not attention(q[:, :, :1], k, v, backend="triton").any()


def test_operators_pass_pytorchs_own_check(interpreter):
    """Schema, fake tensors and autograd registration, which torch.compile relies on, by torch.library.opcheck."""
    from graft.kernels.attention.triton_attention import attention_op, decode_op

    q, k, v = (x.requires_grad_() for x in inputs(T=5, S=9))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(attention_op, (q, k, v, None, None, True, 0.25, None, None), test_utils=checks)
    one = (q[:, :, :1].detach(), k.detach(), v.detach(), borders(4), 0.25, None, 2.0)
    torch.library.opcheck(decode_op, one, test_utils=("test_schema", "test_faketensor"))


def test_compiled_whole(interpreter):
    """torch.compile traces the call in one graph, dispatch and backward included, and computes the same."""
    tensors = [x.requires_grad_() for x in inputs(T=9, S=12)]
    found = []
    for go in (run({}), torch.compile(run({}), backend="aot_eager", fullgraph=True)):
        out = go("triton", *tensors)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


GPU_CASES = CASES | {
    "many tiles": (inputs(B=2, H=8, K=2, T=1000, S=1000, Dh=128), {}),
    "many tiles, head 64, window": (inputs(B=1, H=8, K=2, T=1000, S=1500, Dh=64), {"window": 300}),
    "many tiles, head 256": (inputs(B=1, H=2, K=1, T=500, S=500, Dh=256), {"softcap": 20.0}),
    "many documents": (inputs(H=8, K=8, T=2000, S=2000, Dh=64), {"cu_seqlens": borders(0, 700, 701, 1500, 2000)}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", GPU_CASES)
def test_gpu(cuda, within_bar, case, dtype):
    tensors, options = GPU_CASES[case]
    moved = {name: x.to(cuda) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    tensors = [x.to(cuda) for x in tensors]
    within_bar(run(moved), tensors, dtype)
