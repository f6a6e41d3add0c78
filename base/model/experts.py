"""Mixture of experts: each token is read by a few of many feed-forward layers, the ones that a router scores highest.

Shazeer et al. 2017 (arXiv:1701.06538); without a capacity, so no token is ever dropped (Gale et al. 2022, arXiv:2211.15841).
Rows are sorted by expert, so that each projection is one grouped product, and gathered back in a fixed order: the same sums
in every run.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...kernels.grouped_linear import grouped_linear
from ...kernels.swiglu import swiglu
from .config import LayerSpec, ModelConfig
from .feed_forward import FeedForward
from .kv_cache import StepContext
from .plain_feed_forward import PlainFeedForward

TINY = 1e-20  # keeps weights finite where all of a token's scores are 0


class Router(nn.Module):
    """Scores of the experts for each token: softmax(x W^T) or sigmoid, the k highest.

    With a bias (Wang et al. 2024, arXiv:2408.15664) the k highest of score + bias are chosen, and weighed by their scores. With
    groups, only experts of the highest-scored groups are chosen among: a group's score is its highest (DeepSeek-V2,
    arXiv:2405.04434, section 2.1.3), or with a bias the sum of its two highest (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    """

    ROLES: ClassVar = {"weight": "router", "e_score_correction_bias": "balance"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        if config.router_bias:  # choosing has no gradient: the experts' load moves it (base/training/balance.py)
            self.e_score_correction_bias = nn.Parameter(torch.zeros(config.n_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) -> logits (N, E) float32, weights (N, k) float32, experts (N, k) int64."""
        with torch.autocast(x.device.type, enabled=False):  # in float32: a rounded score sends a token elsewhere
            logits = F.linear(x.float(), self.weight.float())
        c, scores = self.config, self.scores(logits)
        choice = scores + self.e_score_correction_bias.float() if c.router_bias else scores
        if c.n_expert_groups > 1:
            choice = choice.masked_fill(~self._of_chosen_groups(choice), -torch.inf)
        experts = choice.topk(c.n_experts_per_token, dim=-1).indices
        weights = scores.gather(-1, experts)
        if c.normalize_experts:
            weights = weights / (weights.sum(-1, keepdim=True) + TINY)
        return logits, weights * c.routed_scale if c.routed_scale != 1 else weights, experts

    def scores(self, logits: Tensor) -> Tensor:
        """Logits (N, E) float32 -> scores (N, E) in (0, 1)."""
        return logits.sigmoid() if self.config.router == "sigmoid" else logits.softmax(-1)

    def _of_chosen_groups(self, choice: Tensor) -> Tensor:
        """(N, E) bool: the experts of each token's highest-scored groups."""
        c = self.config
        grouped = choice.detach().unflatten(-1, (c.n_expert_groups, -1))  # (N, G, E / G)
        score = grouped.topk(2, dim=-1).values.sum(-1) if c.router_bias else grouped.amax(-1)  # (N, G)
        best = score.topk(c.n_groups_per_token, dim=-1).indices
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)
        return chosen.repeat_interleave(grouped.shape[-1], dim=-1)


class ExpertWeights(nn.Module):
    """The experts' three matrices, stacked: gate and up projection in one product."""

    ROLES: ClassVar = {"gate_up_proj": "hidden", "down_proj": "residual"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, Fe = config.n_experts, config.d_model, config.expert_width
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * Fe, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, Fe))
        # Where ranks own some experts each: takes rows to their owners, lets them run, and brings the results back.
        self.owners: Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]], Tensor] | None = None

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Rows (M, D) sorted by expert, ends (E,) int32 -> what each row's expert makes of it, (M, D)."""
        return self.run(rows, ends) if self.owners is None else self.owners(rows, ends, self.run)

    def run(self, rows: Tensor, ends: Tensor) -> Tensor:
        """`forward` for the experts whose matrices are here."""
        rows = rows.to(product_dtype(rows))
        gate, up = grouped_linear(rows, here(self.gate_up_proj).to(rows.dtype), ends).chunk(2, dim=-1)
        return grouped_linear(swiglu(gate, up), here(self.down_proj).to(rows.dtype), ends)


class MixtureOfExperts(nn.Module):
    """sum over a token's k experts of weight * expert(x), plus an expert that reads every token, if there is one.

    (B, T, D) -> (B, T, D). The router's losses are put into the context while the router trains.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.load: Tensor | None = (
            None  # (E,) tokens that chose each expert; None: not counted (base/training/balance.py)
        )
        self.gate = Router(config)
        self.experts = ExpertWeights(config)
        if config.d_shared_expert:
            shared = FeedForward(config, config.d_shared_expert)
            if config.gate_shared_expert:
                self.shared_expert, self.shared_expert_gate = shared, SharedGate(config.d_model)
            else:
                self.shared_experts = shared

    def forward(self, x: Tensor, context: StepContext | None = None) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # (N, D)
        logits, weights, experts = self.gate(tokens)
        if context is not None and context.router_losses is not None and self.gate.weight.requires_grad:
            context.router_losses.append(self.router_loss(logits, experts))
        order, inverse, ends = sort_by_expert(experts, self.config.n_experts)
        if self.training and self.load is not None:
            self.load.add_(ends.diff(prepend=ends.new_zeros(1)))
        made = self.experts(Spread.apply(tokens, order, inverse, experts.shape[1]), ends)  # (N k, D)
        made = Permute.apply(made, inverse, order).view(*experts.shape, -1)  # (N, k, D)
        out = (made * weights[..., None].to(made.dtype)).sum(1)
        if self.config.d_shared_expert and self.config.gate_shared_expert:
            out = out + self.shared_expert_gate(tokens) * self.shared_expert(tokens)
        elif self.config.d_shared_expert:
            out = out + self.shared_experts(tokens)
        return out.view(x.shape)

    def decode(self, x: Tensor) -> Tensor:
        """`forward` for one new token a row, (B, D) -> (B, D)."""
        return self.forward(x)

    def router_loss(self, logits: Tensor, experts: Tensor) -> Tensor:
        """balance_loss * E * sum_e f_e P_e + router_z_loss * mean(logsumexp^2), () float32.

        f_e: share of the tokens that chose e, times k; P_e: mean probability of e (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6;
        Zoph et al. 2022, arXiv:2202.08906, eq. 5). Both are taken over the tokens of one call, padding included: micro-batches and
        ranks each balance their own, so with balance_loss > 0 a step that is split differs from the whole one.
        """
        c = self.config
        chosen = torch.zeros(c.n_experts, device=logits.device).index_add_(
            0, experts.flatten(), torch.ones_like(experts, dtype=torch.float32).flatten()
        )
        probabilities = self.gate.scores(logits)
        if c.router == "sigmoid":  # arXiv:2412.19437, eq. 19
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        balance = c.n_experts * (chosen / len(logits) * probabilities.mean(0)).sum()
        return c.balance_loss * balance + c.router_z_loss * logits.logsumexp(-1).square().mean()


def feed_forward(config: ModelConfig, spec: LayerSpec) -> FeedForward | PlainFeedForward | MixtureOfExperts:
    """The layer's feed-forward part."""
    if spec.feed_forward == "plain":
        return PlainFeedForward(config)
    return MixtureOfExperts(config) if spec.feed_forward == "experts" else FeedForward(config)


class SharedGate(nn.Module):
    """How much of the shared expert each token takes: sigmoid of one score, (N, D) -> (N, 1) (Qwen2-MoE).

    No nn.Linear, so that no adapter is attached to its one row and it is not stored in 4 bits.
    """

    ROLES: ClassVar = {"weight": "router"}

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, d_model))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).sigmoid()


def here(weight: Tensor) -> Tensor:
    """What of a weight lies on this rank: all of it, or of a DTensor its part."""
    return weight.to_local() if hasattr(weight, "to_local") else weight  # pyright: ignore[reportAttributeAccessIssue]


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear would compute in: autocast's, where it is on, which knows no grouped products."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def sort_by_expert(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """experts (N, k) -> order (N k,), its inverse (N k,), both int64, and ends (E,) int32 of the experts' groups.

    Row m of the sorted ones is the token order[m] // k. The sort is stable, so sums run in one order.
    """
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.zeros(n_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    return order, inverse, counts.cumsum(0).to(torch.int32)


class Spread(torch.autograd.Function):
    """Rows of x (N, D), k times each, in the order of their experts: x[order // k]. The gradient sums k rows in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class Permute(torch.autograd.Function):
    """x[order], whose gradient is gathered by the inverse instead of being added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None
