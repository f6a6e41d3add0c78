"""Tensor and sequence parallel over the axis tp: each rank has some heads, feed-forward columns and words of the vocabulary.

Column and row split of Shoeybi et al. 2019 (arXiv:1909.08053, section 3) by torch's DTensor, and sequence parallel of Korthikanti
et al. 2022 (arXiv:2205.05198, section 4.2.2): between the blocks each rank has T / tp positions, so that norms and residuals are
divided too. A block gathers its input along the sequence, and reduce-scatters its output.

    x (B, T/tp, D) -> norm -> gather (B, T, D) -> q k v | gate up: columns -> heads | width of this rank -> o | down: rows
      -> reduce-scatter (B, T/tp, D) -> + x
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..model.attention import Attention
from ..model.config import ModelConfig
from ..model.feed_forward import FeedForward
from ..model.head import ROWS
from ..model.transformer import IGNORE, Transformer
from .mesh import Mesh
from .ranks import naming_lost_ranks
from .sharding import local_part

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Raise ValueError for parts of a model that can't be divided by heads and columns."""
    layers = [config.layer(i) for i in range(config.n_layers)]
    kinds = {spec.feed_forward for spec in layers if spec.feed_forward != "gated"}
    kinds |= {spec.attention for spec in layers if spec.attention != "grouped"}
    if kinds:
        raise ValueError(
            f"mesh tp:{tp} divides grouped-query attention and gated feed-forward layers; this model has "
            f"{', '.join(sorted(kinds))}: use fsdp, or leave tp out"
        )
    for name in ("qk_norm_joint", "logit_softcap", "n_predict"):
        if getattr(config, name):
            raise ValueError(f"mesh tp:{tp}: {name} is not covered, it needs all heads or words at once; use fsdp")
    if config.positions != "rope":
        raise ValueError(
            f"mesh tp:{tp}: positions={config.positions} are added before the sequence is divided; use fsdp"
        )
    if (tp - 1) * -(-config.vocab_size // tp) >= config.vocab_size:
        raise ValueError(f"mesh tp:{tp}: vocab_size={config.vocab_size} leaves a rank without a word; use a smaller tp")


def split_tensors_(model: Transformer, mesh: Mesh) -> None:
    """Divide a model's weights over tp in place; its loss is then computed by the ranks of tp together."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    device_mesh, tp = mesh.along("tp"), mesh.shape.tp
    assert device_mesh is not None
    check_tensor_parallel(model.config, tp)
    scattered = RowwiseParallel(output_layouts=Shard(1))
    for module in list(model.modules()):
        if isinstance(module, Attention):
            plan = {
                "q_proj": ColwiseParallel(),
                "k_proj": ColwiseParallel(),
                "v_proj": ColwiseParallel(),
                "o_proj": scattered,
            }
            c = module.config
            module.config = replace(c, n_heads=c.n_heads // tp, n_kv_heads=c.n_kv_heads // tp)
        elif isinstance(module, FeedForward):
            plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": scattered}
        else:
            continue
        parallelize_module(module, device_mesh, plan)
        module.register_forward_pre_hook(lambda _, args: (_gather(args[0], device_mesh), *args[1:]))
    words = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    parallelize_module(model.model.embed_tokens, device_mesh, words)
    if not model.config.tie_embeddings:
        parallelize_module(model.lm_head, device_mesh, ColwiseParallel())
    tied = model.model.embed_tokens if model.config.tie_embeddings else model.lm_head
    model.lm_head = VocabularyHead(tied.weight, mesh)  # pyright: ignore[reportAttributeAccessIssue]
    model.model.norm.register_forward_hook(lambda *called: _whole_sequence(called[2], device_mesh))


def _gather(x: Tensor, device_mesh: "DeviceMesh") -> Tensor:
    """(B, T/tp, D) of each rank -> (B, T, D) on all, as a DTensor whose gradient is summed when it is scattered again."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    return DTensor.from_local(x, device_mesh, [Shard(1)], run_check=False).redistribute(placements=[Replicate()])


def _whole_sequence(x: Tensor, device_mesh: "DeviceMesh") -> Tensor:
    """The same as a plain tensor, of whose gradient each rank has a part of the sum."""
    from torch.distributed.tensor import DTensor, Partial

    whole = _gather(x, device_mesh)
    assert isinstance(whole, DTensor)
    return whole.to_local(grad_placements=[Partial()])


class VocabularyHead(nn.Module):
    """lm_head with a run of the vocabulary's rows on each rank."""

    def __init__(self, weight: Tensor, mesh: Mesh) -> None:  # a Parameter that is a DTensor (V, D), divided along V
        super().__init__()
        assert isinstance(weight, nn.Parameter)
        self.weight, self.mesh = weight, mesh

    def summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in nats of hidden (N, D) and targets (N,), summed, () float32; the same on every rank."""
        width = -(-self.weight.shape[0] // self.mesh.shape.tp)
        local = local_part(self.weight)
        start = self.mesh.index("tp") * width
        return VocabularyLoss.apply(hidden, local, targets, start, self.mesh)


class VocabularyLoss(torch.autograd.Function):
    """Cross entropy over a divided vocabulary (arXiv:1909.08053, section 3): three numbers a token travel instead of its logits.

    The gradients are computed in the forward pass, ROWS tokens at a time. Of hidden's, each rank has its words' part of the sum.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, start: int, mesh: Mesh) -> Tensor:
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if needs else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs else None
        total = hidden.new_zeros((), dtype=torch.float32)
        with naming_lost_ranks(mesh.ranks):
            for first in range(0, len(hidden), ROWS):
                rows = slice(first, first + ROWS)
                loss, slope = _losses(hidden[rows] @ weight.T, targets[rows], start, mesh)
                total += loss
                if d_hidden is not None and d_weight is not None:
                    d_hidden[rows] = (slope.to(weight.dtype) @ weight).to(hidden.dtype)
                    d_weight += slope.T.to(hidden.dtype) @ hidden[rows]
        if d_hidden is not None and d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden, d_weight = ctx.saved_tensors
        return grad * d_hidden, grad * d_weight, None, None, None


def _losses(logits: Tensor, targets: Tensor, start: int, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """This rank's logits (N, V/tp) -> the summed loss of all ranks, and its slope by these logits (N, V/tp), float32."""
    group, logits = mesh.group("tp"), logits.float()
    highest = logits.amax(-1)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    slope = (logits - highest[:, None]).exp_()
    local = targets - start
    mine = (local >= 0) & (local < logits.shape[1])
    index = local.clamp(0, logits.shape[1] - 1)[:, None]
    own = torch.where(mine, logits.gather(1, index)[:, 0] - highest, 0.0)
    both = torch.stack([slope.sum(-1), own])  # (2, N): sum of exponentials, the target's logit
    dist.all_reduce(both, group=group)
    labelled = targets != IGNORE
    loss = ((both[0].log() - both[1]) * labelled).sum()
    slope /= both[0][:, None]
    slope.scatter_add_(1, index, -mine[:, None].float())
    return loss, slope * labelled[:, None]
