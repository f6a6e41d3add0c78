"""Worked by hand: which backend runs, and the reason that an explicit one can't."""

import pytest
import torch

from graft.kernels import dispatch
from graft.kernels.dispatch import choose_backend, triton_problem

CPU = [torch.zeros(1)]


def test_auto_on_the_cpu_is_torch():
    assert choose_backend("rope", "auto", CPU) == "torch"
    assert choose_backend("rope", "reference", CPU) == "reference"


def test_reasons(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose auto, reference, torch or triton"):
        choose_backend("rope", "cuda", CPU)
    monkeypatch.setattr(dispatch, "triton_interprets", lambda: False)
    with pytest.raises(
        ValueError, match="rope: backend 'triton' can't run here: it needs CUDA tensors, got one on cpu"
    ):
        choose_backend("rope", "triton", CPU)
    monkeypatch.setattr(dispatch, "triton_interprets", lambda: None)
    with pytest.raises(ValueError, match="triton is not installed; pip install triton"):
        choose_backend("rope", "triton", CPU)
    monkeypatch.setattr(dispatch, "triton_interprets", lambda: True)
    assert triton_problem(CPU) is None
    with pytest.raises(ValueError, match="it takes float32, float16, bfloat16, got float64"):
        choose_backend("rope", "triton", [torch.zeros(1, dtype=torch.float64)])
    with pytest.raises(ValueError, match="can't run here: head size 7"):
        choose_backend("rope", "triton", CPU, unsupported="head size 7")
