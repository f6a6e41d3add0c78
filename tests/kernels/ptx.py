"""Compile kernels for a GPU that isn't there: `python ptx.py FOLDER` reads jobs.json and writes compiled.json beside it.

Run by the `compile_kernels` fixture, which says what a job is.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_job(job: dict) -> dict:
    """One job's PTX, its shared memory, and the registers and spills that ptxas reports for it."""
    kernel = getattr(importlib.import_module(job["module"]), job["kernel"])
    missing = set(kernel.arg_names) ^ set(job["args"])
    assert not missing, f"{job['kernel']}: args differ from the kernel's parameters by {sorted(missing)}"
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = job["args"][name]
        if not isinstance(value, str):
            signature[name], constants[name] = "constexpr", value
            continue
        kind, _, multiple = value.partition(":")
        signature[name] = kind
        if multiple == "16" or kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": job.get("num_warps", 4), "num_stages": job.get("num_stages", 2)}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", job["arch"], 32), options=options)
    ptx = compiled.asm["ptx"]
    return {"ptx": ptx, "shared": compiled.metadata.shared, **resources(ptx)}


def resources(ptx: str) -> dict[str, int]:
    """Registers a thread and bytes spilled, from the assembler that Triton's package carries."""
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert target is not None, "no .target in the PTX"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
    return {"registers": max(registers), "spill_bytes": max(spills, default=0)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rows = [compile_job(job) for job in json.loads((folder / "jobs.json").read_text())]
    (folder / "compiled.json").write_text(json.dumps(rows))
