"""A tiny model in training on a mesh of ranks, for the tests of base/parallel."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graft.base.model.config import ModelConfig
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.parallel.memory import RankBytes, count_rank_bytes
from graft.base.parallel.mesh import make_mesh
from graft.base.parallel.optimizer import ShardedOptimizer
from graft.base.parallel.ranks import ranks
from graft.base.parallel.traffic import SentBytes
from graft.base.precision import LossScaler
from graft.base.run import TrainConfig
from graft.base.training.objective import NextToken
from graft.base.training.sharded import mesh_optimizer
from graft.base.training.step import one_step

BATCH = 8
MODEL = ModelConfig(vocab_size=62, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_head=6, d_ff=20, max_seq_len=12)
TRAIN = TrainConfig(
    steps=20, batch_size=BATCH, micro_batch=2, learning_rate=1e-2, warmup_steps=2, grad_clip=0.5, schedule="constant"
)


def step_batches(step: int, n_readers: int) -> list[dict[str, Tensor]]:
    """The step's random rows, of which some targets carry no loss, cut in twos for `n_readers`."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, MODEL.vocab_size, (BATCH, MODEL.max_seq_len + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    share = BATCH // n_readers
    rows = [reader * share + i for i in range(0, share, 2) for reader in range(n_readers)]
    return [{"ids": ids[r : r + 2, :-1], "targets": targets[r : r + 2]} for r in rows]


class Trainee:
    """A model, its optimizer and its mesh on this rank."""

    def __init__(self, settings: dict[str, Any], sizes: dict[str, Any] | None = None) -> None:
        self.config = replace(TRAIN, **settings)
        shape = replace(MODEL, **(sizes or {}))
        self.mesh = make_mesh(self.config, shape, ranks())
        self.model = Transformer(shape)
        initialize_(self.model, seed=3)
        self.model.checkpointing = self.config.checkpointing
        self.optimizer = mesh_optimizer(self.model, self.config, self.mesh, roles=parameter_roles(self.model))
        self.lines: list[dict[str, Any]] = []
        self.sent: SentBytes | None = None
        self.held: RankBytes | None = None

    def steps(self, first: int, end: int) -> list[float]:
        """Train over these steps; returns their losses. The last one's traffic is in `sent`."""
        together = self.optimizer.sharding if isinstance(self.optimizer, ShardedOptimizer) else ranks()
        self.model.train()
        made = []
        for step in range(first, end):
            with SentBytes() if step == end - 1 and self.mesh.axes else nullcontext() as counter:
                line = one_step(
                    *(self.model, self.optimizer, self.mesh.share(step_batches(step, self.mesh.readers.n))),
                    *(self.config, LossScaler("float32"), step, NextToken().loss, NextToken().n_labels, "cpu"),
                    together=together,
                )
            self.sent = counter
            made.append(line)
        self.lines += made
        return [line["loss"] for line in made]

    def watch_memory(self) -> None:
        """From here on `held` is what this rank holds when a step's last backward pass has ended."""
        assert isinstance(self.optimizer, ShardedOptimizer)
        optimizer, finish = self.optimizer, self.optimizer.sharding.finish_gradients

        def watched(named: Any) -> list[Tensor]:
            self.held = count_rank_bytes(self.model, optimizer)
            return finish(named)

        optimizer.sharding.finish_gradients = watched

    def weights(self) -> dict[str, list[float]]:
        """All weights, whole."""
        found = {}
        for name, parameter in self.model.named_parameters():
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name] = whole.detach().flatten().tolist()
        return found
