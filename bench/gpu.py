"""The driver of bench/gpu.sh: each kernel's numerics and bench in a process of its own, one table at the end.

A process for each, so that a kernel that dies (an illegal access ends a CUDA context) costs its own rows only. The time left
is shared out: what a kernel may take at most is what remains.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = (
    "gpu_pretrain",
    "gpu_decode",
    "gpu_many",
    "gpu_memory",
)  # scripts of bench/ that measure whole models, after the kernels
NUMERICS_S = 200  # at most, of the whole time


def main() -> int:
    names = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/bench.py"))
    names += [name for name in MODELS if (ROOT / "bench" / f"{name}.py").exists()]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(names)}; all when left out")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, in Triton's interpreter where there is no GPU")
    parser.add_argument("--no-numerics", action="store_true", help="skip the tests marked gpu")
    parser.add_argument("--seconds", type=float, default=540, help="for the whole call (default 540)")
    parser.add_argument("--out", type=Path, help="write the rows here as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(args.one, args.tiny, args.out)
    if unknown := sorted(set(args.kernels) - set(names)):
        parser.error(f"unknown kernel {', '.join(unknown)}; choose from {', '.join(names)}")
    import torch

    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; bench/gpu.sh --tiny runs the same steps without one")
    deadline = time.monotonic() + args.seconds
    rows = [] if args.no_numerics else [numerics(args.kernels, deadline)]
    # whole models come last and take what time is left; tiny sizes have nothing to say there unless asked for
    for name in args.kernels or [name for name in names if not (args.tiny and name in MODELS)]:
        began = time.monotonic()
        rows += bench(name, args.tiny, deadline)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))

    from graft.kernels.measure import print_table  # pyright: ignore[reportMissingImports]

    print()
    print_table(rows)
    missed = sum(row["ok"] is False for row in rows)
    open_rows = sum(row["ok"] is None and row["bar"] != "" for row in rows)
    print(f"{sum(row['ok'] is True for row in rows)} bars met, {missed} missed, {open_rows} open (no GPU)")
    return 0  # a missed bar is a result, not a failure; a crash shows as a row


def numerics(kernels: list[str], deadline: float) -> dict[str, Any]:
    """The tests marked gpu as one row: how many failed. --confcutdir: tests/conftest.py needs all of graft, these don't."""
    folders = [str(ROOT / "tests" / "kernels" / name) for name in kernels] or [str(ROOT / "tests" / "kernels")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--maxfail=20", "--tb=line"]
    command += [f"--rootdir={ROOT}", f"--confcutdir={ROOT / 'tests' / 'kernels'}", f"-c{ROOT / 'pyproject.toml'}"]
    import torch

    cuda = torch.cuda.is_available()
    if cuda and find_spec("xdist"):
        command += ["-n", "12"]  # most of the time is Triton compiling, on the CPU
    found = {"name": "numerics: tests marked gpu fail", "value": 1.0, "unit": "", "bar": "<= 0", "ok": False}
    try:
        seconds = max(1, min(NUMERICS_S, deadline - time.monotonic()))
        done = subprocess.run([*command, *(f for f in folders if Path(f).exists())], timeout=seconds)
    except subprocess.TimeoutExpired:
        return found | {"name": f"numerics: not done after {NUMERICS_S} s"}
    failed = done.returncode not in (0, 5)  # 5: nothing was selected
    return found | {"value": float(failed), "ok": not failed if cuda or failed else None}


def bench(name: str, tiny: bool, deadline: float) -> list[dict[str, Any]]:
    """One kernel's rows, or one row that says how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--one", name, "--out", str(out), *(["--tiny"] if tiny else [])]
        left = deadline - time.monotonic()
        try:
            done = subprocess.run(command, timeout=max(1, left))
        except subprocess.TimeoutExpired:
            return [{"name": f"{name}: no time left", "value": left, "unit": "s", "bar": "", "ok": False}]
        if done.returncode or not out.exists():
            return [{"name": f"{name}: died", "value": float(done.returncode), "unit": "exit", "bar": "", "ok": False}]
        return json.loads(out.read_text())


def run_one(name: str, tiny: bool, out: Path) -> int:
    """In the process of its own: bench(quick) of one kernel, as JSON."""
    if name in MODELS:
        sys.path.insert(0, str(ROOT / "bench"))
        module = import_module(name)
    else:
        module = import_module(f"graft.kernels.{name}.bench")
    out.write_text(json.dumps(module.bench(tiny)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
