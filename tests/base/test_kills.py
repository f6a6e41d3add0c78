"""Law: killed before any of its file operations, a run that is resumed ends with the weights of one that was not.

A child of a process that has imported everything runs the command with a hook on every open for writing, rename, mkdir,
removal and flush below the output folder, and kills itself at the k-th. A second child resumes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graft.base.data.shards import prepare
from graft.base.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
N_DRAWN = 4  # kills of each command in the default suite; all of them: pytest -m exhaustive

DRIVER = '''
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
import torch
from graft.base.pretrain import run_pretrain
from graft.finetune.many import run as many
from graft.finetune.many.predict import Plan
from graft.finetune.sft import run_sft
from graft.base.runlog import read_metrics

job = json.loads(sys.argv[1])
out, result = Path(job["out"]), job["result"]
torch.set_num_threads(1)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


# A prediction takes a second, and writes nothing.
many.plan_jobs = lambda config, ready, **how: Plan(len(ready), how["at_once"], "cpu", 0, 0.0, 0.0, 1)


def command(resume):
    if job["stage"] == "many":
        jobs = [job["settings"] | {"data": job["data"], "out": str(out / name)} | own for name, own in job["jobs"].items()]
        many.run_many(base=job["base"], jobs=jobs, at_once=2, resume=resume, device="cpu", progress=False)
    elif job["stage"] == "pretrain":
        run_pretrain(data=job["data"], tokenizer=job["tokenizer"], out=out, settings=job["settings"], resume=resume,
                     device="cpu", progress=False)
    else:
        run_sft(base=job["base"], data=job["data"], out=out, method="lora", settings=job["settings"], resume=resume,
                device="cpu", progress=False)


def watch(kill_at, report):
    """Count file operations below `out`; at operation kill_at die without a word. report: a pipe for the count."""
    count = 0

    def operation(path):
        nonlocal count
        if str(out) not in os.fspath(path):
            return
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if report is not None:
            os.pwrite(report, str(count).encode(), 0)

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            if arguments[2] & WRITES:
                operation(os.fsdecode(arguments[0]))
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            operation(os.fsdecode(arguments[0]))

    fsync = os.fsync

    def flushed(handle):
        operation(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    os.fsync = flushed
    sys.addaudithook(hook)


def child(work):
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 2)
            work()
            code = 0
        except BaseException as error:
            print("child failed:", type(error).__name__, error, flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def outcome():
    folders = [out / name for name in job.get("jobs", ["."])]
    weights = [hashlib.sha256((folder / result).read_bytes()).hexdigest() for folder in folders]
    left = sorted(path.name for path in out.rglob(".*"))
    return [weights, [[line["loss"] for line in read_metrics(folder / "metrics.jsonl")] for folder in folders], left]


counter = os.open(job["counter"], os.O_RDWR | os.O_CREAT)


def counted():
    watch(0, counter)
    command(False)


assert child(counted) == 0
n_operations = int(os.pread(counter, 20, 0))
expected = outcome()
kills = job["kills"]
if isinstance(kills, int):
    import random
    kills = sorted(random.Random(0).sample(range(1, n_operations + 1), kills))
elif kills == "all":
    kills = range(1, n_operations + 1)
wrong = []
for k in kills:
    shutil.rmtree(out)

    def killed():
        watch(k, None)
        command(False)

    code = child(killed)
    if code != -signal.SIGKILL:
        wrong.append([k, f"ended with {code}, not by the kill"])
        continue
    code = child(lambda: command(out.exists()))
    if code != 0 or outcome() != expected:
        wrong.append([k, f"resumed: {code}", outcome() if code == 0 else None])
print(json.dumps({"n_operations": n_operations, "n_kills": len(list(kills)), "wrong": wrong}))
'''


@pytest.fixture(scope="module")
def tokens(text_file: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    prepare([text_file], Tokenizer.load(tokenizer_dir), folder, val_fraction=0.1)
    return folder


# Jobs that train together, with unlike checkpoints, ranks and lengths: the third joins when one of the others has ended.
JOBS = {
    "a": {"seed": 1, "checkpoint_every": 3},
    "b": {"seed": 2, "rank": 3, "steps": 6, "learning_rate": 1e-3},
    "c": {"seed": 3, "batch_size": 1},
}


@pytest.mark.parametrize("kills", [N_DRAWN, pytest.param("all", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("stage", ["pretrain", "lora", "many"])
def test_killed_at_a_file_operation(
    stage: str, kills: int | str, tokens: Path, tokenizer_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"{word}:", "completion": " cat"}) for word in "abcdef"))
    settings = {"steps": 3, "checkpoint_every": 2, "batch_size": 2, "micro_batch": 2}
    if stage == "pretrain":
        sizes = {"n_layers": 1, "d_model": 32, "n_heads": 2, "max_seq_len": 16, "eval_every": 2, "eval_batches": 1}
        job = {"data": str(tokens), "tokenizer": str(tokenizer_dir), "settings": settings | sizes}
        job |= {"result": "model.safetensors"}
    else:
        job = {"base": str(base_dir), "data": str(rows), "settings": settings | {"rank": 2, "dropout": 0.5}}
        job |= {"result": "adapter_model.safetensors"}
    if stage == "many":
        job["settings"] = job["settings"] | {"steps": 4}
        job |= {"jobs": JOBS}
    job |= {"stage": stage, "out": str(tmp_path / "out"), "counter": str(tmp_path / "counter"), "kills": kills}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(job)], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["n_operations"] > 40, "the hooks saw too little"
    assert report["n_kills"] == (kills if isinstance(kills, int) else report["n_operations"])
    assert not report["wrong"], done.stdout
