"""A mesh as text: what it means, and what is refused with what fits."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graft.base.data.batches import WindowBatches
from graft.base.data.shards import TokenShards
from graft.base.data.windows import Windows, make_windows
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer
from graft.base.parallel.mesh import MeshShape, check_mesh, make_mesh, parse_mesh, stage
from graft.base.parallel.ranks import Ranks
from graft.base.parallel.sharding import Split
from graft.base.parallel.tensor import check_tensor_parallel
from graft.base.run import TrainConfig
from graft.base.settings import check_settings, parse_assignments
from graft.base.training.sharded import mesh_optimizer

MODEL = ModelConfig(vocab_size=64, d_model=16, n_layers=6, n_heads=12, n_kv_heads=4, d_head=4, d_ff=24, max_seq_len=48)


def test_what_a_mesh_says() -> None:
    """By hand: sizes, the axis that takes the rest, and back to text."""
    assert parse_mesh("dp", 8) == MeshShape(dp=8)
    assert parse_mesh("dp", 1) == MeshShape()
    assert parse_mesh(" tp:2 , dp", 8) == MeshShape(dp=4, tp=2)
    assert parse_mesh("fsdp:2,tp:4", 8) == MeshShape(fsdp=2, tp=4)
    assert str(MeshShape(tp=2, dp=3)) == "dp:3,tp:2"
    assert parse_mesh(str(MeshShape()), 1) == MeshShape()
    assert MeshShape(dp=3, tp=2, pp=4).size("dp", "tp") == 6


def test_the_command_line_takes_a_mesh() -> None:
    """Law: commas and colons of --set mesh=... reach the config as they are."""
    settings = check_settings(parse_assignments(["mesh=dp:2,tp:2", "zero=3"]), TrainConfig)
    assert TrainConfig(**settings) == TrainConfig(mesh="dp:2,tp:2", zero=3)


@pytest.mark.parametrize(
    ("text", "n", "message"),
    [
        ("tp:2", 1, "needs 2 processes and there is one; start it with torchrun --nproc-per-node 2"),
        ("dp:2,tp:2", 3, "has 4 ranks, and 3 were started; start 4, or change the mesh"),
        ("dp,tp:2", 3, "3 ranks can't be divided by 2; start 2 or a multiple of it"),
        ("fdsp:2", 2, "unknown axis 'fdsp'; did you mean fsdp"),
        ("dp:2,dp:2", 4, "names dp twice"),
        ("dp,tp", 4, "dp and tp have no size"),
        ("tp:x", 4, "tp:x is no number of ranks"),
        ("tp:0", 4, "tp:0 is no number of ranks"),
    ],
)
def test_a_mesh_that_is_none(text: str, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mesh(text, n)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        (MeshShape(tp=8), {}, "n_heads=12 can't be divided by tp:8; tp of 2, 4 fit n_heads=12, n_kv_heads=4, d_ff=24"),
        (MeshShape(tp=3), {}, "n_kv_heads=4 can't be divided by tp:3; tp of 2, 4 fit"),
        (MeshShape(pp=4), {}, r"n_layers=6 can't be divided by 4 stages \(pp x stages_per_rank\); 2, 3, 6 stages fit"),
        (MeshShape(pp=2), {"stages_per_rank": 2}, "n_layers=6 can't be divided by 4 stages"),
        (MeshShape(dp=2), {"stages_per_rank": 2}, "stages_per_rank=2 is of a pipeline, and mesh=dp:2 has none"),
        (MeshShape(dp=16, pp=3), {}, "has 2 sequences for each pipeline of 3 stages; use batch_size 48 or more"),
        (MeshShape(pp=2, fsdp=2), {}, "a pipeline's ranks keep their weights and gradients whole; use zero=0 or 1"),
        (MeshShape(pp=2, tp=2), {}, "tp divides neither stages of a pipeline nor experts; use cp or dp"),
        (MeshShape(ep=2), {}, "n_experts=0 can't be divided by ep:2; no ep above 1 fits"),
        (MeshShape(cp=5), {}, r"max_seq_len=48 can't be divided by the 5 ranks .*; use 45 or 50"),
        (MeshShape(fsdp=3), {}, "batch_size=32 is not divisible by the 3 ranks .*; use 30 or 33"),
        (MeshShape(dp=3), {"zero": 2}, "batch_size=32 is not divisible by the 3 ranks"),
        (MeshShape(dp=2, fsdp=2), {"zero": 3}, "fsdp is ZeRO stage 3 over its own axis"),
    ],
)
def test_what_an_axis_does_not_divide(shape: MeshShape, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mesh(shape, TrainConfig(batch_size=32, **settings), MODEL)


def test_what_fits() -> None:
    config = TrainConfig(batch_size=7)
    check_mesh(MeshShape(dp=2), config, MODEL)  # copies: a reader may have less to read
    check_mesh(MeshShape(dp=2), replace(config, zero=1), MODEL)
    check_mesh(MeshShape(pp=3, cp=4), config, MODEL)
    with pytest.raises(ValueError, match="zero=4 is no ZeRO stage; choose 0, 1, 2 or 3"):
        TrainConfig(zero=4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_experts": 4}, "this model has experts: use fsdp"),
        ({"qk_norm_joint": True}, "tp:2: qk_norm_joint is not covered"),
        ({"logit_softcap": 30.0}, "tp:2: logit_softcap is not covered"),
        ({"positions": "learned"}, "tp:2: positions=learned are added before the sequence is divided"),
        ({"vocab_size": 1}, "tp:2: vocab_size=1 leaves a rank without a word"),
    ],
)
def test_what_tensor_parallel_does_not_divide(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tensor_parallel(replace(MODEL, **sizes), 2)
    check_tensor_parallel(MODEL, 2)


def test_an_average_of_pieces_is_refused() -> None:
    mesh = SimpleNamespace(shape=MeshShape(dp=2))
    with pytest.raises(
        ValueError, match=r"ema_decay=0\.9 is not covered where ranks hold pieces \(mesh=dp:2, zero=1\)"
    ):
        mesh_optimizer(Transformer(MODEL), TrainConfig(zero=1, ema_decay=0.9), mesh, roles={})  # pyright: ignore[reportArgumentType]


def test_stages() -> None:
    """By hand: a stage needs an axis to divide over; fsdp is stage 3."""
    assert stage(MeshShape(), TrainConfig(zero=3)) == 0
    assert stage(MeshShape(dp=2), TrainConfig(zero=3)) == 3
    assert stage(MeshShape(dp=2, fsdp=2), TrainConfig()) == 3


def test_one_process_is_a_mesh() -> None:
    mesh = make_mesh(TrainConfig(zero=3), MODEL, Ranks())
    assert (mesh.axes, mesh.device_mesh, mesh.group("dp"), mesh.index("dp", "tp")) == ((), None, None, 0)
    assert mesh.share([1, 2]) == [1, 2]
    assert mesh.sum(1, 2.5) == [1, 2.5]


def test_a_split_is_a_chunk() -> None:
    """Parity: torch.chunk's bounds, empty ones beyond the last."""
    import torch

    for size in (1, 5, 8, 9):
        for n in (1, 2, 4, 6):
            chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(n)]
            bounds = [Split("dp", 0, n, index).bounds(size) for index in range(n)]
            assert [list(range(*b)) for b in bounds if b[0] < b[1]] == chunks


def test_every_reader_has_as_many_micro_batches(tiny_windows: Windows) -> None:
    """Law: a step reads the same windows whatever the number of readers, who have equally many where it can be divided."""

    def cut(n: int, batch: int, micro: int) -> list[list[int]]:
        batches = WindowBatches([tiny_windows], batch_size=batch, micro_batch=micro, n_readers=n)
        made = batches.batch_at(3)
        return [[int(row[0]) for micro in made[rank::n] for row in micro["ids"]] for rank in range(n)]

    [alone] = cut(1, 12, 5)
    for n, micro in ((2, 4), (3, 32), (4, 2)):
        shares = cut(n, 12, micro)
        assert [len(share) for share in shares] == [12 // n] * n
        assert [row for share in shares for row in share] == alone
    assert sorted(row for share in cut(5, 12, 32) for row in share) == sorted(alone)  # 12 windows, 5 readers


@pytest.fixture
def tiny_windows(tmp_path: Path) -> Windows:
    import numpy as np

    np.arange(200, dtype=np.uint16).tofile(tmp_path / "train-00000.bin")
    entry = {"n_tokens": 200, "n_bytes": 1, "n_documents": 1, "files": ["train-00000.bin"]}
    tokens = TokenShards(tmp_path, "train", {"dtype": "uint16", "eos_token_id": 999, "splits": {"train": entry}})
    return make_windows("stream", tokens, seq_len=4, seed=1)
