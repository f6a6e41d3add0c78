"""Law: a damaged file is one line. No reader answers 2,000 damaged inputs (seeded: the same ones every time) with anything but
ValueError or OSError, ends by a signal, takes 10 s of processor time or maps 2 GiB beyond what its imports took."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

INPUTS = Path(__file__).with_name("inputs.py")
COUNTS = {
    "tokenizer": 300, "config": 300, "safetensors": 250, "adapter": 300, "records": 300, "templates": 200, "toml": 200,
    "runs": 150,
}  # fmt: skip


def test_there_are_two_thousand_inputs() -> None:
    assert sum(COUNTS.values()) == 2000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets limits")
@pytest.mark.parametrize("family", COUNTS)
def test_damaged_inputs(family: str, base_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, INPUTS, family, "0", COUNTS[family], base_dir, tmp_path / "input"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
    last = tmp_path / f"{family}.number"
    assert done.returncode == 0, f"{last.read_text() if last.exists() else 'before the first'}\n{done.stderr[-2000:]}"
    *broken, summary = map(json.loads, done.stdout.splitlines())
    assert not broken, "\n\n".join(f"{law['file']}: {law['error']}" for law in broken[:5])
    assert summary["done"] == COUNTS[family]
    assert summary["refused"] >= COUNTS[family] // 4  # the inputs are damaged, and the readers see it
