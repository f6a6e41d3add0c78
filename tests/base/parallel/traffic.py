"""Counts the bytes that this rank gives to torch.distributed, whoever calls it: our code, autograd or torch's schedules."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def size(tensors: Any) -> int:
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    return sum(t.numel() * t.element_size() for t in tensors)


class Traffic(TorchDispatchMode):
    """Within the block: bytes sent by operator's name; an all-to-all without what a rank keeps, an all-reduce as its tensor."""

    def __init__(self, rank: int, n: int) -> None:
        super().__init__()
        self.rank, self.n = rank, n  # in the group of the all-to-all
        self.sent: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.sent.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        if name == "send":
            self.add("send", size(args[0]))
        elif name == "alltoall_base_":
            rows, splits = args[1], args[4]
            kept = splits[self.rank] if splits else len(rows) // self.n
            row = size(rows) // len(rows) if len(rows) else 0
            self.add("all_to_all", size(rows) - kept * row)
        elif name in ("allreduce_", "broadcast_", "_allgather_base_", "_reduce_scatter_base_"):
            self.add(name.strip("_"), size(args[0]))
        elif func._schema.name.startswith("c10d::") and name != "recv_":
            raise AssertionError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))

    def add(self, name: str, n_bytes: int) -> None:
        self.sent[name] = self.sent.get(name, 0) + n_bytes
