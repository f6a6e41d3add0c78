"""Bytes that a rank holds of weights, gradients and optimizer state: predicted from sizes, and counted.

ZeRO's table (arXiv:1910.02054, figure 1) for float32 weights and AdamW's two moments, with n ranks on the data axis and P
parameters of a tensor-parallel rank:

    stage   weights   gradients   state
    0       4 P       4 P         8 P
    1       4 P       4 P         8 P / n
    2       4 P       4 P / n     8 P / n
    3       4 P / n   4 P / n     8 P / n

Not in it: activations, what travels, and at stage 3 the layers that are whole while they run.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.config import ModelConfig
from ..run import TrainConfig
from .mesh import MeshShape, stage
from .optimizer import ShardedOptimizer
from .sharding import local_part


@dataclass(frozen=True)
class RankBytes:
    """What one rank holds."""

    weights: int
    gradients: int  # at the end of the backward pass
    state: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state


def predict_rank_bytes(config: ModelConfig, train: TrainConfig, shape: MeshShape) -> RankBytes:
    """The table's row for a float32 model in training with AdamW."""
    norms = 2 * config.d_model * config.n_layers + config.d_model
    norms += 2 * config.d_head * config.n_layers if config.qk_norm else 0
    params = (config.n_params - norms) / shape.tp + norms
    n, zero = shape.size("dp", "fsdp") if shape.fsdp == 1 else shape.fsdp, stage(shape, train)
    return RankBytes(
        weights=round(4 * params / (n if zero == 3 else 1)),
        gradients=round(4 * params / (n if zero >= 2 else 1)),
        state=round(8 * params / (n if zero >= 1 else 1)),
    )


def count_rank_bytes(model: nn.Module, optimizer: ShardedOptimizer) -> RankBytes:
    """What this rank holds now; gradients are there between a backward pass and the update."""
    own = [piece.local for piece in optimizer.sharding.pieces]
    gradients = [tensor.grad for tensor in [*model.parameters(), *own] if tensor.grad is not None]
    return RankBytes(
        weights=_n_bytes([*model.parameters(), *(tensor for _, tensor in optimizer.owners.mine)]),
        gradients=_n_bytes(gradients),
        state=_n_bytes(tensor for name, tensor in optimizer.state_tensors().items() if not name.startswith("n_steps")),
    )


def _n_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the numbers of these tensors on this rank, those that share memory counted once."""
    with torch.no_grad():
        local = [local_part(tensor) for tensor in tensors]
    sizes: dict[int, int] = {}
    for tensor in local:
        if tensor.numel():
            start = tensor.untyped_storage().data_ptr()
            sizes[start] = max(sizes.get(start, 0), tensor.untyped_storage().nbytes())
    return sum(sizes.values())
