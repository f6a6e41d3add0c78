"""Before any test module is imported: Triton's interpreter is on where there is no GPU, and `gpu` tests are skipped there.

Triton reads TRITON_INTERPRET when it is imported and when a kernel is decorated, and other packages import Triton too,
so it is set here, in the one conftest that pytest loads first under `pytest`, `pytest tests/kernels/rope` and xdist alike.
"""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    assert "triton" not in sys.modules, "triton was imported before TRITON_INTERPRET was set"
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
