"""Training on a mesh of ranks is training on one: losses, norms, weights; what each rank holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from .mesh_runs import Trainee
from .processes import on_ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
STEPS = 8
CASES: dict[int, list[dict[str, Any]]] = {
    2: [
        {"zero": 0},
        {"zero": 1},
        {"zero": 2},
        {"zero": 3},
        {"mesh": "fsdp:2", "checkpointing": True},
        {"zero": 1, "optimizer": "muon"},
        {"zero": 3, "optimizer": "muon"},
        {"mesh": "tp:2"},
    ],
    4: [
        {"zero": 3},
        {"mesh": "dp:2,fsdp:2"},
        {"zero": 2, "optimizer": "muon"},
        {"mesh": "dp:2,tp:2"},
        {"mesh": "fsdp:2,tp:2", "checkpointing": True},
        {"mesh": "dp:2,tp:2", "zero": 1},
        {"mesh": "fsdp:2,tp:2", "optimizer": "muon"},
    ],
}


def trained(settings: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    run = Trainee(settings, sizes)
    run.steps(0, STEPS)
    return {"lines": run.lines, "weights": run.weights()}


def all_cases(rank: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
    return {str(case): trained(case, {}) for case in cases}


@pytest.mark.parametrize("n", [2, 4])
def test_every_mesh_trains_as_one_rank(n: int, tmp_path: Path) -> None:
    """Law: counts are equal, losses, norms and weights to 1e-5 in float32, on every rank."""
    alone = {name: trained({"optimizer": name}, {}) for name in ("adamw", "muon")}
    found = on_ranks(n, all_cases, tmp_path / "ranks", CASES[n])
    for case in CASES[n]:
        for rank in found:
            compare(str(case), rank[str(case)], alone[case.get("optimizer", "adamw")])


def compare(case: str, found: dict[str, Any], alone: dict[str, Any]) -> None:
    for one, other in zip(found["lines"], alone["lines"], strict=True):
        assert one.keys() == other.keys()
        assert (one["n_labels"], one["n_tokens"]) == (other["n_labels"], other["n_tokens"])
        for name in ("loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], abs=1e-5), (case, name, one["step"])
    for name, weight in alone["weights"].items():
        gap = (torch.tensor(found["weights"][name]) - torch.tensor(weight)).abs().max()
        assert gap <= 1e-5, (case, name, gap)
