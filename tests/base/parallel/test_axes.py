"""Pipeline, context and expert parallel: two and four ranks give what one gives, and send what the formulas say."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st

from graft.base.model.presets import preset
from graft.base.model.transformer import Transformer
from graft.base.parallel import blocks
from graft.base.parallel.blocks import Block, Rules, attend_block, block_gradients, merge
from graft.base.parallel.context import Ring, document_ids
from graft.base.parallel.experts import sort_received
from graft.base.parallel.pipeline import bubble, keep_stages, micro_batches, owned_twice, stage_layers
from graft.base.parallel.reference.pipeline import bubble as bubble_of_table
from graft.base.parallel.reference.pipeline import table

from .axes import every_axis
from .processes import on_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo, which is how ranks talk on CPUs",
)
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of four processes found."""
    import torch._dynamo
    import torch.distributed.pipelining  # before the ranks are forked: seconds of imports, once instead of four times

    assert torch._dynamo
    return on_ranks(4, every_axis, tmp_path_factory.mktemp("axes"))


# --- context -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["pair", "all"])
def test_ring_attention_is_attention(ranks: Found, group: str) -> None:
    """Parity with kernels.attention on one rank, output and gradients: grouped heads, windows, packed documents, soft caps, both
    splits. Sums of float32 in another order: a few units of the last place of values up to 8."""
    for found in ranks:
        for case, gaps in found[f"ring {group}"].items():
            assert max(gaps) < 5e-6, case


@pytest.mark.parametrize("group", ["pair", "all"])
def test_ring_attention_in_bfloat16(ranks: Found, group: str) -> None:
    """Law: at most twice plain attention's error against float32, under autocast."""
    plain, ring = (max(found[f"half precision {group}"][name] for found in ranks) for name in ("plain", "ring"))
    assert 1e-4 < ring < 2 * plain + 1e-5


@pytest.mark.parametrize("group", ["pair", "all"])
def test_a_model_on_a_ring(ranks: Found, group: str) -> None:
    """Parity of loss and gradients, with and without recomputation, and the bytes counted are the formula's."""
    for found in ranks:
        for case in found[f"model {group}"]:
            assert case["loss"] < 1e-6
            assert case["gradients"] < 2e-5  # of a loss summed over 37 labels
            assert case["bytes"][0] == case["bytes"][1] > 0


def test_ring_attention_by_hand(ranks: Found) -> None:
    """Parity of the readable form with kernels.attention, causal or not."""
    assert max(gap for found in ranks for gaps in found["by hand"] for gap in gaps) < 5e-6


class Place(Ring):
    """A place on a ring without processes."""

    def __init__(self, rank: int, n: int, *, balanced: bool) -> None:
        object.__setattr__(self, "place", (rank, n))
        object.__setattr__(self, "balanced", balanced)

    @property
    def rank(self) -> int:
        return self.place[0]

    @property
    def n(self) -> int:
        return self.place[1]


def test_a_split_by_hand() -> None:
    """Known answer: two ranks, eight positions; the balanced split gives a rank the first and the last quarter."""
    row = torch.arange(8)[None]
    for balanced, expected in ((False, [[0, 1, 2, 3], [4, 5, 6, 7]]), (True, [[0, 1, 6, 7], [2, 3, 4, 5]])):
        places = [Place(rank, 2, balanced=balanced) for rank in range(2)]
        assert [place.own(row)[0].tolist() for place in places] == expected
        assert [place.positions(4).tolist() for place in places] == expected


@given(
    n=st.integers(1, 4), size=st.integers(1, 4), balanced=st.booleans(),
    window=st.none() | st.integers(1, 12), lengths=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=5),
)  # fmt: skip
def test_blocks_cover_what_is_seen(
    n: int, size: int, balanced: bool, window: int | None, lengths: list[int] | None
) -> None:
    """Law: over all ranks' blocks every pair of a query and a key that the mask allows is seen once, and no other."""
    T = size * (2 if balanced else 1)
    length = n * T
    documents = None
    if lengths is not None:
        borders = torch.tensor([0, *lengths]).cumsum(0).clamp(max=length).to(torch.int32)
        documents = document_ids(borders, length)
    seen = torch.zeros(length, length, dtype=torch.int64)
    rules = Rules(1.0, None, window, documents)
    for rank in range(n):
        place = Place(rank, n, balanced=balanced)
        for other in range(n):
            for block in place.blocks(other, T, rules):
                queries, keys = place.positions(T)[block.queries], place.positions(T, other)[block.keys]
                hidden = block.hidden(len(queries), len(keys), torch.device("cpu"))
                seen[queries[:, None], keys] += 1 if hidden is None else (~hidden).to(torch.int64)
    query, key = torch.arange(length)[:, None], torch.arange(length)
    expected = key <= query
    if window is not None:
        expected &= key > query - window
    if documents is not None:
        expected &= (documents[query] == documents[key]) & (documents[key] >= 0)
    assert torch.equal(seen, expected.to(torch.int64))


def test_the_balanced_split_is_balanced() -> None:
    """Law: ranks see equally many pairs; in order, the last of four sees seven times as many as the first."""
    for balanced in (False, True):
        pairs = []
        for rank in range(4):
            positions = Place(rank, 4, balanced=balanced).positions(512)
            pairs.append(int((positions + 1).sum()))
        assert max(pairs) / min(pairs) == pytest.approx(1.0 if balanced else 7.0, rel=2e-3)


def test_merged_blocks_are_one_softmax() -> None:
    """Law: blocks merged in any order are the softmax over all their keys; a query that sees nothing stays 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 4, generator=generator) for _ in range(3))
    rules = Rules(0.5, None, None, None)
    hidden = torch.zeros(6, 6, dtype=torch.bool)
    hidden[2] = True
    out, lse = torch.zeros(1, 2, 6, 4), torch.full((1, 2, 6), -torch.inf)
    for keys in (slice(4, 6), slice(0, 1), slice(1, 4)):
        block = Block(rules, slice(0, 6), keys, seen=~hidden[:, keys], causal=False)
        merge(out, lse, *attend_block(block, q, k, v))
    scores = (q @ k.mT / 2).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1).nan_to_num() @ v)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_by_our_kernels(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity of what GPUs run (here in Triton's interpreter) with the plain form: output, log-sum-exp and gradients of a block,
    under a log-sum-exp that is not its own, as in a ring."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here; set TRITON_INTERPRET=1 to interpret them")
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(1, heads, 32, 16, generator=generator) for heads in (4, 2, 2, 4))
    block = Block(Rules(0.3, 2.0, None, None), slice(16, 32), slice(0, 16), seen=None, causal=causal)
    found = []
    for uses in (False, True):
        monkeypatch.setattr(blocks, "uses_triton", lambda *_, uses=uses: uses)
        out, lse = attend_block(block, q, k, v)
        whole_out, whole_lse = torch.zeros(1, 4, 32, 16), torch.zeros(1, 4, 32)
        whole_out[:, :, 16:], whole_lse[:, :, 16:] = out * 0.7, lse + 0.5
        found.append((out, lse, *block_gradients(block, d_out, q, k, v, whole_out, whole_lse)))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


# --- pipeline ------------------------------------------------------------------------------------------------------


def test_pipelines_train_as_one_rank(ranks: Found) -> None:
    """Parity of loss, gradients and evaluation: 1F1B and interleaved, tied weights, mixtures with a balance loss, beside data
    parallel; and the bytes counted are the formula's."""
    for found in ranks:
        for case, result in found["pipelines"].items():
            assert result["loss"] < 1e-6, case
            assert result["gradients"] < 1e-7, case  # of means; the largest are about 0.1
            assert result["evaluation"] < 1e-6, case
            assert result["bytes"][0] == result["bytes"][1] > 0, case


def test_a_stage_keeps_its_weights_names(ranks: Found) -> None:
    """Law: the ranks' weights together are the whole model's, each once but for tied embeddings."""
    for case, tied in (("1f1b", False), ("tied, interleaved", True)):
        names = [name for found in ranks for name in found["pipelines"][case]["names"]]
        twice = {name for name in names if names.count(name) > 1}
        assert twice == ({"model.embed_tokens.weight"} if tied else set())
        assert len({name.split(".")[2] for name in names if ".layers." in name}) == 8
    assert [found["pipelines"]["tied, interleaved"]["micro"] for found in ranks] == [[8, 2]] * 4


def test_stages() -> None:
    """Known answers: six layers on two ranks; with two stages a rank the first has the layers 0, 1 and 4, 5 of eight."""
    assert [list(stage_layers(6, 2, i)) for i in range(2)] == [[0, 1, 2], [3, 4, 5]]
    with torch.device("meta"):
        model = Transformer(replace(preset("nano"), n_layers=8, tie_embeddings=True))
    keep_stages(model, 0, 2, stages_per_rank=2)
    assert {name.split(".")[2] for name, _ in model.named_parameters() if ".layers." in name} == {"0", "1", "4", "5"}
    assert owned_twice(model, 1) == {"model.embed_tokens.weight"}
    assert owned_twice(model, 0) == frozenset()


def test_micro_batches() -> None:
    """Known answers: at least one a stage, as full as micro_batch allows, a multiple of the ranks where stages are interleaved."""
    assert micro_batches(16, 4, n_stages=2, n=2) == (4, 4)
    assert micro_batches(16, 16, n_stages=4, n=4) == (4, 4)
    assert micro_batches(9, 2, n_stages=2, n=2) == (5, 2)
    assert micro_batches(10, 2, n_stages=4, n=2) == (6, 2)


@given(rows=st.integers(1, 40), micro=st.integers(1, 12), n=st.integers(1, 4), v=st.integers(1, 3))
def test_micro_batches_hold_every_row(rows: int, micro: int, n: int, v: int) -> None:
    """Law: every row has a place, no micro-batch is larger than allowed, and torch's schedules take the number."""
    if rows < n * v:
        return
    n_micro, size = micro_batches(rows, micro, n * v, n)
    assert n_micro * size >= rows
    assert size <= micro
    assert n_micro >= n * v
    assert v == 1 or n_micro % max(1, n_micro // n) == 0


def test_bubble() -> None:
    """Law: the formula is the share of waits in the schedule's own table."""
    for n, n_micro in ((2, 3), (4, 4), (4, 16)):
        assert bubble(n, n_micro) == pytest.approx(bubble_of_table(table("1f1b", n, n_micro)))
    assert bubble(4, 8, stages_per_rank=2) == pytest.approx(3 / 19)


# --- experts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "n"), [("pair", 2), ("all", 4)])
def test_experts_on_ranks(ranks: Found, group: str, n: int) -> None:
    """Parity of all gradients; no token is dropped: every expert reads as many rows as on one rank; bytes are the formula's."""
    found = [rank[f"experts {group}"] for rank in ranks[:n]]
    for result in found:
        assert result["gradients"] < 2e-5  # of a loss summed over up to 112 labels
        assert result["bytes"][0] == result["bytes"][1] > 0
    for mixture, whole in enumerate(found[0]["loads"]["whole"]):
        assert [load for result in found for load in result["loads"]["model"][mixture]] == whole


def test_received_rows_by_hand() -> None:
    """Known answer: from rank 0 one row for expert a and two for b, from rank 1 one for a: a's rows are 0 and 3."""
    order, inverse, ends = sort_received(torch.tensor([[1, 2], [1, 0]]))
    assert order.tolist() == [0, 3, 1, 2]
    assert order[inverse].tolist() == [0, 1, 2, 3]
    assert ends.tolist() == [2, 4]
