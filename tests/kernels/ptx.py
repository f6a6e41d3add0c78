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
        if not isinstance(value, str) or not re.fullmatch(r"\*?(i|u|fp|bf)\d+(:16)?", value):
            signature[name], constants[name] = "constexpr", value
            continue
        kind, _, multiple = value.partition(":")
        signature[name] = kind
        if multiple == "16" or kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": job.get("num_warps", 4), "num_stages": job.get("num_stages", 2)}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", job["arch"], 32), options=options)
    usage = resources(compiled.asm["cubin"])
    return {"ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared, **usage}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory (spills) a thread, as the cuobjdump in Triton's package reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert found is not None, report
    registers, stack, local = found.groups()
    return {"registers": int(registers), "spill_bytes": int(stack) + int(local)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rows = [compile_job(job) for job in json.loads((folder / "jobs.json").read_text())]
    (folder / "compiled.json").write_text(json.dumps(rows))
