"""Law: the bench runs tiny without a GPU, each of the issue's attention rows is there, and nothing is judged on a CPU."""

import pytest
import torch

from graft.kernels.attention.bench import bench


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny sizes are the interpreter's")
def test_bench(interpreter):
    rows = bench(quick=True)
    assert all(set(row) == {"name", "value", "unit", "bar", "ok"} and row["ok"] is None for row in rows)
    with_bar = [row["name"] for row in rows if row["bar"]]
    for part in ("forward", "backward", "memory", "packed"):
        assert any(part in name for name in with_bar), part
