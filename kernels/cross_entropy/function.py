"""The loss as an autograd function whose gradients are computed together with it, by either backend's chunked pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import accumulator
from .torch_cross_entropy import chunked_pass

Chunked = tuple[Tensor, Tensor | None, Tensor | None]  # losses (N,), gradients of hidden and weight if wanted


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss and handed over, scaled in place, by the first backward pass.

    They are plain attributes, not saved tensors: the engine may then keep them as .grad without a copy. A second backward
    pass, and reduction "none" whose gradient has a factor per token, computes them anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        z_loss: float,
        reduction: str,
        dtype: torch.dtype,  # of the matrix products
        record: bool,  # whether gradients are recorded: forward() itself always runs without
        chunks: Callable[..., Chunked],
    ) -> Tensor:
        ctx.args = {"ignore_index": ignore_index, "z_loss": z_loss, "weight_dtype": weight.dtype}
        ctx.reduction, ctx.dtype, ctx.chunks = reduction, dtype, chunks
        ctx.save_for_backward(hidden, weight, targets)
        now = record and reduction != "none"
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        scale = torch.ones(1, dtype=accumulator(dtype), device=hidden.device)
        if reduction == "mean":
            scale /= (targets != ignore_index).sum().clamp(min=1)
        needs = {"need_hidden": now and needs_hidden, "need_weight": now and needs_weight}
        losses, *grads = chunks(hidden.to(dtype), weight.to(dtype), targets, scale, **needs, **ctx.args)
        ctx.ready = grads if now else None
        return losses if reduction == "none" else losses.sum() * scale.squeeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, targets = ctx.saved_tensors
        ready, ctx.ready = ctx.ready, None
        if ready is not None:
            d_hidden, d_weight = (None if g is None else g.mul_(grad) for g in ready)
        else:
            if ctx.reduction == "mean":
                grad = grad / (targets != ctx.args["ignore_index"]).sum().clamp(min=1)
            needs = dict(zip(("need_hidden", "need_weight"), ctx.needs_input_grad[:2], strict=True))
            inputs = hidden.to(ctx.dtype), weight.to(ctx.dtype), targets, grad.reshape(-1)
            _, d_hidden, d_weight = ctx.chunks(*inputs, **needs, **ctx.args)
        d_hidden = None if d_hidden is None else d_hidden.to(hidden.dtype)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None, None, None


def linear_cross_entropy_chunked(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunks: Callable[..., Chunked] = chunked_pass,  # the backend
) -> Tensor:
    """The same function as `linear_cross_entropy_reference`. Under autocast its matrix products run in autocast's dtype."""
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    with torch.autocast(device, enabled=False):
        return LinearCrossEntropy.apply(
            hidden, weight, targets.long(), ignore_index, z_loss, reduction, dtype, torch.is_grad_enabled(), chunks
        )
