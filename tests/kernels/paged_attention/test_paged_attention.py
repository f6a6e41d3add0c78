"""Paged attention: PyTorch's and Triton's form against the one written out, and against attention over rows."""

import pytest
import torch

from graft.kernels.attention import attention
from graft.kernels.paged_attention import paged_attention


def inputs(B=2, H=4, K=2, T=1, Dh=16, P=16, lengths=(5, 37), seed=0):
    """q, keys, values, table, lengths: pages in any order, table entries past the end that name other rows' pages."""
    generator = torch.Generator().manual_seed(seed)
    width = max(-(-n // P) for n in lengths) + 1
    n_pages = B * width + 3
    q = torch.randn(B, H, T, Dh, generator=generator)
    keys, values = (torch.randn(n_pages, K, P, Dh, generator=generator) for _ in range(2))
    table = torch.randperm(n_pages, generator=generator)[: B * width].view(B, width).int()
    return q, keys, values, table, torch.tensor(lengths, dtype=torch.int32)


CASES = {
    "one query": (inputs(), {}),
    "a page's border": (inputs(B=3, lengths=(16, 17, 32)), {}),
    "five queries, as in verification": (inputs(T=5, lengths=(5, 123)), {}),
    "window": (inputs(T=3, lengths=(41, 123)), {"window": 20}),
    "softcap": (inputs(T=2, lengths=(41, 64)), {"softcap": 1.5}),
    "a window of one": (inputs(lengths=(41, 64)), {"window": 1}),
    "padded head size": (inputs(Dh=24, P=32, lengths=(41, 123)), {}),
    "no group, scale": (inputs(H=2, K=2, T=2, lengths=(9, 33)), {"scale": 0.3}),
    "many pages": (inputs(B=1, H=3, K=1, P=32, lengths=(1100,)), {}),  # more splits than one
}


def within_bar(case, dtype, device):
    """STYLE.md's bar, section 4, on the output; there are no gradients."""
    (q, keys, values, table, lengths), options = CASES[case]
    q, keys, values = (tensor.to(device, dtype) for tensor in (q, keys, values))
    table, lengths = table.to(device), lengths.to(device)
    wide = [tensor.float() for tensor in (q, keys, values)]
    truth = paged_attention(*wide, table, lengths, **options, backend="reference")
    plain = paged_attention(q, keys, values, table, lengths, **options, backend="torch")
    found = paged_attention(q, keys, values, table, lengths, **options, backend="triton")
    allowed = 2 * (plain.float() - truth).abs().max() + 1e-5
    assert (found.float() - truth).abs().max() <= allowed


@pytest.mark.parametrize("case", CASES)
def test_torch_is_the_one_written_out(case):
    (q, keys, values, table, lengths), options = CASES[case]
    found = paged_attention(q, keys, values, table, lengths, **options, backend="torch")
    expected = paged_attention(q, keys, values, table, lengths, **options, backend="reference")
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)  # float32, sums of at most 1,100 terms below 1


def test_pages_are_the_rows_they_stand_for():
    """Parity with attention over contiguous keys and values, gathered here by hand, with key lengths."""
    q, keys, values, table, lengths = inputs(T=4, lengths=(20, 45))
    k, v = (pages[table.long()].transpose(1, 2).flatten(2, 3) for pages in (keys, values))  # (B, K, n * P, Dh)
    expected = attention(q, k, v, key_lengths=lengths, backend="reference")
    torch.testing.assert_close(paged_attention(q, keys, values, table, lengths), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_interpreter(interpreter, case, dtype):
    within_bar(case, dtype, interpreter)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_gpu(cuda, case, dtype):
    within_bar(case, dtype, cuda)


@pytest.mark.slow
def test_compiles(compile_kernels, usable_shared):
    """Tensor cores, no spill, the shared memory of each GPU; one query and the sixteen of a verification."""
    jobs = {}
    for arch in (80, 90):
        for name, dtype, block_q in (("bf16", "bf16", 16), ("verification", "fp16", 64), ("float32", "fp32", 16)):
            x, f = f"*{dtype}", "*fp32"
            args = {"q": x, "keys": x, "values": x, "table": "*i32", "lengths": "*i32", "parts": f, "part_lse": f}
            for tensor, axes in (("q", "bht"), ("k", "phs"), ("v", "phs")):
                args |= {f"stride_{tensor}{axis}": "i32:16" for axis in axes} | {f"stride_{tensor}d": 1}
            args |= dict.fromkeys(("n", "H", "G", "T", "window", "n_splits"), "i32") | {
                "qk_scale": "fp32",
                "cap": "fp32",
            }
            args |= {"Dh": 128, "WINDOW": True, "SOFTCAP": True, "PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
            args |= {"PAGE": 32, "BLOCK_Q": block_q, "BLOCK_D": 128}
            module = "graft.kernels.paged_attention.triton_paged_attention"
            jobs[name, arch] = {"module": module, "kernel": "paged_decode", "args": args, "arch": arch}
    for (name, arch), made in zip(jobs, compile_kernels(list(jobs.values())), strict=True):
        assert made.tensor_cores, (name, arch)
        assert made.shared <= usable_shared[arch], (name, made.shared)
        assert made.spill_bytes == 0, (name, made.spill_bytes)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"lengths": torch.tensor([0, 5], dtype=torch.int32)}, "lengths span 0..5; each must be in 1..64"),
        ({"lengths": torch.tensor([5, 65], dtype=torch.int32)}, "lengths span 5..65"),
        ({"lengths": torch.tensor([5.0, 6.0])}, "lengths is float32"),
        ({"table": torch.full((2, 4), 99, dtype=torch.int32)}, "table names pages 99..99; there are 0..10"),
        ({"q": torch.zeros(2, 3, 1, 16)}, "3 query heads are not a multiple of 2 kv heads"),
        ({"q": torch.zeros(2, 4, 1, 16, dtype=torch.float16)}, "q is float16 on cpu, keys are float32"),
        ({"q": torch.zeros(2, 4, 16)}, "paged_attention takes q"),
        ({"window": 0}, "window=0 must be >= 1"),
        ({"softcap": 0.0}, "softcap=0.0 must be > 0"),
        ({"backend": "triton"}, "paged_attention"),
    ],
)
def test_bad_input_is_named(change, part):
    names = ("q", "keys", "values", "table", "lengths")
    fields = dict(zip(names, inputs(), strict=True)) | change
    if change == {"backend": "triton"}:
        fields |= {"keys": torch.zeros(11, 2, 12, 16), "values": torch.zeros(11, 2, 12, 16)}  # no power of two
    tensors = [fields.pop(name) for name in names]
    with pytest.raises((ValueError, RuntimeError), match=part):
        paged_attention(*tensors, **fields)
