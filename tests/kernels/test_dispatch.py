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


def test_a_prediction_chooses_as_on_its_device():
    """Worked by hand: CPU tensors count as the predicted device's, for `auto` alone and only within the block."""
    with dispatch.predicting("cuda"):
        on_gpu = "triton" if dispatch.triton_interprets() is not None else "torch"
        assert choose_backend("rope", "auto", CPU) == on_gpu
        assert choose_backend("rope", "auto", CPU, unsupported="head size 7") == "torch"
        assert choose_backend("rope", "torch", CPU) == "torch"
        assert dispatch.sampled([0, 1, 2, 3, 4]) == [0, 3, 4]
        assert dispatch.sampled([0, 1, 2]) == [0, 1, 2]
    assert choose_backend("rope", "auto", CPU) == "torch"
    assert dispatch.sampled([0, 1, 2, 3, 4]) == [0, 1, 2, 3, 4]


def test_constant_marks_as_torch_does():
    """Parity with torch.compiler.assume_constant_result, which can't be used: it imports torch._dynamo."""
    ours, peer = dispatch.constant(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(peer)


def test_no_command_imports_the_compiler():
    """Law: a model, its loss, a prediction and generation import neither torch._dynamo nor sympy at import; plan no torch."""
    import subprocess
    import sys

    code = (
        "import sys, graft.finetune.session, graft.finetune.sft, graft.finetune.memory.predict as p\n"
        "assert 'torch._dynamo' not in sys.modules and 'sympy' not in sys.modules\n"
        "p.estimate_memory('nano', method='lora', seq_len=32, device='cpu')\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys; sys.argv = ['graft', 'plan', '--model', 'nano']\n"
        "from graft.cli import app\n"
        "try: app()\nexcept SystemExit: pass\n"
        "import graft.base.plots\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
