"""Worked by hand, law, and parity with torch.optim.AdamW."""

import pytest
import torch

from graft.kernels.adamw import adamw_update_
from graft.kernels.adamw.torch_adamw import SLICE, slices

BACKENDS = ["reference", "torch"]
OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend, dtype):
    """Step 1 from zero moments: both corrected moments are g and g^2, so p moves by lr * sign(g) after the decay.
    p = 2 (1 - 0.5 * 0.1) - 0.5 * 3 / (3 + 1) = 1.9 - 0.375 = 1.525, with lr 0.5, decay 0.1, eps 1."""
    p, g, m, v = (torch.tensor([x], dtype=dtype) for x in (2.0, 3.0, 0.0, 0.0))
    adamw_update_([p], [g], [m], [v], step=1, lr=0.5, beta1=0.9, beta2=0.99, eps=1.0, weight_decay=0.1, backend=backend)
    torch.testing.assert_close(p, torch.tensor([1.525], dtype=dtype))
    torch.testing.assert_close(m, torch.tensor([0.3], dtype=dtype))
    torch.testing.assert_close(v, torch.tensor([0.09], dtype=dtype))


@pytest.mark.parametrize("moments", [torch.float32, torch.float64])  # float64 beside float32 takes the foreach form
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_with_torch(backend, moments):
    torch.manual_seed(0)
    ours = [torch.randn(s) for s in ((5, 3), (7,), (2, 1, 4))]
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    m, v = ([torch.zeros_like(p, dtype=moments) for p in ours] for _ in range(2))
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 6):
        grads = [torch.randn_like(p) for p in ours]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        adamw_update_(ours, grads, m, v, step=step, **OPTIONS, backend=backend)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.detach())


def test_narrow_parameters_round_once():
    """bfloat16 parameters beside float32 moments: the foreach form equals the definition to the bit."""
    torch.manual_seed(0)
    start = [torch.randn(50).bfloat16(), torch.randn(3, 4).bfloat16()]
    results = []
    for backend in BACKENDS:
        params = [p.clone() for p in start]
        m, v = ([torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2))
        torch.manual_seed(1)
        for step in range(1, 4):
            adamw_update_(params, [torch.randn_like(p) for p in params], m, v, step=step, **OPTIONS, backend=backend)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=2**-7)  # one step of bfloat16 where a sum fell on a border


def test_slices_cover_everything_once():
    sizes = [1, SLICE, 3, SLICE - 3, 5]
    parts = list(slices([torch.empty(n, device="meta") for n in sizes]))
    assert [(p.start, p.stop) for p in parts] == [(0, 2), (2, 4), (4, 5)]
    assert list(slices([])) == []


def test_nothing_to_update():
    adamw_update_([], [], [], [], step=1, **OPTIONS)


def test_bad_input():
    one = [torch.ones(2)]
    with pytest.raises(ValueError, match="1 params, 2 grads, 1 exp_avgs, 1 exp_avg_sqs"):
        adamw_update_(one, one * 2, one, one, step=1, **OPTIONS)
    with pytest.raises(ValueError, match="step=0; the first update is step 1"):
        adamw_update_(one, one, one, one, step=0, **OPTIONS)
    with pytest.raises(ValueError, match=r"grads\[0\] has shape \(3,\), not \(2,\)"):
        adamw_update_(one, [torch.ones(3)], one, one, step=1, **OPTIONS)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] has dtype int64"):
        adamw_update_(one, one, [torch.ones(2).long()], one, step=1, **OPTIONS)
    with pytest.raises(ValueError, match="adamw: backend 'triton' can't run here: "):
        adamw_update_(one, one, one, one, step=1, **OPTIONS, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu(cuda, dtype):
    """The fused operator against the definition; with float32 moments beside bfloat16 it is the foreach form."""
    for moments in (dtype, torch.float32):
        results = []
        for backend in BACKENDS:
            torch.manual_seed(0)
            p, g = (torch.randn(1000, device=cuda, dtype=dtype) for _ in range(2))
            m, v = (torch.zeros(1000, device=cuda, dtype=moments) for _ in range(2))
            adamw_update_([p], [g], [m], [v], step=1, **OPTIONS, backend=backend)
            results.append(p)
        torch.testing.assert_close(*results)
