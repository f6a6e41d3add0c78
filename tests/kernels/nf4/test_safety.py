"""Memory safety: whatever an entry is given, it answers with a value or one ValueError; no address goes astray.

A read or write outside memory may end the process, or go unseen. So each child process feeds one entry hundreds of wrong
arguments and asserts for each that it was refused; a signal would show in the child's return code.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ENTRIES = (
    "quantize_4bit",
    "quantize_absmax",
    "quantize_8bit",
    "dequantize_8bit",
    "dequantize_absmax",
    "dequantize_4bit",
    "dequantize_4bit_double",
    "dequantize_4bit_",
    "linear_4bit",
)


@pytest.mark.parametrize("entry", ENTRIES)
def test_wrong_arguments_are_refused(entry: str) -> None:
    """Property: each argument in turn with another dtype, length, device or block size raises ValueError, never a signal."""
    script = Path(__file__).with_name("feed_wrong_arguments.py")
    done = subprocess.run(
        [sys.executable, str(script), entry], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, f"return code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    assert int(done.stdout.split()[-1]) >= 5, "the script tried next to nothing"
