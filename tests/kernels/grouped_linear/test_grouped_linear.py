"""Worked by hand, parity of the grouped product with a product a group, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.kernels.grouped_linear import grouped_linear

BACKENDS = ["reference", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """Row 0 meets [1 2], rows 1 and 2 meet [3 4]; the group between them is empty."""
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[[1.0, 2.0]], [[9.0, 9.0]], [[3.0, 4.0]]])
    got = grouped_linear(x, weight, torch.tensor([1, 1, 3], dtype=torch.int32), backend=backend)
    assert got.tolist() == [[3.0], [3.0], [4.0]]


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    n_in=st.sampled_from([3, 8, 12]),  # 3: rows that torch's grouped product does not take
    n_out=st.sampled_from([4, 7]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_equals_one_product_a_group(counts: list[int], n_in: int, n_out: int, seed: int) -> None:
    """Parity: values and both gradients, for empty groups and no rows at all too."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(counts), n_out, n_in, generator=generator)
    x = torch.randn(sum(counts), n_in, generator=generator)
    grad = torch.randn(sum(counts), n_out, generator=generator)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    found = []
    for backend in BACKENDS:
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = grouped_linear(*inputs, ends, backend=backend)
        found.append([out, *torch.autograd.grad(out, inputs, grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "weight", "ends", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 5, 6), torch.zeros(2, dtype=torch.int32), "don't fit"),
        (torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.zeros(3, dtype=torch.int32), "one end for each of 2 groups"),
        (torch.zeros(3, 4), torch.zeros(2, 5, 4).half(), torch.zeros(2, dtype=torch.int32), "cast one to the other"),
        (torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.zeros(2), "ends"),
    ],
)
def test_what_is_refused(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_linear(x, weight, ends)


def test_there_is_no_triton_form_yet() -> None:
    with pytest.raises(ValueError, match="no Triton form is written"):
        grouped_linear(torch.zeros(2, 4), torch.zeros(1, 3, 4), torch.tensor([2], dtype=torch.int32), backend="triton")
