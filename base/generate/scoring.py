"""How likely a model finds a text it is given: the log-probability of each token after those before it."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from ..model.transformer import Transformer
from .engine import evaluating
from .requests import TokenLogprob, token_logprobs

POSITIONS_AT_ONCE = 256  # logits held at a time


@torch.inference_mode()
def text_logprobs(
    model: Transformer,
    ids: Sequence[int],
    n_top: int,  # likeliest tokens to report at each position
    *,
    adapter: str | None = None,
) -> list[TokenLogprob | None]:
    """One entry a token of `ids`, in nats; None for the first, which nothing comes before. Mutates nothing.

    Raises ValueError for an empty text, one longer than the model's max_seq_len, and an adapter that isn't loaded.
    """
    limit = model.config.max_seq_len
    if not 0 < len(ids) <= limit:
        raise ValueError(f"the text has {len(ids)} tokens; give 1 to {limit}, the model's max_seq_len")
    selector = model.row_selector
    tokens = torch.tensor([list(ids)], device=model.model.embed_tokens.weight.device)
    found: list[TokenLogprob | None] = [None]
    with evaluating(model), nullcontext() if selector is None else selector([adapter]):
        hidden = model.hidden_states(tokens)[0, :-1]  # (T - 1, D)
        for start in range(0, len(ids) - 1, POSITIONS_AT_ONCE):
            logits = model.head(hidden[None, start : start + POSITIONS_AT_ONCE])[0]
            wanted = list(ids[start + 1 : start + 1 + len(logits)])
            found += token_logprobs(logits, wanted, [n_top] * len(logits)) or []
    return found
