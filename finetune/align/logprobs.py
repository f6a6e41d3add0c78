"""Log-probabilities of response tokens, in chunks, so that the logits of all tokens never exist at once.

    log p(ids[t] | ids[<t]) = z[ids[t]] - logsumexp(z),   z = lm_head(hidden[t - 1]) / temperature

Only the positions that `mask` names reach the head: prompts and padding cost none of its products.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ...base.model.transformer import Transformer
from ...kernels.checks import accumulator, readable
from ...kernels.cross_entropy import linear_cross_entropy
from ...kernels.cross_entropy.torch_cross_entropy import chunk_rows

Head = nn.Module | Callable[[Tensor], Tensor]  # (N, D) -> (N, V)


def response_logprobs(
    model: Transformer,
    ids: Tensor,  # (B, T) int64
    mask: Tensor,  # (B, T) bool: the tokens to score; never a sequence's first, which has nothing before it
    *,
    temperature: float = 1.0,  # the logits are divided by it, as when sampling
    return_entropy: bool = False,
    positions: Tensor | None = None,  # (B, T) int64, for packed rows
    cu_seqlens: Tensor | None = None,  # (n_docs + 1,) int32 with B = 1: documents packed in one row
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(ids[t] | what stands before t) in nats, (B, T) float32, 0 where not mask; differentiable.

    With return_entropy also H = -sum_v p(v) log p(v) of the distribution that ids[t] was drawn from, (B, T), 0 where not
    mask, differentiable too. (A model in float64 gives float64.) Padding goes to the right, where causality hides it.
    Sums over a row give the sequence's log-probability. Does not cover the renormalization by top-k or top-p.

    Raises ValueError for shapes that don't fit, temperature <= 0, or a mask that names a sequence's first token.
    """
    _check(ids, mask, cu_seqlens, temperature)
    hidden, head = hidden_and_head(model, ids, positions, cu_seqlens)  # (B, T, D)
    before, labels, at = scored_rows(hidden, ids, mask)
    if not return_entropy and isinstance(head, nn.Linear) and type(head) is nn.Linear and head.bias is None:
        # A subclass, such as bitsandbytes' Linear4bit, keeps its weight in a form of its own.
        scaled = before if temperature == 1.0 else before / temperature  # the head is linear
        logp = -linear_cross_entropy(scaled, head.weight, labels, reduction="none")  # (N,)
        return spread(logp, at, mask)
    logp, entropy = head_logprobs(head, before, labels, temperature=temperature, n_vocab=model.config.vocab_size)
    return (spread(logp, at, mask), spread(entropy, at, mask)) if return_entropy else spread(logp, at, mask)


def scored_rows(hidden: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For the N true places of mask (B, T): hidden (N, D) before them, their ids (N,), and the places, (N,) in B x T.

    By indices, not by a mask: a mask is searched again for each tensor that it selects from, and in each backward pass.
    """
    at = mask.flatten().nonzero().squeeze(1)  # never a row's first, so the place before is in the same row
    return hidden.flatten(0, 1).index_select(0, at - 1), ids.flatten().index_select(0, at), at


def spread(values: Tensor, at: Tensor, mask: Tensor) -> Tensor:
    """(N,) values onto the places `at` of mask's shape (B, T); 0 elsewhere."""
    return values.new_zeros(mask.numel()).index_copy(0, at, values).view(mask.shape)


def hidden_and_head(
    model: Transformer, ids: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Head]:
    """Hidden states (B, T, D) after the final norm, and the head that turns them into logits."""
    return model.hidden_states(ids, positions=positions, cu_seqlens=cu_seqlens), model.head


def head_logprobs(
    head: Head,  # any function of (N, D) to (N, V): adapted, quantized, with a bias
    hidden: Tensor,  # (N, D)
    labels: Tensor,  # (N,) int64
    *,
    temperature: float = 1.0,
    n_vocab: int,
) -> tuple[Tensor, Tensor]:
    """log p(label) and entropy, (N,) and (N,), in nats. Each chunk of logits is computed again in the backward pass."""

    def chunk(h: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return ScoreRows.apply(head(h), label, temperature)  # pyright: ignore[reportReturnType]

    size = min(max(1, hidden.shape[0]), chunk_rows(n_vocab))
    pieces = zip(hidden.split(size), labels.split(size), strict=True)
    if torch.is_grad_enabled():
        parts = [checkpoint(chunk, h, label, use_reentrant=False) for h, label in pieces]
    else:
        parts = [chunk(h, label) for h, label in pieces]
    logp, entropy = (torch.cat(values) for values in zip(*parts, strict=True))
    return logp, entropy


class ScoreRows(torch.autograd.Function):
    """log p(label) and entropy H of each row of logits (C, V), (C,) and (C,); z = logits / temperature, p = softmax(z):

        d log p(label) / d z = onehot(label) - p,    d H / d z = -p (log p + H)

    One tensor is kept for both, and every backward pass reads it. With operators of their own, what an unused entropy keeps
    would wait in `checkpoint` until the last chunk is done: all logits at once again.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits.to(accumulator(logits.dtype)) / temperature, -1)  # (C, V)
        entropy = torch.special.entr(log_p.exp()).sum(1)
        ctx.save_for_backward(log_p, labels, entropy)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return log_p.gather(1, labels.unsqueeze(1)).squeeze(1), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_logp, d_entropy = grads
        log_p, labels, entropy = ctx.saved_tensors
        p = log_p.exp()
        d_logits = torch.zeros_like(p) if d_logp is None else p * -d_logp.unsqueeze(1)
        if d_logp is not None:
            d_logits.scatter_add_(1, labels.unsqueeze(1), d_logp.unsqueeze(1))
        if d_entropy is not None:
            d_logits += d_entropy.unsqueeze(1) * (torch.special.entr(p) - p * entropy.unsqueeze(1))
        return d_logits.div_(ctx.temperature).to(ctx.dtype), None, None


def _check(ids: Tensor, mask: Tensor, cu_seqlens: Tensor | None, temperature: float) -> None:
    if ids.ndim != 2 or mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"ids {tuple(ids.shape)} and mask {tuple(mask.shape)} {mask.dtype} don't fit; give ids (B, T) and a bool mask (B, T)"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0; use 1.0 for the model's own probabilities")
    if not readable(mask):
        return
    if cu_seqlens is None:
        wrong = mask[:, :1].nonzero()
    else:
        first = cu_seqlens[:-1].long()
        first = first[first < ids.shape[1]]
        wrong = mask.index_select(1, first).nonzero()
    if wrong.numel():
        row, at = wrong[0].tolist()
        at = at if cu_seqlens is None else int(cu_seqlens[:-1][cu_seqlens[:-1] < ids.shape[1]][at])
        raise ValueError(
            f"mask[{row}, {at}] names the first token of a sequence, which has nothing before it; mask the prompt's tokens out"
        )
