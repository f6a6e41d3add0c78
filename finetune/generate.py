"""Text to text: encode, choose adapters by row, decode. What `graft generate`, `graft chat` and `graft.generate` call."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..base.generate.engine import generate_ids
from ..base.model.transformer import Transformer
from ..base.tokenizer.tokenizer import Tokenizer
from .adapters.bank import bank_of
from .data.chat import ChatTemplate, encode_prompt
from .data.stop import stop_ids


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    adapters: Sequence[str | None] | None = None,  # a name of the model's AdapterBank for each prompt; None: the base
    temperature: float = 0.0,  # 0: the most probable token
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_text: Callable[[int, str], None] | None = None,  # called with (row, piece) as text comes
) -> list[str]:
    """The continuation of each prompt, without the prompt, up to an end-of-text or end-of-turn token.

    Prompts are plain text: no chat template, and special tokens spelled in them are text. Without `adapters` the bank's
    active adapter acts on every row. A row's text depends on its own prompt, adapter and seed, not on its neighbours.
    Raises ValueError for an adapter that isn't loaded and for a prompt that doesn't fit the model's length.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is one string; pass a list of strings")
    ids = [start_ids(encode_prompt(prompt, tokenizer).tolist(), tokenizer) for prompt in prompts]
    return generate_rows(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        adapters=adapters,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_text=on_text,
    )


def generate_rows(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],  # ids, such as encode_prompt gives for a conversation
    *,
    max_new_tokens: int,
    adapters: Sequence[str | None] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    template: ChatTemplate | None = None,  # its end of turn stops too; None: the tokenizer's
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """`generate` for prompts that are ids already."""
    stops = stop_ids(model.config, tokenizer, template)
    decoders = [tokenizer.stream_decoder() for _ in prompts]

    def show(row: int, token: int) -> None:
        piece = decoders[row].push(token)
        if piece and on_text is not None:
            on_text(row, piece)

    with rows_of(model, len(prompts), adapters):
        produced = generate_ids(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_token=show if on_text is not None else None,
            allowed=ids_with_text(model, tokenizer, stops),
        )
    if on_text is not None:
        for row, decoder in enumerate(decoders):
            if rest := decoder.flush():
                on_text(row, rest)
    return [tokenizer.decode(new) for new in produced]


def rows_of(model: Transformer, n_rows: int, adapters: Sequence[str | None] | None) -> AbstractContextManager[None]:
    """A block in which row i of every batch uses adapters[i]; None leaves the bank as it is."""
    if adapters is None:
        return nullcontext()
    if len(adapters) != n_rows:
        raise ValueError(f"{len(adapters)} adapters for {n_rows} prompts; give one for each, None for the base")
    bank = bank_of(model)
    if bank is None:
        named = [name for name in adapters if name is not None]
        if named:
            raise ValueError(f"adapter {named[0]!r} is named, but the model has no bank; make one: AdapterBank(model)")
        return nullcontext()
    return bank.use_rows(adapters)


def start_ids(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids, or bos (else eos) alone where the prompt is empty: a model needs one token to start from."""
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("the prompt is empty and the tokenizer has neither bos nor eos token to start from")
    return [start]


def ids_with_text(model: Transformer, tokenizer: Tokenizer, stops: frozenset[int]) -> Tensor | None:
    """(V,) bool: the ids that have a token or end a text; None where all do.

    Models are made with more rows than tokens, for a round number; what such a row would say can't be decoded.
    """
    n_rows = model.config.vocab_size
    if len(tokenizer.vocab) >= n_rows:
        return None
    allowed = torch.zeros(n_rows, dtype=torch.bool)
    known = {*tokenizer.vocab, *stops}
    allowed[[index for index in known if 0 <= index < n_rows]] = True
    return allowed
