"""Pipeline schedules as tables: which rank does what, when.

Layers are cut into one stage a rank; a batch into micro-batches that follow each other through the stages. F3 is the forward
pass of micro-batch 3, B3 its backward pass, which takes twice as long but one slot here.

    gpipe   rank 0   F0 F1 F2 F3 .. .. .. .. B3 B2 B1 B0     all forward passes first: every micro-batch's activations are kept
    1f1b    rank 0   F0 F1 .. .. B0 F2 .. B1 F3 ...          a backward pass as soon as it can: at most n_ranks - rank are kept

GPipe: Huang et al. 2019, arXiv:1811.06965. 1F1B: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.
"""

from typing import Literal, NamedTuple

Kind = Literal["F", "B"]


class Task(NamedTuple):
    """One pass of one micro-batch through a stage."""

    kind: Kind
    micro_batch: int


def order(schedule: str, rank: int, n_ranks: int, n_micro_batches: int) -> list[Task]:
    """What a rank does, in its order, without the waits. Raises ValueError for an unknown schedule or sizes below 1."""
    if n_ranks < 1 or n_micro_batches < 1 or not 0 <= rank < n_ranks:
        raise ValueError(f"rank={rank} of n_ranks={n_ranks} with n_micro_batches={n_micro_batches}: sizes must be >= 1")
    forward, backward = ([Task(kind, m) for m in range(n_micro_batches)] for kind in ("F", "B"))
    if schedule == "gpipe":
        return forward + backward[::-1]
    if schedule != "1f1b":
        raise ValueError(f"unknown schedule {schedule!r}; choose gpipe or 1f1b")
    warm_up = min(n_ranks - rank - 1, n_micro_batches)
    steady = [task for pair in zip(forward[warm_up:], backward, strict=False) for task in pair]
    return forward[:warm_up] + steady + backward[n_micro_batches - warm_up :]


def table(schedule: str, n_ranks: int, n_micro_batches: int) -> list[list[Task | None]]:
    """Row r: what rank r does in each slot, None while it waits. A pass runs in the first slot after those it needs:
    F on rank r after F on r - 1, B on rank r after B on r + 1, on the last rank after its own F."""
    orders = [order(schedule, rank, n_ranks, n_micro_batches) for rank in range(n_ranks)]
    rows: list[list[Task | None]] = [[] for _ in range(n_ranks)]
    done: set[tuple[int, Task]] = set()
    nexts = [0] * n_ranks
    while any(position < len(tasks) for position, tasks in zip(nexts, orders, strict=True)):
        started = []
        for rank, tasks in enumerate(orders):
            task = tasks[nexts[rank]] if nexts[rank] < len(tasks) else None
            ready = task is not None and _needs(task, rank, n_ranks) <= done
            rows[rank].append(task if ready else None)
            if task is not None and ready:
                started.append((rank, task))
        for rank, task in started:
            done.add((rank, task))
            nexts[rank] += 1
    return rows


def _needs(task: Task, rank: int, n_ranks: int) -> set[tuple[int, Task]]:
    if task.kind == "F":
        return {(rank - 1, task)} if rank else set()
    return {(rank + 1, task)} if rank < n_ranks - 1 else {(rank, Task("F", task.micro_batch))}


def kept(rows: list[list[Task | None]]) -> list[int]:
    """The most micro-batches whose activations each rank holds at a time."""
    most = []
    for row in rows:
        held = peak = 0
        for task in row:
            held += 0 if task is None else 1 if task.kind == "F" else -1
            peak = max(peak, held)
        most.append(peak)
    return most


def bubble(rows: list[list[Task | None]]) -> float:
    """The share of slots in which ranks wait: (n_ranks - 1) / (n_micro_batches + n_ranks - 1) for both schedules."""
    slots = sum(len(row) for row in rows)
    return sum(task is None for row in rows for task in row) / slots
