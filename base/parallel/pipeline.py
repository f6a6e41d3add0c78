"""Pipeline parallel: a rank has some consecutive layers; micro-batches follow each other through the ranks.

torch.distributed.pipelining runs the schedule: 1F1B with one stage a rank, interleaved 1F1B with more (Narayanan et al. 2021,
arXiv:2104.04473, section 2.2; base/parallel/reference/pipeline.py shows both kinds as tables).

    4 layers on 2 ranks, one stage each    rank 0: embedding, 0, 1      rank 1: 2, 3, norm, head
    two stages each                        rank 0: embedding, 0; 2      rank 1: 1; 3, norm, head

A rank's model is the Transformer without the other ranks' layers, so that its weights have their names in the whole model. Tied
embeddings stand on the first and on the last rank, which add up their gradients.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.router_losses import RouterLosses
from ..model.transformer import IGNORE, Transformer
from ..precision import autocast


class Stage(nn.Module):
    """Some consecutive layers: ids (B, T) or hidden states (B, T, D) -> hidden states (B, T, D), after the norm on the last."""

    def __init__(self, model: Transformer, index: int, n_stages: int, dtype: str) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.is_first, self.is_last = index == 0, index == n_stages - 1
        names = map(str, stage_layers(model.config.n_layers, n_stages, index))
        layers = dict(model.model.layers.named_children())  # pyright: ignore[reportAttributeAccessIssue]
        self.layers = nn.ModuleList(layers[name] for name in names)
        self.n_mixtures = sum(model.config.layer(i).feed_forward == "experts" for i in range(model.config.n_layers))
        self.factor = 1.0  # of the step's losses
        self.router_loss = torch.zeros(())  # of this step, times the factor

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        model = self.model
        router_losses = RouterLosses() if targets is not None and self.training else None
        with autocast(self.dtype, x.device.type):
            context = model.context(x, router_losses=router_losses)
            if self.is_first:
                x = model.embed(x, context.positions)
            for layer in self.layers:
                x = model.run(layer, x, context, None)
            if router_losses and targets is not None:
                weight = (targets != IGNORE).sum() * self.factor / self.n_mixtures  # as Transformer.forward weighs them
                loss = router_losses.sum() * weight
                self.router_loss = self.router_loss + loss.detach()
                x = AttachLoss.apply(x, loss)
            return model.model.norm(x) if self.is_last else x

    def summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The last stage's cross entropy, summed over its targets, times the step's factor."""
        with autocast(self.dtype, hidden.device.type):
            return self.model.summed_loss(hidden.flatten(0, 1), targets.flatten()) * self.factor


class AttachLoss(torch.autograd.Function):
    """x as it is; its backward pass starts a loss's own too: how a stage that isn't the last has a loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)


class Pipeline:
    """One model on the ranks of a group. Its calls are made by all of them together, each with the same rows."""

    def __init__(
        self,
        model: Transformer,  # after `keep_stages`
        group: dist.ProcessGroup,
        *,
        n_rows: int,  # the most rows of a step
        micro_batch: int,  # the most rows at a time
        seq_len: int,
        dtype: str = "float32",  # of the products
        stages_per_rank: int = 1,
    ) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

        self.model, self.group, self.n = model, group, group.size()
        self.n_stages = self.n * stages_per_rank
        self.n_micro, self.n_rows = micro_batches(n_rows, micro_batch, self.n_stages, self.n)
        self.device = next(model.parameters()).device
        self.indices = range(group.rank(), self.n_stages, self.n)
        self.stages = [Stage(model, i, self.n_stages, dtype) for i in self.indices]
        shape, weights = (self.n_rows, seq_len), next(model.parameters()).dtype
        ids = torch.empty(shape, dtype=torch.int64, device="meta")
        hidden = torch.empty(*shape, model.config.d_model, dtype=weights, device="meta", requires_grad=True)
        parts = [
            PipelineStage(
                *(stage, i, self.n_stages, self.device),
                input_args=ids if stage.is_first else hidden,
                output_args=hidden,
                group=group,
            )
            for i, stage in zip(self.indices, self.stages, strict=True)
        ]
        options = {"n_microbatches": self.n_micro, "loss_fn": self.stages[-1].summed_loss, "scale_grads": False}
        if stages_per_rank == 1:
            self.schedule = Schedule1F1B(parts[0], **options)
        else:
            self.schedule = ScheduleInterleaved1F1B(parts, **options)  # pyright: ignore[reportArgumentType]

    def backward(self, ids: Tensor, targets: Tensor, *, factor: float) -> Tensor:
        """The step's gradients of its summed loss times `factor`, added to the parameters' own.

        ids and targets (rows, T). Returns this rank's share of that loss, () float32: the last stage's cross entropy, and each
        rank's routers'.
        """
        ids, targets = self._padded(ids, 0), self._padded(targets, IGNORE)
        for stage in self.stages:
            stage.factor, stage.router_loss = factor, torch.zeros((), device=self.device)
            stage.train(self.model.training)
        losses: list[Tensor] = []
        first = (ids,) if self.stages[0].is_first else ()
        last = {"target": targets, "losses": losses} if self.stages[-1].is_last else {}
        self.schedule.step(*first, targets=targets, return_outputs=False, **last)
        self._sum_tied_gradients()
        return sum((loss.detach() for loss in losses), sum(stage.router_loss for stage in self.stages))  # pyright: ignore

    @torch.no_grad()
    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The summed cross entropy of rows (B, T), () float32, the same on every rank; no gradient."""
        D, at_hand = self.model.config.d_model, ids
        dtype = next(self.model.parameters()).dtype
        found = torch.zeros((), device=self.device)
        rank = self.group.rank()
        for index in range(self.n_stages):
            owner, following = index % self.n, (index + 1) % self.n
            if owner == rank:
                stage = self.stages[index // self.n]
                stage.factor = 1.0
                at_hand = stage(at_hand)
                if stage.is_last:
                    found = stage.summed_loss(at_hand, targets)
                else:
                    dist.send(at_hand.contiguous(), group=self.group, group_dst=following)
            elif following == rank and index + 1 < self.n_stages:
                at_hand = torch.empty(*ids.shape, D, dtype=dtype, device=self.device)
                dist.recv(at_hand, group=self.group, group_src=owner)
        dist.broadcast(found, group=self.group, group_src=self.n - 1)
        return found

    def _padded(self, rows: Tensor, value: int) -> Tensor:
        """Rows (B, T) of this device, up to what the micro-batches hold; those added carry no loss."""
        missing = self.n_micro * self.n_rows - len(rows)
        assert missing >= 0, f"{len(rows)} rows for {self.n_micro} micro-batches of {self.n_rows}"
        return torch.cat([rows.to(self.device), rows.new_full((missing, rows.shape[1]), value).to(self.device)])

    def _sum_tied_gradients(self) -> None:
        """The embedding's gradient on the first and on the last rank: the sum of both, the same bits on each."""
        if not self.model.config.tie_embeddings or self.group.rank() not in (0, self.n - 1):
            return
        weight = self.model.model.embed_tokens.weight
        own = torch.zeros_like(weight) if weight.grad is None else weight.grad
        other, peer = torch.empty_like(own), self.n - 1 - self.group.rank()
        operations = [
            dist.P2POp(dist.isend, own.contiguous(), group=self.group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=self.group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        weight.grad = own + other


def stage_layers(n_layers: int, n_stages: int, index: int) -> range:
    """The layers of a stage: equally many in each, as check_mesh asks for."""
    assert n_layers % n_stages == 0
    size = n_layers // n_stages
    return range(index * size, (index + 1) * size)


def keep_stages(model: Transformer, rank: int, n: int, *, stages_per_rank: int = 1) -> None:
    """Take the other ranks' parts out of a model, in place; what stays keeps its name. Tied embeddings stay on the last too."""
    n_stages, config = n * stages_per_rank, model.config
    kept = {str(i) for s in range(rank, n_stages, n) for i in stage_layers(config.n_layers, n_stages, s)}
    for name in [name for name, _ in model.model.layers.named_children() if name not in kept]:  # pyright: ignore
        delattr(model.model.layers, name)
    is_first, is_last = rank == 0, rank == n - 1
    if not is_first and hasattr(model.model, "embed_positions"):
        del model.model.embed_positions
    if not is_first and not (is_last and config.tie_embeddings):
        del model.model.embed_tokens
    if not is_last:
        del model.model.norm, model.lm_head


def owned_twice(model: Transformer, rank: int) -> frozenset[str]:
    """Names of the weights of this rank that the first one has too: to be counted once in norms, and written once."""
    return frozenset({"model.embed_tokens.weight"} if model.config.tie_embeddings and rank else ())


def micro_batches(n_rows: int, micro_batch: int, n_stages: int, n: int) -> tuple[int, int]:
    """How many micro-batches of how many rows a step has: at least one a stage, so that every rank works at some time, and for
    interleaved stages a multiple of the ranks. As few and as full as that allows."""
    n_micro = max(n_stages, -(-n_rows // micro_batch))
    if n_stages > n:
        n_micro = -(-n_micro // n) * n
    return n_micro, -(-n_rows // n_micro)


def bubble(n: int, n_micro: int, stages_per_rank: int = 1) -> float:
    """The share of a step in which a rank waits, with passes of equal length: (n - 1) / (v m + n - 1) for v stages a rank
    (Narayanan et al. 2021, section 2.2.2, as a share of the whole step)."""
    return (n - 1) / (stages_per_rank * n_micro + n - 1)


def pipeline_bytes(
    *, rank: int, n: int, n_micro: int, rows: int, seq_len: int, d_model: int, stages_per_rank: int = 1,
    tied_numbers: int = 0,  # V D where embeddings are tied
    element_bytes: int = 4,
) -> int:  # fmt: skip
    """Bytes that a rank sends in a step: each stage's output, and its input's gradient, for every micro-batch."""
    stages = range(rank, n * stages_per_rank, n)
    hops = sum(s < n * stages_per_rank - 1 for s in stages) + sum(s > 0 for s in stages)
    tied = tied_numbers if rank in (0, n - 1) else 0
    return (hops * n_micro * rows * seq_len * d_model + tied) * element_bytes
