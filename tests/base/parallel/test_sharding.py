"""Training on a mesh of ranks is training on one: losses, norms, weights; what each rank holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from graft.base.model.config import ModelConfig
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.parallel.mesh import make_mesh
from graft.base.parallel.optimizer import ShardedOptimizer
from graft.base.parallel.ranks import ranks
from graft.base.precision import LossScaler
from graft.base.run import TrainConfig
from graft.base.training.objective import NextToken
from graft.base.training.sharded import mesh_optimizer
from graft.base.training.step import one_step

from .processes import on_ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
STEPS = 20
MODEL = ModelConfig(vocab_size=61, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_head=6, d_ff=20, max_seq_len=12)
TRAIN = TrainConfig(steps=STEPS, batch_size=8, micro_batch=2, learning_rate=1e-2, warmup_steps=2, grad_clip=0.5)


def step_batches(step: int, n_readers: int) -> list[dict[str, torch.Tensor]]:
    """Eight random rows of which some targets carry no loss, cut for `n_readers`."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, MODEL.vocab_size, (8, MODEL.max_seq_len + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    share = 8 // n_readers
    rows = [r * share + i for i in range(0, share, 2) for r in range(n_readers)]
    return [{"ids": ids[r : r + 2, :-1], "targets": targets[r : r + 2]} for r in rows]


def trained(settings: dict[str, Any], model_settings: dict[str, Any]) -> dict[str, Any]:
    """STEPS of training on this rank's part of the mesh."""
    config, shape = replace(TRAIN, **settings), replace(MODEL, **model_settings)
    mesh = make_mesh(config, shape, ranks())
    model = Transformer(shape)
    initialize_(model, seed=3)
    optimizer = mesh_optimizer(model, config, mesh, roles=parameter_roles(model))
    together = optimizer.sharding if isinstance(optimizer, ShardedOptimizer) else ranks()
    lines = [
        one_step(
            *(model, optimizer, mesh.share(step_batches(step, mesh.readers.n)), config, LossScaler("float32"), step),
            *(NextToken().loss, NextToken().n_labels, "cpu"),
            together=together,
        )
        for step in range(STEPS)
    ]
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name] = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return {
        "losses": [line["loss"] for line in lines],
        "norms": [line["grad_norm"] for line in lines],
        "labels": [line["n_labels"] for line in lines],
        "tokens": [line["n_tokens"] for line in lines],
        "weights": {name: weight.detach().flatten().tolist() for name, weight in weights.items()},
    }


CASES = {
    2: [{"zero": 0}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"mesh": "fsdp:2", "checkpointing": True}],
    4: [{"zero": 3}, {"mesh": "dp:2,fsdp:2"}],
}


def all_cases(rank: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
    return {str(case): trained(case, {}) for case in cases}


@pytest.mark.parametrize("n", [2, 4])
def test_every_mesh_trains_as_one_rank(n: int, tmp_path: Path) -> None:
    alone = trained({}, {})
    found = on_ranks(n, all_cases, tmp_path / "ranks", CASES[n])
    for case in map(str, CASES[n]):
        for rank in found:
            one = rank[case]
            assert one["labels"] == alone["labels"]
            assert one["tokens"] == alone["tokens"]
            for name in ("losses", "norms"):
                gap = (torch.tensor(one[name]) - torch.tensor(alone[name])).abs().max()
                assert gap <= 1e-5, (case, name, gap)
            for name, weight in alone["weights"].items():
                torch.testing.assert_close(torch.tensor(one["weights"][name]), torch.tensor(weight), atol=1e-5, rtol=0)
