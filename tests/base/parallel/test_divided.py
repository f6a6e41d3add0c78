"""Training with pipeline, expert and context parallel, alone and beside data parallel, is training on one rank."""

import json
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
from graft.base.training.checkpoints import load_checkpoint, save_checkpoint
from graft.base.training.objective import NextToken
from graft.base.training.sharded import mesh_optimizer
from graft.base.training.step import one_step

from .processes import on_ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
STEPS = 20
DENSE = ModelConfig(vocab_size=61, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_head=6, d_ff=20, max_seq_len=12)
TIED = replace(DENSE, n_layers=4, tie_embeddings=True)
MIXED = replace(DENSE, n_experts=4, n_experts_per_token=2, balance_loss=0.0)
# The routers' own losses weigh as much as the rest here; every rank then must read the same twos as one does alone.
BALANCED = replace(MIXED, balance_loss=0.5)
AHEAD = replace(DENSE, n_predict=2)
MODELS = {"ahead": AHEAD, "dense": DENSE, "tied": TIED, "mixed": MIXED, "balanced": BALANCED}
# At ten times this rate a mixture's routing turns rounding into differences of 1e-4 within 20 steps, at any order of sums.
TRAIN = TrainConfig(steps=STEPS, batch_size=8, micro_batch=2, learning_rate=1e-3, warmup_steps=2, grad_clip=0.5)
CASES: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [
        ("tied", {"mesh": "pp:2", "stages_per_rank": 2, "checkpointing": True}),
        ("dense", {"mesh": "cp:2", "checkpointing": True}),
        ("mixed", {"mesh": "ep:2"}),
        ("mixed", {"mesh": "ep:2", "optimizer": "muon"}),
        ("tied", {"mesh": "pp:2", "optimizer": "muon"}),
        ("ahead", {"mesh": "fsdp:2", "checkpointing": True}),
    ],
    4: [
        ("tied", {"mesh": "pp:4"}),
        ("tied", {"mesh": "dp:2,pp:2", "zero": 1, "micro_batch": 1}),
        ("dense", {"mesh": "fsdp:2,cp:2"}),
        ("balanced", {"mesh": "pp:2,ep:2"}),
        ("balanced", {"mesh": "fsdp:2,ep:2"}),
        ("mixed", {"mesh": "ep:2,cp:2"}),
        ("tied", {"mesh": "cp:2,tp:2"}),
    ],
}


def step_batches(step: int, n_readers: int) -> list[dict[str, torch.Tensor]]:
    """Eight random rows of which some targets carry no loss, in twos for `n_readers`."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, DENSE.vocab_size, (8, DENSE.max_seq_len + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    share = 8 // n_readers
    rows = [r * share + i for i in range(0, share, 2) for r in range(n_readers)]
    return [{"ids": ids[r : r + 2, :-1], "targets": targets[r : r + 2]} for r in rows]


def n_steps(settings: dict[str, Any]) -> int:
    """Axes alone train for STEPS; what they are beside each other, or with matrices that have owners, shows in a few."""
    return 5 if "," in settings.get("mesh", "") or "optimizer" in settings else STEPS


def trained(model_name: str, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Some steps of training on this rank's part of the mesh, and an evaluation of rows whose length nothing divides."""
    config, shape = replace(TRAIN, **settings), MODELS[model_name]
    mesh = make_mesh(config, shape, ranks())
    model = Transformer(shape)
    initialize_(model, seed=3)
    model.checkpointing = config.checkpointing
    optimizer = mesh_optimizer(model, config, mesh, roles=parameter_roles(model))
    together = optimizer.sharding if isinstance(optimizer, ShardedOptimizer) else ranks()
    model.train()
    lines = [
        one_step(
            *(model, optimizer, together.share(step_batches(step, mesh.readers.n)), config, LossScaler("float32")),
            *(step, NextToken().loss, NextToken().n_labels, "cpu"),
            together=together,
        )
        for step in range(steps)
    ]
    model.eval()
    held_out = {name: tensor[:, :7] for name, tensor in step_batches(99, 1)[0].items()}
    with torch.no_grad():
        if isinstance(optimizer, ShardedOptimizer):
            value = optimizer.sharding.part.summed_loss(model, held_out)
        else:
            value = model(held_out["ids"], held_out["targets"])
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name] = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return {
        "loss": [line["loss"] for line in lines],
        "grad_norm": [line["grad_norm"] for line in lines],
        "n_labels": [line["n_labels"] for line in lines],
        "n_tokens": [line["n_tokens"] for line in lines],
        "value": float(value),
        "weights": {name: weight.detach().flatten().tolist() for name, weight in weights.items()},
    }


def saved_and_resumed(rank: int, folder: str) -> dict[str, Any]:
    """A checkpoint of a pipeline's two ranks, and of experts' owners, read by other meshes: the weights of each piece."""
    del rank
    found = {}
    for model_name, saves, reads in (
        ("tied", {"mesh": "pp:2", "optimizer": "adamw"}, {"mesh": "cp:2"}),
        ("mixed", {"mesh": "ep:2"}, {"mesh": "pp:2"}),
    ):
        target = Path(folder) / model_name
        for settings in (saves, reads):
            config = replace(TRAIN, **settings)
            mesh = make_mesh(config, MODELS[model_name], ranks())
            model = Transformer(MODELS[model_name])
            initialize_(model, seed=3)
            optimizer = mesh_optimizer(model, config, mesh, roles=parameter_roles(model))
            assert isinstance(optimizer, ShardedOptimizer)
            first = load_checkpoint(target, optimizer, LossScaler("float32"))
            lines = [
                one_step(
                    *(model.train(), optimizer, optimizer.sharding.share(step_batches(step, mesh.readers.n)), config),
                    *(LossScaler("float32"), step, NextToken().loss, NextToken().n_labels, "cpu"),
                    together=optimizer.sharding,
                )
                for step in range(first, first + 3)
            ]
            save_checkpoint(target, first + 3, optimizer, LossScaler("float32"))
            found.setdefault(model_name, []).extend(line["loss"] for line in lines)
    return found


def all_cases(rank: int, cases: list[tuple[str, dict[str, Any]]], folder: str) -> dict[str, Any]:
    """What this rank has after each case; two ranks also save and resume."""
    found: dict[str, Any] = {str(case): trained(*case, n_steps(case[1])) for case in cases}
    return found | ({"resumed": saved_and_resumed(rank, folder)} if ranks().n == 2 else {})


@pytest.mark.parametrize("n", [2, 4])
def test_every_mesh_trains_as_one_rank(n: int, tmp_path: Path) -> None:
    """Law: losses, norms, labels, tokens, evaluation and weights of 20 steps, to 1e-5 in float32; nothing is lost or twice."""
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.pipelining  # before the ranks are forked: seconds of imports, once instead of each time

    assert torch._dynamo
    alone = {}
    found = on_ranks(n, all_cases, tmp_path / "ranks", CASES[n], str(tmp_path))
    for case in CASES[n]:
        optimizer, steps = case[1].get("optimizer", "adamw"), n_steps(case[1])
        key = case[0], optimizer, steps
        if key not in alone:
            alone[key] = trained(case[0], {"optimizer": optimizer}, steps)
        expected, seen = alone[key], set()
        for rank in found:
            one = rank[str(case)]
            assert one["n_labels"] == expected["n_labels"]
            assert one["n_tokens"] == expected["n_tokens"]
            for name in ("loss", "grad_norm", "value"):
                assert one[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (case, name)
            for name, weight in one["weights"].items():
                seen.add(name)
                torch.testing.assert_close(
                    torch.tensor(weight), torch.tensor(expected["weights"][name]), atol=1e-5, rtol=0
                )
        assert seen == expected["weights"].keys()
    if n == 2:
        for rank in found:  # steps 1-3 on one mesh, 4-6 on another from its checkpoint
            for name, losses in rank["resumed"].items():
                assert losses == pytest.approx(alone[name, "adamw", STEPS]["loss"][:6], rel=1e-5), name
        for name in ("tied", "mixed"):  # the files hold every weight once, under the whole model's names
            index = json.loads((tmp_path / name / "step-00000003/index.json").read_text())["weights"]
            shapes = {n: list(p.shape) for n, p in Transformer(MODELS[name]).named_parameters()}
            assert {n: entry["shape"] for n, entry in index.items()} == shapes
            for n, entry in index.items():
                held = sum(torch.Size(piece["size"]).numel() for piece in entry["pieces"])
                assert held == torch.Size(shapes[n]).numel(), n
