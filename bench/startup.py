"""How long commands take to start: user seconds of the whole process over those of `python -c "import torch"`.

`python bench/startup.py [--base FOLDER] [--rounds N]`. Interleaved rounds, medians, one thread. A base for `generate` is made with
random weights where none is given. The ratios depend on how fast files are read, so both sides are warmed first.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BARS = {"generate": 1.6, "plan": 0.4, "plot": 0.8, "vram, cuda": 1.8, "vram, cpu": 2.5}


def commands(base: Path, run: Path) -> dict[str, list[str]]:
    """Name -> arguments of Python."""
    graft = ["-m", "graft"]
    vram = [*graft, "vram", "estimate", "--model", "llama-65b", "--method", "qlora", "--device"]
    return {
        "import torch": ["-c", "import torch"],
        "generate": [*graft, "generate", "--base", str(base), "--prompt", "def", "--max-new-tokens", "1"],
        "plan": [*graft, "plan", "--model", "llama-2-70b"],
        "plot": [*graft, "plot", str(run)],
        "vram, cuda": [*vram, "cuda"],
        "vram, cpu": [*vram, "cpu"],
    }


def user_seconds(arguments: list[str]) -> float:
    """Processor time in user mode of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def make_base(folder: Path) -> Path:
    """A nano base with random weights and a small tokenizer."""
    code = (
        "import sys; from dataclasses import replace; from pathlib import Path\n"
        "from graft import Tokenizer, save_model\n"
        "from graft.base.model.presets import preset\n"
        "from graft.base.model.transformer import Transformer, initialize_\n"
        "text = Path(sys.argv[1] + '.txt'); text.write_text('def main(): return 1\\n' * 50)\n"
        "tokenizer = Tokenizer.train([text], vocab_size=270)\n"
        "model = Transformer(replace(preset('nano'), vocab_size=tokenizer.vocab_size)); initialize_(model, seed=0)\n"
        "save_model(model, sys.argv[1]); tokenizer.save(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    return folder


def make_run(folder: Path) -> Path:
    """A run folder with the metrics that `graft plot` reads."""
    folder.mkdir()
    line = '{{"step": {0}, "loss": 3.0, "lr": 0.001, "grad_norm": 1.0}}\n'
    (folder / "metrics.jsonl").write_text("".join(line.format(i) for i in range(1, 101)), encoding="utf-8")
    return folder


def main() -> None:
    """Print a line for each command: median user seconds, the ratio, the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or make_base(Path(folder) / "base")
        timed = commands(base, make_run(Path(folder) / "run"))
        for arguments in timed.values():
            user_seconds(arguments)  # compiles loops and byte code, reads the files
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(options.rounds):
            for name, arguments in timed.items():
                seconds[name].append(user_seconds(arguments))
    unit = statistics.median(seconds["import torch"])
    for name, found in seconds.items():
        ratio = statistics.median(found) / unit
        bar = f"  bar {BARS[name]:.1f} {'ok' if ratio <= BARS[name] else 'MISSED'}" if name in BARS else ""
        print(f"{name:14} {statistics.median(found):6.2f} s  {ratio:5.2f} x{bar}")


if __name__ == "__main__":
    main()
