"""This rank's part of a model and of its rows: pipeline, expert and context parallel on a mesh."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.experts import ExpertWeights
from ..model.transformer import IGNORE, Transformer
from ..run import TrainConfig
from .context import Ring
from .experts import Owners
from .mesh import BATCH_AXES, Mesh

if TYPE_CHECKING:  # its schedules take as long to import as torch
    from .pipeline import Pipeline

Item = TypeVar("Item")
BY_POSITION = {"ids": 0, "targets": IGNORE, "positions": 0}  # tensors (B, T) of a batch, and what fills them up


@dataclass(frozen=True)
class Part:
    """How a rank computes a step's loss; all None: by itself."""

    ring: Ring | None = None  # the ranks that share each row
    pipeline: "Pipeline | None" = None  # the ranks that share the layers
    spare: frozenset[str] = (
        frozenset()
    )  # weights that another rank of the pipeline has too, which counts and writes them

    def own(self, batch: Item) -> Item:
        """A batch with this rank's positions alone."""
        if self.ring is None or not isinstance(batch, Mapping):
            return batch
        return {name: self.ring.own(t) if name in BY_POSITION else t for name, t in batch.items()}  # pyright: ignore

    def backward(self, batches: Sequence[Mapping[str, Tensor]], *, factor: float) -> Tensor:
        """Through the pipeline: the gradients of the batches' summed loss times `factor`; returns that, the same on its ranks."""
        assert self.pipeline is not None
        ids, targets = (torch.cat([batch[name] for batch in batches]) for name in ("ids", "targets"))
        found = self.pipeline.backward(ids, targets, factor=factor)
        dist.all_reduce(found, group=self.pipeline.group)
        return found

    def summed_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The summed cross entropy of whole rows, the same on every rank that shares them; to evaluate, no gradient flows."""
        if self.ring is not None:
            batch = self.own({name: self.ring.filled(batch[name], BY_POSITION[name]) for name in ("ids", "targets")})
        if self.pipeline is not None:
            found = self.pipeline.loss(batch["ids"], batch["targets"])
        else:
            found = model(batch["ids"], batch["targets"])
        if self.ring is not None:
            dist.all_reduce(found, group=self.ring.group)
        return found


def divide_model_(model: nn.Module, config: TrainConfig, mesh: Mesh) -> Part:
    """Leave in a model what is this rank's: its stages' layers and its experts, on its positions of each row.

    Raises TypeError for a model that isn't a Transformer, where an axis needs one.
    """
    if mesh.shape.size("pp", "ep", "cp") == 1:
        return Part()
    if not isinstance(model, Transformer):
        raise TypeError(f"mesh={mesh.shape}: pp, ep and cp divide a Transformer, got {type(model).__name__}; use dp")
    length = model.config.max_seq_len
    if mesh.shape.ep > 1:
        own_experts_(model, mesh)
    ring = None
    if (group := mesh.group("cp")) is not None:
        model.shared_rows = ring = Ring(group, balanced=length % (2 * group.size()) == 0)
        length //= group.size()
    if (group := mesh.group("pp")) is None:
        return Part(ring)
    from .pipeline import Pipeline, keep_stages, owned_twice

    keep_stages(model, group.rank(), group.size(), stages_per_rank=config.stages_per_rank)
    pipeline = Pipeline(
        *(model, group),
        n_rows=config.batch_size // mesh.shape.size(*BATCH_AXES),
        micro_batch=config.micro_batch,
        seq_len=length,
        dtype=config.dtype,
        stages_per_rank=config.stages_per_rank,
    )
    return Part(ring, pipeline, owned_twice(model, group.rank()))


def own_experts_(model: nn.Module, mesh: Mesh) -> None:
    """Keep this rank's experts of every mixture, as its parts of DTensors, and let tokens travel to them."""
    from torch.distributed.tensor import DTensor, Shard

    device_mesh, group = mesh.along("ep"), mesh.group("ep")
    assert device_mesh is not None
    assert group is not None
    for module in model.modules():
        if isinstance(module, ExpertWeights):
            module.owners = Owners(group)
            for name, whole in list(module.named_parameters(recurse=False)):
                mine = whole.detach().chunk(group.size())[group.rank()].clone()
                part = DTensor.from_local(mine, device_mesh, [Shard(0)], run_check=False)
                setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))
