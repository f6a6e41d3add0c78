"""Sharded checkpoints: saved on four ranks, resumed on two and on one; a missing rank's file; whole or not there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from graft.base.model.huggingface import load_config
from graft.base.parallel.checkpoint import Pieces, write_together
from graft.base.parallel.export import export_model
from graft.base.parallel.ranks import Ranks, ranks
from graft.base.precision import LossScaler
from graft.base.training.checkpoints import load_checkpoint, save_checkpoint

from .mesh_runs import MODEL, Trainee
from .processes import on_ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
SAVES = [
    {"mesh": "fsdp:4"},
    {"mesh": "dp:2,fsdp:2", "optimizer": "muon"},
    {"zero": 1, "optimizer": "soap"},
    {"zero": 2},
]


def save(rank: int, folder: str) -> dict[str, Any]:
    """Three steps, a checkpoint, three more steps, whose losses are returned."""
    found = {}
    for i, settings in enumerate(SAVES):
        run = Trainee(settings)
        run.steps(0, 3)
        save_checkpoint(Path(folder) / str(i), 3, run.optimizer, LossScaler("float32"))
        found[str(i)] = run.steps(3, 6)
    return found


def resume(rank: int, folder: str, meshes: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for i, settings in enumerate(SAVES):
        for j, mesh in enumerate(meshes):
            run = Trainee({"optimizer": settings.get("optimizer", "adamw")} | mesh)
            assert load_checkpoint(Path(folder) / str(i), run.optimizer, LossScaler("float32")) == 3
            found[f"{i} {j}"] = run.steps(3, 6)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("saved")
    found = on_ranks(4, save, folder / "ranks", str(folder))
    assert found[0] == found[1] == found[2] == found[3]
    return folder, found[0]


def test_resumed_on_other_ranks(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Law: the losses after a checkpoint are the same on 4 ranks, on 2 with another mesh, and on 1."""
    folder, expected = saved
    on_two = on_ranks(2, resume, tmp_path / "two", str(folder), [{"zero": 3}, {"zero": 1}])[0]
    on_one = resume(0, str(folder), [{}])
    for case, losses in [*on_two.items(), *on_one.items()]:
        assert losses == pytest.approx(expected[case.split()[0]], abs=1e-5), case


def test_what_lies_there(saved: tuple[Path, dict[str, Any]]) -> None:
    """Law: every number of a tensor is written once; no file holds more than its rank's share; nothing is pickled."""
    step = saved[0] / "0/step-00000003"
    indexes = [json.loads((saved[0] / str(i) / step.name / "index.json").read_text()) for i in range(len(SAVES))]
    for entry in (entry for index in indexes for kind in ("weights", "optimizer") for entry in index[kind].values()):
        if entry["shape"]:
            assert (
                sum(torch.Size(piece["size"]).numel() for piece in entry["pieces"])
                == torch.Size(entry["shape"]).numel()
            )
    n_weights = MODEL.n_params
    for rank in range(4):
        mine = load_file(step / f"weights-{rank + 1:05d}-of-00004.safetensors")
        assert sum(t.numel() for t in mine.values()) == pytest.approx(n_weights / 4, rel=0.2)
    assert {path.suffix for path in step.iterdir()} == {".json", ".safetensors"}


def test_a_missing_file_is_named(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    import shutil

    step = shutil.copytree(saved[0] / "0/step-00000003", tmp_path / "run/step-00000003")
    (step / "optimizer-00003-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks optimizer-00003-of-00004.safetensors, which rank 2 of 4 wrote"):
        load_checkpoint(tmp_path / "run", Trainee({}).optimizer, LossScaler("float32"))
    index = json.loads((step / "index.json").read_text())
    index["weights"]["model.norm.weight"]["pieces"].pop()
    (step / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"doesn.t say where all of model\.norm\.weight is"):
        Pieces(step, "weights").read("model.norm.weight")
    (step / "weights-00001-of-00004.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"weights-00001-of-00004\.safetensors is truncated"):
        Pieces(step, "weights").read("model.norm.weight")


def test_export_is_the_model(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Law: the exported folder holds the run's weights, in one file or in several of which one is in memory at a time."""
    from graft import load_model

    step = saved[0] / "0/step-00000003"
    run = Trainee({})
    load_checkpoint(step.parent, run.optimizer, LossScaler("float32"))
    names = [name for name, _ in run.model.named_parameters()]
    for folder, limit in ((tmp_path / "one", 10**9), (tmp_path / "many", 2000)):
        folder.mkdir()
        export_model(step, MODEL, names, folder, limit=limit)
        assert replace(load_config(folder), max_seq_len=MODEL.max_seq_len) == MODEL
        for name, tensor in load_model(folder).state_dict().items():
            torch.testing.assert_close(tensor, run.model.state_dict()[name], atol=0, rtol=0)
    assert (tmp_path / "many/model.safetensors.index.json").exists()


def fail_on_one(rank: int, folder: str) -> dict[str, Any]:
    def write(path: Path) -> None:
        if rank == 1:
            raise OSError(28, "No space left on device")
        (path / str(rank)).write_text("whole")

    try:
        write_together(Path(folder) / "step-00000001", ranks(), write, lambda path: None)
    except OSError as error:
        return {"message": str(error)}
    return {"message": ""}


def test_a_rank_that_cannot_write(tmp_path: Path) -> None:
    """Law: then no rank's part gets the checkpoint's name, nothing is left, and each says why."""
    one, other = on_ranks(2, fail_on_one, tmp_path / "ranks", str(tmp_path / "run"))
    assert "another rank could not write its part" in one["message"]
    assert "No space left on device" in other["message"]
    assert list((tmp_path / "run").iterdir()) == []


def test_one_rank_writes_together(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        (path / "a").write_text("a")

    write_together(tmp_path / "step-1", Ranks(), write, lambda path: (path / "b").write_text("b") and None)
    assert sorted(path.name for path in (tmp_path / "step-1").iterdir()) == ["a", "b"]
