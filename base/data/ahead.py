"""Batches built a step ahead, in a thread, while the model computes; on a GPU in pinned memory, from which copies overlap."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

Batch = Mapping[str, Tensor]


class BatchesAhead:
    """`batch_at` of steps in turn, the next one being built meanwhile. batch_at must depend on the step alone.

    Any step may be asked for: one that wasn't expected is built then. An error of batch_at is raised at its own step.
    """

    def __init__(self, batch_at: Callable[[int], Sequence[Batch]], *, n_steps: int, pin: bool = False) -> None:
        self._batch_at, self._n_steps, self._pin = batch_at, n_steps, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Sequence[Batch]]] | None = None

    def __call__(self, step: int) -> Sequence[Batch]:
        """The step's micro-batches."""
        expected, self._next = self._next, None
        batches = expected[1].result() if expected is not None and expected[0] == step else self._build(step)
        if step + 1 < self._n_steps:
            self._next = step + 1, self._thread.submit(self._build, step + 1)
        return batches

    def _build(self, step: int) -> Sequence[Batch]:
        batches = self._batch_at(step)
        if not self._pin:
            return batches
        return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
