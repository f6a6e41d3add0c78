"""The processes that train together: who this one is, and what they tell each other. One process alone is rank 0 of 1.

torchrun starts a process a rank and tells each its number. Every rank holds the whole model and reads its share of a step's
micro-batches; gradients are summed once a step, so the step is that of one process which read them all.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .restart import restarts
from .watch import ANSWER_S, Watch, patience

BUCKET_BYTES = 25 * 2**20  # of gradients that travel together
T = TypeVar("T")
_watch: Watch | None = None  # of the process group, which torch.distributed keeps for the whole process too


@dataclass(frozen=True)
class Ranks:
    """This process among n."""

    rank: int = 0
    n: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and speaks to the user."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's items of a step: every n-th."""
        return list(items[self.rank :: self.n])

    def place(self, i: int) -> int:
        """The position in the step of this rank's i-th item."""
        return self.rank + i * self.n

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        self.most(0)

    def sum(self, *numbers: float, group: dist.ProcessGroup | None = None) -> list[float]:
        """Each number summed over ranks, or over those of a group."""
        if self.n == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        self._reduce_(total, group=group)
        return total.tolist()

    def each(self, number: float) -> list[float]:
        """Every rank's number, by rank."""
        return self.sum(*(number if rank == self.rank else 0.0 for rank in range(self.n)))

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.n == 1:
            return number
        highest = torch.tensor(number)
        self._reduce_(highest, dist.ReduceOp.MAX)
        return int(highest)

    def _reduce_(
        self,
        tensor: Tensor,
        operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """All-reduce in place. Raises ConnectionError when another rank has gone."""
        with naming_lost_ranks(self):
            dist.all_reduce(tensor, op=operation, group=group)

    def finish_gradients(self, named: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """Complete the gradients after a step's last backward pass; returns the parameters."""
        parameters = [parameter for _, parameter in named]
        self.sum_gradients_(parameters)
        return parameters

    def norm(self, parameters: Sequence[Tensor]) -> Tensor | None:
        """None: every rank has all of the gradients, so their norm needs no other rank."""
        del parameters

    def sum_gradients_(self, parameters: Sequence[Tensor]) -> int:
        """Sum every parameter's gradient over ranks, in place; one that a rank lacks counts as zeros. Returns the bytes of a rank.

        All ranks get the same bits. One that no rank has a gradient of gets zeros, so that weight decay acts on it as on the
        others; a frozen one is left alone.
        """
        if self.n == 1:
            return 0
        trained = [p for p in parameters if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        for bucket in buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            self._reduce_(flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))
        return sum(gradient.numel() * gradient.element_size() for gradient in gradients)


def _is_of_a_collective(error: RuntimeError) -> bool:
    """Whether torch.distributed raised it: gloo raises plain RuntimeErrors, which are known by their text alone."""
    words = ("gloo", "NCCL", "Connection", "Timed out", "Socket", "process group")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


@contextmanager
def naming_lost_ranks(ranks: Ranks) -> Iterator[None]:
    """Turn what a collective raises when another rank has gone into a ConnectionError that says so."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_collective(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        place, absent = (_watch.place, _watch.missing()) if _watch else ("a collective", "")
        raise ConnectionError(
            f"rank {ranks.rank} of {ranks.n}: another rank ended or was silent for {patience().total_seconds():g} s in "
            f"{place}: {absent}{'; ' if absent else ''}{reason}"
        ) from None


def at(place: str) -> None:
    """Tell the other ranks where this one is, such as step 12: what they are told should it not come."""
    if _watch is not None:  # alone, or in a group that others have started, there is none
        _watch.at(place)


def watch() -> Watch:
    """What this rank tells the others of itself; it must have joined."""
    assert _watch is not None, "join comes first"
    return _watch


def buckets(tensors: Sequence[Tensor], limit: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """The tensors in groups of one dtype and at most `limit` bytes (a larger one is a group by itself)."""
    found: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        n_bytes = tensor.numel() * tensor.element_size()
        if not found or size + n_bytes > limit or found[-1][0].dtype != tensor.dtype:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += n_bytes
    return found


def ranks() -> Ranks:
    """Who this process is; it must have joined."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def join(device: str) -> tuple[Ranks, str]:
    """Meet the other processes that torchrun started; returns who this one is and its own device.

    Raises ValueError when torchrun's settings are incomplete, or this torch has no torch.distributed.
    """
    n = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if n == 1:
        return Ranks(), device
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={n}, but {', '.join(missing)} is missing; start with torchrun, or unset WORLD_SIZE"
        )
    if not dist.is_available():
        raise ValueError("this torch is built without torch.distributed; train in one process")
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Gradients are summed on the GPUs; the few numbers that ranks agree on lie on the CPU, which NCCL doesn't serve.
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        _meet(backend)
    return ranks(), device


def _meet(backend: str) -> None:
    """Start the process group as init_process_group does from torchrun's settings, keeping the store for `watch`.

    The elastic agent's store outlives its ranks, and gloo would connect to the addresses that the dead ones left there: each
    start has keys of its own. Raises ConnectionError when the ranks don't meet in time.
    """
    global _watch
    try:
        store, rank, n = next(dist.rendezvous("env://", timeout=patience()))
        store = dist.PrefixStore(f"graft/{restarts()}", store)
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=n, timeout=patience())
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {os.environ['RANK']}: the {os.environ['WORLD_SIZE']} ranks did not meet within "
            f"{patience().total_seconds():g} s ({str(error).strip().splitlines()[0][:200]}); are all of them running?"
        ) from None
    word = dist.PrefixStore("watch", store)
    word.set_timeout(timedelta(seconds=ANSWER_S))
    _watch = Watch(word, rank, n)


def leave() -> None:
    """Part from the others, at the end of the process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def refuse_ranks(stage: str) -> None:
    """Raise ValueError for a stage that runs in one process only, when torchrun started several."""
    n = os.environ.get("WORLD_SIZE", "1")
    if n not in ("", "1"):
        raise ValueError(
            f"graft {stage} runs in one process; torchrun started {n}. Several processes run graft pretrain, sft and dpo"
        )
