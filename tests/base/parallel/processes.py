"""Ranks for tests: forked from the test's own process, so that they need not import torch again."""

import json
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 240


def on_ranks(
    n: int, work: Callable[..., dict[str, Any]], folder: Path, *args: Any, joined: bool = True
) -> list[dict[str, Any]]:
    """work(rank, *args) on n gloo ranks; what each returned, through JSON files in `folder`. A rank's error fails the test.

    joined=False: they have torchrun's environment, and meet when the work itself joins.
    """
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # noqa: F401

    folder.mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = None if joined else free.getsockname()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads: the children use one thread
        processes = [fork.Process(target=_run, args=(rank, n, work, folder, args, port)) for rank in range(n)]
        for process in processes:
            process.start()
    for process in processes:
        process.join(TIMEOUT_S)
        process.kill()
    found = [folder / f"{rank}.json" for rank in range(n)]
    assert all(path.exists() for path in found), [path.read_text() for path in folder.glob("*.error")]
    return [json.loads(path.read_text()) for path in found]


def _run(
    rank: int, n: int, work: Callable[..., dict[str, Any]], folder: Path, args: tuple[Any, ...], port: int | None
) -> None:
    torch.set_num_threads(1)
    try:
        if port is None:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
        else:
            who = {"WORLD_SIZE": str(n), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= who | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        result = work(rank, *args)
        (folder / f"{rank}.json").write_text(json.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
