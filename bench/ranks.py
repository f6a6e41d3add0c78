"""Training on meshes of gloo ranks on this CPU: is it one rank's training, what does a rank hold and send, what does a kill lose?

    python bench/ranks.py            # the table of meshes on 2 and 4 ranks, 20 steps each
    python bench/ranks.py --kills 20 # graft pretrain on 2 ranks, a random one killed at random moments, resumed each time

Small float32 models: the gaps, bytes and weights are exact statements, the seconds are none. Of each mesh: the largest gap of 20
losses and of the weights after them to one rank's; the fullest rank's bytes of weights, gradients and optimizer state, measured
over predicted (base/parallel/memory.py); bytes a rank sends in a step, counted over the formula's (base/parallel/traffic.py).
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from graft.base.checkpoint import load_tensors
from graft.base.data.shards import prepare
from graft.base.model.config import ModelConfig
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.parallel.memory import RankBytes, count_rank_bytes, predict_rank_bytes
from graft.base.parallel.mesh import make_mesh
from graft.base.parallel.optimizer import ShardedOptimizer
from graft.base.parallel.ranks import ranks
from graft.base.parallel.traffic import SentBytes, predict_sent_bytes
from graft.base.precision import LossScaler
from graft.base.run import TrainConfig
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.base.training.objective import NextToken
from graft.base.training.sharded import WHOLE, mesh_optimizer
from graft.base.training.step import one_step

STEPS = 20
MODEL = ModelConfig(
    vocab_size=256, d_model=64, n_layers=2, n_heads=4, n_kv_heads=4, d_head=16, d_ff=128, max_seq_len=32
)
TRAIN = TrainConfig(steps=STEPS, batch_size=8, micro_batch=2, learning_rate=3e-3, warmup_steps=2)
MESHES: dict[int, list[dict[str, Any]]] = {
    2: [
        *({"zero": zero} for zero in range(4)),
        {"mesh": "tp:2"},
        {"zero": 1, "optimizer": "muon"},
        {"mesh": "fsdp:2", "optimizer": "muon"},
        {"mesh": "fsdp:2", "optimizer": "soap"},
    ],
    4: [
        *({"zero": zero} for zero in range(4)),
        *({"mesh": mesh} for mesh in ("dp:2,fsdp:2", "dp:2,tp:2", "fsdp:2,tp:2", "tp:4")),
        {"mesh": "dp:2,tp:2", "zero": 2},
        {"mesh": "fsdp:2,tp:2", "optimizer": "muon"},
    ],
}


def step_batches(step: int, n_readers: int) -> list[dict[str, Tensor]]:
    """Random rows, cut in micro-batches for `n_readers`."""
    ids = torch.randint(0, MODEL.vocab_size, (8, MODEL.max_seq_len + 1), generator=torch.Generator().manual_seed(step))
    share = 8 // n_readers
    rows = [reader * share + i for i in range(0, share, 2) for reader in range(n_readers)]
    return [{"ids": ids[r : r + 2, :-1], "targets": ids[r : r + 2, 1:]} for r in rows]


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank's part of a mesh."""
    config = replace(TRAIN, **settings)
    mesh = make_mesh(config, MODEL, ranks())
    model = Transformer(MODEL)
    initialize_(model, seed=0)
    parameters = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    roles = parameter_roles(model)
    owned = [name for name, role in roles.items() if role in WHOLE.get(config.optimizer, ())]
    optimizer = mesh_optimizer(model, config, mesh, roles=roles)
    together = optimizer.sharding if isinstance(optimizer, ShardedOptimizer) else ranks()
    held = [RankBytes(0, 0, 0)]
    if isinstance(optimizer, ShardedOptimizer):
        finish = optimizer.sharding.finish_gradients

        def watched(named: Any) -> list[Tensor]:
            held[0] = count_rank_bytes(model, optimizer)
            return finish(named)

        optimizer.sharding.finish_gradients = watched
    losses, counter = [], SentBytes()
    for step in range(STEPS):
        counter = SentBytes()
        with counter:
            line = one_step(
                *(model, optimizer, mesh.share(step_batches(step, mesh.readers.n)), config, LossScaler("float32")),
                *(step, NextToken().loss, NextToken().n_labels, "cpu"),
                together=together,
            )
        losses.append(line["loss"])
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {
        "losses": losses,
        "weights": torch.cat([weight.detach().flatten() for weight in weights]).tolist(),
        "held": asdict(held[0]),
        "sent": counter.total,
        "unknown": dict(counter.unknown),
        "predicted": asdict(predict_rank_bytes(MODEL, config, mesh.shape)),
        "formula": predict_sent_bytes(MODEL, config, mesh.shape, parameters, owned)
        if not owned or mesh.shape.tp == 1
        else None,
    }


def one_rank(rank: int, n: int, folder: str, cases: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{n}", rank=rank, world_size=n)
    found = [measure(case) for case in cases]
    Path(folder, f"{n}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def table() -> None:
    """Print a line for each mesh."""
    torch.set_num_threads(1)
    alone = {name: measure({"optimizer": name}) for name in ("adamw", "muon", "soap")}
    print(
        f"{'ranks, mesh':44}{'losses':>10}{'weights':>10}{'held MB':>9}{'/predicted':>11}{'sent MB':>9}{'/formula':>9}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for n, cases in MESHES.items():
            mp.spawn(one_rank, (n, folder, cases), nprocs=n)  # pyright: ignore[reportPrivateImportUsage]
            by_rank = [json.loads(Path(folder, f"{n}-{rank}.json").read_text()) for rank in range(n)]
            for i, case in enumerate(cases):
                name = f"{n}, " + " ".join(f"{key}={value}" for key, value in case.items())
                print(row(name, [found[i] for found in by_rank], alone[case.get("optimizer", "adamw")], case))


def row(name: str, found: list[dict[str, Any]], alone: dict[str, Any], case: dict[str, Any]) -> str:
    """A mesh's line; a dash where nothing is divided, nan where there is no prediction.

    SOAP's gap is its own: with another accumulation on one rank it is 2.8e-3 too, as its bases amplify rounding.
    """
    gaps = [
        max(float((torch.tensor(one[key]) - torch.tensor(alone[key])).abs().max()) for one in found)
        for key in ("losses", "weights")
    ]
    held, predicted = (max(sum(one[key].values()) for one in found) for key in ("held", "predicted"))
    sent, formula = sum(one["sent"] for one in found) / len(found), found[0]["formula"]
    is_adamw = "optimizer" not in case
    of_held = (
        f"{held / 1e6:9.3f}{held / predicted if is_adamw else float('nan'):11.3f}" if held else f"{'-':>9}{'-':>11}"
    )
    more = f"  not counted: {found[0]['unknown']}" if found[0]["unknown"] else ""
    return (
        f"{name:44}{gaps[0]:10.1e}{gaps[1]:10.1e}{of_held}{sent / 1e6:9.3f}"
        f"{sent / formula if formula else float('nan'):9.3f}{more}"
    )


# --- kills ---------------------------------------------------------------------------------------------------------


def start(data: Path, out: Path, n: int, more: list[str]) -> list[subprocess.Popen[str]]:
    """graft pretrain on n ranks, as torchrun starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "graft",
        "pretrain",
        "--data",
        str(data / "tokens"),
        "--tokenizer",
        str(data / "tokenizer"),
    ]
    command += ["--out", str(out), "--device", "cpu", "--batch-size", "8", *more]
    for setting in ("n_layers=1", "d_model=32", "n_heads=2", "max_seq_len=32", "checkpoint_every=5", "eval_every=0"):
        command += ["--set", setting]
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]


START_S = 6.0  # about what a rank takes to its first step


def kills(n_kills: int, steps: int, mesh: str, seed: int) -> None:
    """Kill a random rank at random moments and resume; compare the weights with those of a run that nobody killed."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        (data / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
        tokenizer = Tokenizer.train([data / "a.txt"], vocab_size=280)
        tokenizer.save(data / "tokenizer")
        prepare([data / "a.txt"], tokenizer, data / "tokens")
        more = ["--steps", str(steps), "--set", f"mesh={mesh}"]
        began = time.monotonic()
        whole = [process.wait() for process in start(data, data / "whole", 2, more)]
        length = time.monotonic() - began
        assert whole == [0, 0], "the run that nobody kills failed"
        done, ended = 0, False
        while not ended:
            processes = start(data, data / "killed", 2, [*more, *(["--resume"] if (data / "killed").exists() else [])])
            # on average as far as brings all kills into one run, the start's imports on top
            moment = chance.uniform(0, 2 * max(length / n_kills, START_S)) if done < n_kills else 10 * length
            deadline = time.monotonic() + moment
            while time.monotonic() < deadline and any(process.poll() is None for process in processes):
                time.sleep(0.02)
            victim = chance.randrange(2)
            if done < n_kills and processes[victim].poll() is None:
                processes[victim].kill()
                done += 1
            said = [process.communicate()[1] for process in processes]
            codes = [process.returncode for process in processes]
            ended = codes == [0, 0]
            lost = next(
                (text.strip().splitlines()[-1] for text, code in zip(said, codes, strict=True) if code == 1), ""
            )
            print(f"kill {done}: rank {victim}, codes {codes}; {lost[:100]}", file=sys.stderr)
            if not ended and -signal.SIGKILL not in codes:
                raise SystemExit(f"a run ended by itself:\n{said[0]}\n{said[1]}")
        before, after = (load_tensors(data / name / "model.safetensors") for name in ("whole", "killed"))
        same = all(torch.equal(before[name], after[name]) for name in before)
        gap = max(float((before[name] - after[name]).abs().max()) for name in before)
    print(
        f"{done} kills of a random rank of 2 ({mesh}): final weights {'the same bits' if same else 'differ'}, gap {gap:.1e}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=0, help="kill a random rank so often instead of printing the table"
    )
    parser.add_argument("--steps", type=int, default=400, help="of the run that is killed")
    parser.add_argument("--mesh", default="fsdp:2", help="of the run that is killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.kills:
        kills(options.kills, options.steps, options.mesh, options.seed)
    else:
        table()
