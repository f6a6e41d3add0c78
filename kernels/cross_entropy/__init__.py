"""The language-model head and its loss in one function, without the (tokens x vocabulary) logits."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from ..checks import check_floats, check_integers, check_shape, readable
from ..cpu_loops import takes_loops
from ..dispatch import Backend, choose_backend
from .function import linear_cross_entropy_chunked
from .reference import linear_cross_entropy_reference
from .torch_cross_entropy import chunked_pass


def linear_cross_entropy(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), the head's
    targets: Tensor,  # (N,) int64 in [0, V), or ignore_index
    *,
    ignore_index: int = -100,  # the target that means "no loss here"
    z_loss: float = 0.0,  # factor of lse^2, which keeps the logits near 0; PaLM uses 1e-4
    reduction: Literal["mean", "sum", "none"] = "mean",  # over tokens with a label; "none": (N,), 0 where ignored
    backend: Backend = "auto",
) -> Tensor:
    """Cross entropy of softmax(hidden weight^T), in nats, chunk by chunk (the idea of Liger Kernel, arXiv:2410.10989, 3.2).

    At most one chunk of logits exists at a time, and "mean" and "sum" compute the gradients in the forward pass; what needs no
    gradient (a frozen weight, torch.no_grad) costs none. With no label at all every reduction is 0 with zero gradients (where
    F.cross_entropy's mean is NaN), so that an empty micro-batch does no harm: count the labels to notice it. Matrix products
    run in hidden's dtype (under autocast, in autocast's), the softmax in float32; the result is float32, or float64 for
    float64. Not twice differentiable. On the CPU a target outside [0, V) raises ValueError; on a GPU, where looking would
    wait for it, its loss is NaN under Triton.
    """
    check_floats("linear_cross_entropy", hidden=hidden, weight=weight)
    check_integers("linear_cross_entropy", "targets", targets, hidden.device)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} don't fit; "
            "it takes (N, D) and (V, D): flatten batch and time first"
        )
    check_shape("linear_cross_entropy", "targets", targets, (hidden.shape[0],), "one target for each row of hidden")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: unknown reduction {reduction!r}; choose mean, sum or none")
    if readable(targets) and targets.numel():
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))]
        if wrong.numel():
            raise ValueError(
                f"linear_cross_entropy: target {int(wrong[0])} is outside the vocabulary of {weight.shape[0]}; "
                f"use ids below it, or ignore_index={ignore_index} for no loss"
            )
    options = {"ignore_index": ignore_index, "z_loss": z_loss, "reduction": reduction}
    chunks = _chunks_of(backend, hidden, weight)
    if chunks is None:
        return linear_cross_entropy_reference(hidden, weight, targets, **options)
    return linear_cross_entropy_chunked(hidden, weight, targets, **options, chunks=chunks)


def weighted_linear_cross_entropy(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), the head's
    targets: Tensor,  # (N,) int64 in [0, V), or ignore_index
    token_weights: Tensor,  # (N,) float32: what each token's loss counts in the sum
    *,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum of token_weights * loss, (), to be differentiated, and each token's own loss (N,), which carries no gradient.

    One pass as `linear_cross_entropy` with reduction "sum" makes it, for several losses with divisors of their own. Targets
    are not checked.
    """
    chunks = _chunks_of(backend, hidden, weight)
    if chunks is None:
        losses = linear_cross_entropy_reference(hidden, weight, targets, ignore_index=ignore_index, reduction="none")
        return (losses * token_weights).sum(), losses.detach()
    seen: list[Tensor] = []

    def weighted(h: Tensor, w: Tensor, labels: Tensor, scale: Tensor, **options: Any) -> Any:
        losses, *gradients = chunks(h, w, labels, scale * token_weights, **options)
        seen.append(losses)
        return losses * token_weights, *gradients

    total = linear_cross_entropy_chunked(
        hidden, weight, targets, ignore_index=ignore_index, reduction="sum", chunks=weighted
    )
    return total, seen[0]


def _chunks_of(backend: Backend, hidden: Tensor, weight: Tensor) -> Callable[..., Any] | None:
    """The chosen backend's pass over chunks of tokens; None for the reference, which has no chunks."""
    if takes_loops("linear_cross_entropy", backend, [hidden, weight]):
        return partial(chunked_pass, loops=True)
    chosen = choose_backend("linear_cross_entropy", backend, [hidden, weight])
    if chosen == "reference":
        return None
    if chosen == "torch":
        return chunked_pass
    from .triton_cross_entropy import chunked_pass_triton

    return chunked_pass_triton
