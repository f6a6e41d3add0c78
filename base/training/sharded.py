"""The optimizer of a run on a mesh of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..model.init import HIDDEN, Role
from ..parallel.mesh import Mesh, is_copied
from ..parallel.optimizer import ShardedOptimizer
from ..parallel.part import Part
from ..parallel.sharding import shard
from ..run import TrainConfig
from .optimizers import OPTIMIZERS, Optimizer, OptimizerMaker, make_optimizer

# The roles of the matrices that an optimizer can't update piece by piece.
WHOLE: Mapping[str, frozenset[Role]] = {
    "muon": HIDDEN,
    "soap": frozenset({"embedding", "head", "hidden", "residual", "router"}),
}


def evaluated(model: nn.Module, optimizer: Optimizer) -> nn.Module:
    """What computes the model's loss of whole rows: the model, or the ranks that share its layers or positions together."""
    part = optimizer.sharding.part if isinstance(optimizer, ShardedOptimizer) else Part()
    return model if part.ring is None and part.pipeline is None else Whole(model, part)


class Whole(nn.Module):
    """A model of which this rank has a part, called as the whole one is with targets, to evaluate it."""

    def __init__(self, model: nn.Module, part: Part) -> None:
        super().__init__()
        self.model, self.part = model, part

    def forward(self, ids: Tensor, targets: Tensor, *, positions: None = None, cu_seqlens: None = None) -> Tensor:
        del positions, cu_seqlens  # of rows that are packed; those that validate are not
        return self.part.summed_loss(self.model, {"ids": ids, "targets": targets})


def mesh_optimizer(
    model: nn.Module,
    config: TrainConfig,
    mesh: Mesh,
    *,
    roles: Mapping[str, Role],
    makers: Mapping[str, OptimizerMaker] = OPTIMIZERS,
    width_ratio: float = 1.0,  # muP's
) -> Optimizer:
    """The config's optimizer over this rank's pieces of the model, which is divided in place first.

    Ranks that all hold everything need no pieces: then it is the optimizer of one process.
    """
    if is_copied(mesh.shape, config):
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        return make_optimizer(trained, config, makers, roles=roles, width_ratio=width_ratio)
    if config.ema_decay:
        raise ValueError(
            f"ema_decay={config.ema_decay} is not covered where ranks hold pieces (mesh={mesh.shape}, zero={config.zero}); "
            "use mesh=dp with zero=0, or leave it out"
        )
    whole = {name for name, role in roles.items() if role in WHOLE.get(config.optimizer, ())}

    def make(tensors: Sequence[tuple[str, Tensor]]) -> Optimizer:
        named = (
            replace(config, optimizer="adamw") if whole and not any(name in whole for name, _ in tensors) else config
        )
        # A rank that owns no matrix has AdamW's part alone.
        return make_optimizer(tensors, named, makers, roles=roles, width_ratio=width_ratio)

    return ShardedOptimizer(shard(model, config, mesh), make, whole=whole)
