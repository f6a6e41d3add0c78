"""Batches built ahead: those of each step, one ahead and no further, errors at their own step."""

import threading

import pytest
import torch

from graft.base.data.ahead import BatchesAhead


def test_the_next_step_is_built_meanwhile() -> None:
    """Law: batches are batch_at's, built once each, the next in another thread before it is asked for, none after the last."""
    built: list[tuple[int, bool]] = []
    ready = threading.Event()

    def batch_at(step: int) -> list[dict[str, torch.Tensor]]:
        built.append((step, threading.current_thread() is threading.main_thread()))
        ready.set()
        return [{"ids": torch.tensor([step])}]

    ahead = BatchesAhead(batch_at, n_steps=6)
    assert int(ahead(2)[0]["ids"]) == 2  # a resumed run begins anywhere
    ready.clear()
    assert int(ahead(3)[0]["ids"]) == 3
    assert ready.wait(10)  # step 4, not asked for yet
    assert [int(ahead(step)[0]["ids"]) for step in (4, 5)] == [4, 5]
    assert [step for step, _ in built] == [2, 3, 4, 5]
    assert [main for _, main in built] == [True, False, False, False]
    assert int(ahead(0)[0]["ids"]) == 0


def test_an_error_comes_at_its_own_step() -> None:
    def batch_at(step: int) -> list[dict[str, torch.Tensor]]:
        if step == 1:
            raise ValueError("step 1 is damaged")
        return []

    ahead = BatchesAhead(batch_at, n_steps=3)
    ahead(0)
    with pytest.raises(ValueError, match="step 1 is damaged"):
        ahead(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_batches_are_pinned() -> None:
    ahead = BatchesAhead(lambda step: [{"ids": torch.tensor([step])}], n_steps=2, pin=True)
    assert all(ahead(step)[0]["ids"].is_pinned() for step in range(2))
