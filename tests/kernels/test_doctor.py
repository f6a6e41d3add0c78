"""Law: graft doctor names every kernel there is, the backend that auto takes for it, and a reason."""

from pathlib import Path

import pytest
import torch

from graft.kernels import doctor
from graft.kernels.dispatch import shared_memory

FOLDER = Path(doctor.__file__).parent


def test_every_kernel_has_a_row():
    folders = {path.parent.name for path in FOLDER.glob("*/reference.py")}
    assert {row.kernel for row in doctor.report()} == folders


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells about a machine without a GPU")
def test_without_a_gpu():
    for row in doctor.report():
        assert row.backend == "torch"
        assert row.why
    attention = next(row for row in doctor.report() if row.kernel == "attention")
    assert "no GPU is visible" in attention.why
    assert "scaled_dot_product_attention" in attention.why


def test_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    rows = [doctor._row(kernel, None, torch.device("cpu")) for kernel in doctor.KERNELS]
    assert rows[0].backend == "triton"
    assert "H200, sm_90, 227 KB of shared memory; float32, float16, bfloat16; torch for head sizes" in rows[0].why
    assert {row.kernel for row in rows if row.backend == "torch"} == {*doctor.TORCH_ONLY}
    assert shared_memory(torch.device("cpu")) == 227 * 1024


@pytest.mark.gpu
def test_on_a_gpu(cuda):
    assert next(row for row in doctor.report() if row.kernel == "attention").backend == "triton"
