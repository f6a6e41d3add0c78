"""Packing: documents in one row lose what they lose alone, and every label comes exactly once an epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.base.loss import next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer, initialize_
from graft.finetune.data.chat import Encoded
from graft.finetune.data.packing import SFTBatches, collate_packed, collate_padded, pack, steps_for_epochs


def documents(n: int, seed: int = 0) -> list[Encoded]:
    """Records of 2 to 20 random tokens below 50; the first token is never a label, each later one is with p = 0.6."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 21, n)
    masks = [np.append(rng.random(length - 1) < 0.6, True) for length in lengths]
    return [Encoded(rng.integers(1, 50, len(mask)).astype(np.int32), mask) for mask in masks]


def by_hand() -> list[Encoded]:
    return [
        Encoded(np.array([7, 8, 9, 1], np.int32), np.array([False, False, True, True])),
        Encoded(np.array([5, 6, 1], np.int32), np.array([True, True, False])),
    ]


def test_packed_batch_by_hand() -> None:
    """7 8 9 1 with labels 9 1, then 5 6 1 with label 6: the first token's own mask never matters, borders have no label."""
    batch = collate_packed(by_hand())
    assert batch["ids"].tolist() == [[7, 8, 9, 5, 6]]
    assert batch["targets"].tolist() == [[-100, 9, 1, 6, -100]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5]
    assert (batch["ids"].dtype, batch["cu_seqlens"].dtype) == (torch.int64, torch.int32)


def test_rounding_up_adds_a_document_without_labels() -> None:
    batch = collate_packed(by_hand(), multiple_of=4, pad_id=2)
    assert batch["ids"].tolist() == [[7, 8, 9, 5, 6, 2, 2, 2]]
    assert batch["targets"].tolist() == [[-100, 9, 1, 6, -100, -100, -100, -100]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 8]
    assert collate_packed(by_hand(), multiple_of=5)["ids"].shape == (1, 5)


def test_padded_batch_by_hand() -> None:
    batch = collate_padded(by_hand(), multiple_of=4)
    assert batch["ids"].tolist() == [[7, 8, 9, 0], [5, 6, 0, 0]]
    assert batch["targets"].tolist() == [[-100, 9, 1, -100], [6, -100, -100, -100]]


def test_packed_and_padded_loss_is_the_sum_of_each_document_alone() -> None:
    """Law (trl 805): the documents of a row don't see each other; gradients agree too. float64, so 1e-9 is rounding."""
    model = Transformer(
        ModelConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_head=8, d_ff=24, max_seq_len=32)
    ).double()
    initialize_(model, seed=0)
    records = documents(6)

    def loss_and_gradient(batches: list[dict[str, torch.Tensor]]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = torch.stack([next_token_loss(model, batch) for batch in batches]).sum()
        total.backward()
        return total.item(), model.model.embed_tokens.weight.grad.clone()

    alone = loss_and_gradient([collate_padded([record]) for record in records])
    for batch in (collate_packed(records), collate_packed(records, multiple_of=64), collate_padded(records)):
        together = loss_and_gradient([batch])
        # the loss is summed in float32 (kernels/cross_entropy), so its rounding is 1e-6 relative
        assert together[0] == pytest.approx(alone[0], rel=1e-6)
        torch.testing.assert_close(together[1], alone[1], rtol=1e-5, atol=1e-6)


# --- pack ----------------------------------------------------------------------------------------------------------


def test_pack_by_hand() -> None:
    """Into 10: 7 opens a bin, 6 another, 4 fits best beside 6 (0 left), 3 beside 7 (0 left), 2 opens a third."""
    assert pack([4, 7, 2, 6, 3], 10) == [[1, 4], [0, 3], [2]]
    assert pack([], 10) == []


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 50))
def test_pack_is_a_partition_within_its_bound(lengths: list[int], room: int) -> None:
    """Law: each index once, no bin over its room, and no two bins that would fit into one."""
    bins = pack(lengths, room)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= room for members in bins)
    loads = sorted(sum(lengths[i] for i in members) for members in bins)
    assert len(bins) < 2 or loads[0] + loads[1] > room
    assert bins == pack(lengths, room)


def test_a_record_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="item 1 has 12 tokens, a row holds max_tokens=10"):
        pack([3, 12], 10)
    with pytest.raises(ValueError, match="raise max_tokens or cut records with max_seq_len"):
        SFTBatches(documents(9), batch_size=2, max_tokens=5)


# --- batches -------------------------------------------------------------------------------------------------------


def labels(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return sorted(t for batch in batches for t in batch["targets"].flatten().tolist() if t != -100)


@pytest.mark.parametrize("packed", [True, False])
def test_every_label_comes_once_an_epoch(packed: bool) -> None:
    """Law: 12 records in batches of 4 are 3 steps an epoch; epochs hold the same labels in another order."""
    records = documents(12)
    source = SFTBatches(records, batch_size=4, max_tokens=48, packed=packed, multiple_of=8, seed=1)
    expected = labels([collate_padded(records)])
    assert source.steps_per_epoch == 3
    orders = []
    for epoch in range(3):
        steps = range(3 * epoch, 3 * epoch + 3)
        assert labels([batch for step in steps for batch in source.batch_at(step)]) == expected
        orders.append([i for step in steps for i in source.records_at(step)])
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize(("n", "size", "steps"), [(23, 16, 2), (7, 3, 3), (6, 3, 2), (2, 16, 1), (1, 1, 1)])
def test_an_epoch_reads_every_record_once(n: int, size: int, steps: int) -> None:
    """Worked by hand: 23 records in batches of 16 are 16 and 7. The next epoch is another order of the same records."""
    source = SFTBatches(documents(n), batch_size=size, max_tokens=64)
    assert source.steps_per_epoch == steps == steps_for_epochs(n, size, 1)
    for epoch in range(3):
        seen = [source.records_at(epoch * steps + step) for step in range(steps)]
        assert [len(chosen) for chosen in seen] == [size] * (n // size) + ([n % size] if n % size else [])
        assert sorted(i for chosen in seen for i in chosen) == list(range(n))


def test_steps_of_a_part_of_an_epoch() -> None:
    """Worked by hand: half of 23 records is 11.5, one step of 16; 2.5 passes are 2 + 2 + 1."""
    assert steps_for_epochs(23, 16, 0.5) == 1
    assert steps_for_epochs(23, 16, 2.5) == 5
    assert steps_for_epochs(100, 10, 0.3) == 3
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"epochs={wrong} must be a positive number"):
            steps_for_epochs(23, 16, wrong)


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_stay_within_max_tokens(packed: bool) -> None:
    source = SFTBatches(documents(50), batch_size=25, max_tokens=48, packed=packed, multiple_of=8)
    for step in range(4):
        batches = source.batch_at(step)
        assert all(batch["ids"].numel() <= 48 and batch["ids"].shape[1] % 8 == 0 for batch in batches)
        assert len(batches) > 1


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    """Resume: a new source at step 5 gives what the first one gives there, whatever was asked before."""
    first, again = (SFTBatches(documents(9), batch_size=4, max_tokens=64, seed=3) for _ in range(2))
    for step in range(5):
        first.batch_at(step)
    for ours, theirs in zip(first.batch_at(5), again.batch_at(5), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = SFTBatches(documents(9), batch_size=4, max_tokens=64, seed=4)
    assert [other.records_at(s) for s in range(3)] != [first.records_at(s) for s in range(3)]


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="no records to train on"):
        SFTBatches([], batch_size=1, max_tokens=8)
    with pytest.raises(ValueError, match="batch_size=0 must be >= 1"):
        SFTBatches(documents(2), batch_size=0, max_tokens=32)
    with pytest.raises(ValueError, match="max_tokens=30 is not a multiple of multiple_of=8"):
        SFTBatches(documents(2), batch_size=1, max_tokens=30, multiple_of=8)
