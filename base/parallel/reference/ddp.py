"""Data parallel training by hand (Li et al. 2020, "PyTorch Distributed", arXiv:2006.15704, section 3.2).

Every rank holds the whole model and reads its own rows. Gradients are averaged bucket by bucket: a bucket's all-reduce starts
as soon as its last gradient is there and runs while the backward pass goes on with earlier layers.

    backward pass   layer 4 | layer 3 | layer 2 | layer 1 |
    all-reduce              |  bucket of 4, 3   |  bucket of 2, 1 |
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Bucket:
    """Parameters whose gradients travel as one message."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.n_bytes = 0
        self.ready: set[int] = set()  # ids of the parameters whose gradients this backward pass has made
        self.flat: Tensor | None = None  # the message, while it travels
        self.work: Any = None

    def start(self) -> None:
        """Send the gradients off; one that no loss reached counts as zeros."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def finish(self, n_ranks: int) -> None:
        """Wait for the sums, and put their means in place of the gradients."""
        if self.flat is None:
            self.start()
        self.work.wait()
        assert self.flat is not None
        means = (self.flat / n_ranks).split([p.numel() for p in self.parameters])
        for parameter, mean in zip(self.parameters, means, strict=True):
            parameter.grad = mean.view_as(parameter)
        self.ready, self.flat, self.work = set(), None, None


class DDP(nn.Module):
    """A module that is trained by all ranks together. Call finish_gradient_synchronization between backward and step.

    At the start rank 0's parameters and buffers go to all. The gradients are means over ranks: with equally many labels on each
    rank the step is that of one process with all the rows.

    Buckets start in one order on every rank, as torch's do: collectives are matched by their order alone, and ranks whose losses
    reach different parameters complete their buckets in different ones.
    """

    def __init__(
        self,
        module: nn.Module,
        bucket_mb: float | None = 25.0,  # 0: each parameter by itself; None: all in one
    ) -> None:
        super().__init__()
        self.module = module
        self.n_ranks = dist.get_world_size()
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
        limit = math.inf if bucket_mb is None else bucket_mb * 2**20
        self.buckets = make_buckets(list(module.parameters()), limit)
        self.n_started = 0  # of the buckets, in this backward pass
        self.synchronizes = True
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._note(bucket, p))

    def _note(self, bucket: Bucket, parameter: Tensor) -> None:
        """A gradient of the bucket is there."""
        if not self.synchronizes:
            return
        if id(parameter) in bucket.ready:
            raise RuntimeError(
                "a second backward pass before finish_gradient_synchronization(); wrap all but the last in no_sync()"
            )
        bucket.ready.add(id(parameter))
        for following in self.buckets[self.n_started :]:
            if len(following.ready) < len(following.parameters):
                break
            following.start()
            self.n_started += 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in the block only add to this rank's gradients: for all micro-batches but the last."""
        self.synchronizes = False
        try:
            yield
        finally:
            self.synchronizes = True

    def finish_gradient_synchronization(self) -> None:
        """Wait until every gradient is the mean over ranks."""
        for bucket in self.buckets:
            bucket.finish(self.n_ranks)
        self.n_started = 0


def make_buckets(parameters: list[Tensor], limit: float) -> list[Bucket]:
    """Trained parameters, the last first since their gradients come first, in buckets of at most `limit` bytes and one dtype."""
    buckets: list[Bucket] = []
    for parameter in reversed(parameters):
        if not parameter.requires_grad:
            continue
        size = parameter.numel() * parameter.element_size()
        last = buckets[-1] if buckets else None
        if last is None or last.n_bytes + size > limit or last.parameters[0].dtype != parameter.dtype:
            last = Bucket()
            buckets.append(last)
        last.parameters.append(parameter)
        last.n_bytes += size
    return buckets
