"""The decoding loop: read all prompts at once, then one token a row a step from the cache."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ..model.transformer import Transformer
from .kv_cache import KVCache
from .sampling import sample


@torch.inference_mode()
def generate_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,  # called with (row, id) as each token comes
    allowed: Tensor | None = None,  # (V,) bool, the ids that may come; None: all
) -> list[list[int]]:
    """The new ids of each prompt, without the stop token that ended it.

    Rows of different lengths are padded on the right, where causality hides the padding. Raises ValueError for an empty
    prompt or one that leaves no room for the new tokens in max_seq_len.
    """
    if not prompts:
        return []
    _check_lengths(model, prompts, max_new_tokens)
    device = model.model.embed_tokens.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.as_tensor(list(prompt), dtype=torch.int64)
    generators = [torch.Generator(device).manual_seed(seed + row) for row in range(len(prompts))]
    dtype = model.model.embed_tokens.weight.dtype
    cache = KVCache(model.config, len(prompts), ids.shape[1] + max_new_tokens, dtype=dtype, device=device)

    def allow(logits: Tensor) -> Tensor:  # (B, V)
        return logits if allowed is None else logits.masked_fill(~allowed.to(device), -torch.inf)

    was_training = model.training
    model.eval()
    try:
        return _decode(
            model, ids, lengths, cache, max_new_tokens, stop_ids, on_token,
            lambda logits: sample(allow(logits), generators, temperature=temperature, top_k=top_k, top_p=top_p),
        )  # fmt: skip
    finally:
        model.train(was_training)


def _decode(
    model: Transformer,
    ids: Tensor,  # (B, T), padded on the right
    lengths: Tensor,  # (B,) real ids of each row
    cache: KVCache,
    max_new_tokens: int,
    stop_ids: Collection[int],
    on_token: Callable[[int, int], None] | None,
    choose: Callable[[Tensor], Tensor],  # logits (B, V) -> ids (B,)
) -> list[list[int]]:
    """Read the prompts, then one token a row a step until all rows have stopped."""
    prompts = range(ids.shape[0])
    produced: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    logits = read_tokens(model, ids, lengths, cache)
    for step in range(max_new_tokens):
        chosen = choose(logits)  # (B,)
        for row, token in enumerate(chosen.tolist()):
            if done[row]:
                continue
            if token in stop_ids:
                done[row] = True
                continue
            produced[row].append(token)
            if on_token is not None:
                on_token(row, token)
        if all(done) or step + 1 == max_new_tokens:
            break
        logits = read_tokens(model, chosen[:, None], torch.ones_like(lengths), cache)
    return produced


def read_tokens(model: Transformer, ids: Tensor, counts: Tensor, cache: KVCache) -> Tensor:
    """Run (B, T) ids of which each row's first `counts` are real; returns the logits after the last real one, (B, V)."""
    hidden = model.hidden_states(ids, cache=cache)  # (B, T, D)
    cache.advance(counts)
    last = hidden[torch.arange(ids.shape[0], device=ids.device), counts - 1]  # (B, D)
    return model.lm_head(last[:, None])[:, 0]  # three axes: an adapter bank tells rows by the first


def _check_lengths(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be >= 1")
    limit = model.config.max_seq_len
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} has no token; start from the tokenizer's bos or eos token")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that is more than the "
                f"model's max_seq_len={limit}; shorten one of them"
            )
