"""Counting live storages: by hand, and against PyTorch's own allocator."""

import torch

from graft.finetune.memory.count import LiveBytes
from graft.finetune.memory.devices import cpu_bytes_within
from graft.finetune.memory.measure import cpu_allocations


def test_storages_are_counted_once_and_until_their_last_view_goes() -> None:
    """By hand: 100 float32 are 400 bytes, a view adds none, a second tensor of 10 adds 40; the peak was 440."""
    with LiveBytes() as counter:
        a = torch.zeros(10, 10)
        view = a.view(-1)[3:]
        assert counter.total == 400
        b = torch.zeros(10)
        del a, b
        assert counter.total == 400  # the view keeps all of it
        del view
        assert counter.total == 0
    assert counter.peak()[1].n_bytes == 440


def test_the_granule_rounds_each_storage_up() -> None:
    """By hand: 400 and 516 bytes take 512 and 1,024 of CUDA's allocator."""
    with LiveBytes(granule=512) as counter:
        kept = torch.zeros(100), torch.zeros(129)
        assert counter.total == 512 + 1024
    assert len(kept) == 2


def test_what_autograd_saves_is_alive_until_backward() -> None:
    """By hand: exp keeps its result (40 bytes) although no variable does; the sum is 4 bytes."""
    with LiveBytes() as counter:
        x = torch.ones(10, requires_grad=True)
        loss = x.exp().sum()
        assert counter.total == 40 + 40 + 4
        loss.backward()
        del loss
        assert counter.total == 80  # x and its gradient


def test_kinds_and_places_add_up() -> None:
    with LiveBytes() as counter:
        weight = torch.ones(10)
        counter.add([weight], "weights")
        counter.enter("forward", 2, "activations")
        kept = weight * 2
        assert counter.kinds == {"temporaries": 0, "weights": 40, "activations": 40}
        assert counter.layers == {2: 40}
        counter.enter("backward", "loss", "temporaries")
        del kept
        assert counter.kept == {2: 40}
        assert counter.layers == {2: 0}
    place, peak = counter.peak()
    assert place == ("forward", 2)
    assert sum(peak.kinds.values()) == peak.n_bytes == 80


def test_fake_values_are_one() -> None:
    """A fake tensor has no value; code that asks goes on with 1."""
    with LiveBytes(shapes=True):
        assert float(torch.empty(3).sum()) == 1.0
        assert int(torch.empty(3, dtype=torch.int64).sum()) == 1
        assert bool((torch.empty(3) > 0).all())


def _tied_step() -> None:
    """A weight used twice, whose two gradients autograd sums; and a sum of two dtypes."""
    weight = torch.ones(1000, 100, requires_grad=True)
    x = torch.ones(4, 1000)
    loss = (x @ weight).sum() + (x.sin() @ weight).sum()
    loss.backward()
    assert weight.grad is not None
    weight.grad += torch.ones(1000, 100, dtype=torch.bfloat16)


def test_fake_counting_equals_the_real_allocator() -> None:
    """Parity: PyTorch's allocator, as its profiler records it, on a step with a shared weight and mixed dtypes."""
    with cpu_allocations() as measured:
        _tied_step()
    with LiveBytes(shapes=True, within=cpu_bytes_within) as counter:
        _tied_step()
    # 64 bytes: the scalars that backward() starts from are made below the mode
    assert abs(counter.peak()[1].n_bytes - measured[0]) <= 64
    assert measured[0] >= 4 * 100_000 * 3  # weight, gradient, and the other gradient or the cast
