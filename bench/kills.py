"""Random kills: pretraining and full fine-tuning with every optimizer, precision and layer kind end with the weights of a run
that was left alone.

    python bench/kills.py --kills 20

Each setting runs once undisturbed, in a child of a process that has imported everything. Then, for each kill, a child runs it anew
and is killed (SIGKILL) at a random moment of the undisturbed run's time; a second one resumes it. Weights are compared byte for
byte, and the losses of metrics.jsonl. Exit code 1 when any differ. About 10 minutes alone with 20 kills of each setting.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from graft.base.data.shards import prepare
from graft.base.pretrain import run_pretrain
from graft.base.runlog import read_metrics
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.sft import run_sft

LOOP = {"steps": 8, "batch_size": 4, "micro_batch": 2, "checkpoint_every": 2, "eval_every": 4, "eval_batches": 1}
SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 2, "d_head": 16, "d_ff": 64, "max_seq_len": 32}
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "muon, normalized rows": {"optimizer": "muon", "muon_normalize_rows": True},
    "soap": {"optimizer": "soap", "soap_every": 2},
    "averaged weights": {"ema_decay": 0.9},
    "noise scale, batch warm-up": {"noise_scale_every": 1, "batch_warmup_steps": 4},
    "muP": {"mup_base_width": 16},
    "samples": {"sample_every": 3, "sample_tokens": 4},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "recomputed activations": {"checkpointing": True},
    "keep=best": {"keep": "best", "eval_every": 2},
    "mixture of experts": {"n_experts": 4, "d_expert": 32, "balance_loss": 0.01},
    "experts with a bias": {
        "n_experts": 4,
        "d_expert": 32,
        "router": "sigmoid",
        "router_bias": True,
        "bias_rate": 0.01,
    },
    "sliding window": {"sliding_window": 8, "sliding_layers": [True, False]},
    "latent attention": {"d_latent": 16, "d_rope": 8, "qk_norm": False},
    "Gated DeltaNet": {"linear_layers": [True, False]},
    "norms after": {"post_norm": True, "qk_norm_joint": True},
    "model of 2017": {
        "add_norm": True,
        "layer_norm": True,
        "positions": "sinusoidal",
        "gated": False,
        "qk_norm": False,
    },
    "multi-token": {"n_predict": 1},
}
FINE_TUNING: dict[str, dict[str, Any]] = {
    "sft, adamw8bit": {"optimizer": "adamw8bit"},
    "sft, soap": {"optimizer": "soap", "soap_every": 2},
}
SENTENCES = (
    "the cat sat on the mat",
    "a dog ran to the door",
    "the door was red and old",
    "cats and dogs sat on a mat",
)


def make_inputs(folder: Path) -> dict[str, Path]:
    """A tokenizer, token shards and rows for fine-tuning."""
    text, rows = folder / "text.txt", folder / "rows.jsonl"
    lines = [SENTENCES[(i * 7 + i // 3) % 4] + "." for i in range(400)]
    text.write_text("<|endoftext|>".join("\n".join(lines[i : i + 20]) for i in range(0, 400, 20)), encoding="utf-8")
    rows.write_text(
        "\n".join(json.dumps({"prompt": f"{w}:", "completion": f" {s}"}) for w in "abcd" for s in SENTENCES)
    )
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer.train([text], vocab_size=290, pattern="gpt2", special_tokens=specials)
    tokenizer.save(folder / "tokenizer")
    prepare([text], tokenizer, folder / "tokens", val_fraction=0.1)
    return {"tokenizer": folder / "tokenizer", "tokens": folder / "tokens", "rows": rows, "base": folder / "base"}


def start(work: Callable[[], object], log: Path) -> int:
    """A child that does the work, says on the log what it raises, and ends; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        work()
        code = 0
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
    finally:
        os._exit(code)


def finish(child: int, log: Path) -> None:
    """Wait for a child. Raises RuntimeError with its last words unless it ended well."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise RuntimeError(f"a child ended with {code}: {log.read_text()[-500:]}")


def outcome(out: Path) -> tuple[str, list[float]]:
    """The weights' hash and the losses."""
    weights = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    return weights, [line["loss"] for line in read_metrics(out / "metrics.jsonl")]


def try_setting(run: Callable[[bool], object], out: Path, n_kills: int, moments: random.Random) -> tuple[int, int]:
    """How many kills hit a run that was still going, and after how many of all the resumed run was another."""
    log = out.with_suffix(".log")
    began = time.perf_counter()
    finish(start(lambda: run(False), log), log)
    took, expected = time.perf_counter() - began, outcome(out)
    hits = wrong = 0
    for _ in range(n_kills):
        shutil.rmtree(out)
        child = start(lambda: run(False), log)
        time.sleep(moments.uniform(0.02, 0.9) * took)
        os.kill(child, signal.SIGKILL)
        hits += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        finish(start(lambda: run(out.exists()), log), log)
        wrong += outcome(out) != expected
    return hits, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="+", help="Names of settings.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder, moments = Path(tempfile.mkdtemp()), random.Random(args.seed)
    inputs, failed = make_inputs(folder), 0
    quiet: dict[str, Any] = {"device": "cpu", "progress": False}

    def pretrains(settings: Mapping[str, Any], out: Path) -> Callable[[bool], object]:
        how = {"data": [inputs["tokens"]], "tokenizer": inputs["tokenizer"], "out": out}
        return lambda resume: run_pretrain(settings=SIZES | LOOP | settings, resume=resume, **how, **quiet)

    def tunes(settings: Mapping[str, Any], out: Path) -> Callable[[bool], object]:
        loop = {key: value for key, value in LOOP.items() if key != "eval_batches"}
        how = {"base": inputs["base"], "data": [inputs["rows"]], "out": out, "method": "full"}
        return lambda resume: run_sft(settings=loop | settings, resume=resume, **how, **quiet)

    child_log = folder / "base.log"
    finish(start(lambda: pretrains({}, inputs["base"])(False), child_log), child_log)
    jobs = {name: (pretrains, one) for name, one in SETTINGS.items()}
    jobs |= {name: (tunes, one) for name, one in FINE_TUNING.items()}
    for name in args.only or jobs:
        make, settings = jobs[name]
        try:
            hits, wrong = try_setting(make(settings, folder / "out"), folder / "out", args.kills, moments)
        except (RuntimeError, OSError) as error:
            hits, wrong = 0, args.kills
            print(error)
        shutil.rmtree(folder / "out", ignore_errors=True)
        failed += wrong
        print(
            f"{name:28} {args.kills} kills, {hits} before its end: {args.kills - wrong} with the same weights",
            flush=True,
        )
    shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
