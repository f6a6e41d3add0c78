"""Text to text: encode, choose adapters by row, decode. What `graft generate`, `graft chat` and `graft.generate` call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..base.generate.beam import beam_search
from ..base.generate.engine import generate_ids
from ..base.generate.sampling import Sampling
from ..base.generate.speculative import Drafter
from ..base.model.transformer import Transformer
from ..base.tokenizer.tokenizer import Tokenizer
from .adapters.bank import bank_of
from .adapters.selection import RowSelection
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
    min_p: float | None = None,
    repetition_penalty: float = 1.0,  # above 1: tokens of the prompt and of the answer become less likely
    stop: Sequence[str] = (),  # strings that end a text, which they are not part of
    seed: int = 0,
    n_beams: int = 1,  # above 1: beam search, the text of the highest probability; no streaming
    length_penalty: float = 1.0,  # of beams: above 0 favours long texts, 0 compares plain sums
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
    sampling = Sampling(
        temperature, top_k, top_p, min_p, max_new_tokens, seed=seed, repetition_penalty=repetition_penalty
    )
    if n_beams != 1:
        answers = generate_beams(
            model,
            tokenizer,
            ids,
            sampling,
            n_beams=n_beams,
            length_penalty=length_penalty,
            adapters=adapters,
            stop=stop,
        )
    else:
        answers = generate_answers(model, tokenizer, ids, sampling, adapters=adapters, stop=stop, on_text=on_text)
    return [answer.text for answer in answers]


@dataclass(frozen=True)
class Answer:
    """What a prompt was answered."""

    text: str  # up to the stop string, if one came
    ids: list[int]  # the new tokens, without the stop token
    finished: Literal["stop", "length"]


class TextUntil:
    """Text that comes in pieces, up to the first of some stop strings; holds back what may be the beginning of one.

    `push` gives what is certain. `ended` is True once a stop string has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string is empty; give at least one character")
        self.stops, self.text, self.ended = list(stops), "", False
        self._held = ""

    def push(self, piece: str) -> str:
        """The part of the held text and the piece that no stop string can reach any more."""
        if self.ended:
            return ""
        held = self._held + piece
        hits = [start for stop in self.stops if (start := held.find(stop)) >= 0]
        if hits:
            self.ended = True
            return self._give(held[: min(hits)], "")
        n_kept = max((n for stop in self.stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        return self._give(held[: len(held) - n_kept], held[len(held) - n_kept :])

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._give(self._held, "")

    def _give(self, text: str, held: str) -> str:
        self.text, self._held = self.text + text, held
        return text


def generate_rows(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    *,
    adapters: Sequence[str | None] | None = None,
    template: ChatTemplate | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """The texts of `generate_answers`."""
    answers = generate_answers(
        model, tokenizer, prompts, sampling, adapters=adapters, template=template, on_text=on_text
    )
    return [answer.text for answer in answers]


def generate_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],  # ids, such as encode_prompt gives for a conversation
    sampling: Sampling | Sequence[Sampling],  # for all (row i has the seed `seed + i`), or one for each prompt
    *,
    adapters: Sequence[str | None] | None = None,
    template: ChatTemplate | None = None,  # its end of turn stops too; None: the tokenizer's
    stop: Sequence[str] = (),  # strings that end a text, which they are not part of
    on_text: Callable[[int, str], None] | None = None,
    drafter: Drafter | None = None,  # speculative decoding: the same texts, in fewer passes where its guesses are right
) -> list[Answer]:
    """`generate` for prompts that are ids already; what ends a text is added to its stop ids. Raises ValueError for an
    empty stop string."""
    if isinstance(sampling, Sampling):
        sampling = [replace(sampling, seed=sampling.seed + row) for row in range(len(prompts))]
    stops = stop_ids(model.config, tokenizer, template)
    decoders = [tokenizer.stream_decoder() for _ in prompts]
    texts = [TextUntil(stop) for _ in prompts]

    def show(row: int, token: int) -> bool:
        piece = texts[row].push(decoders[row].push(token))
        if piece and on_text is not None:
            on_text(row, piece)
        return texts[row].ended

    produced = generate_ids(
        model,
        prompts,
        [replace(one, stop_ids={*one.stop_ids, *stops}) for one in sampling],
        adapters=rows_of(model, len(prompts), adapters),
        on_token=show if on_text is not None or stop else None,
        allowed=ids_with_text(model, tokenizer, stops),
        drafter=drafter,
    )
    if on_text is not None or stop:
        for row, decoder in enumerate(decoders):
            rest = texts[row].push(decoder.flush()) + texts[row].flush()
            if rest and on_text is not None:
                on_text(row, rest)
    answers = []
    for new, text, one in zip(produced, texts, sampling, strict=True):
        finished = "length" if len(new) == one.max_new_tokens and not text.ended else "stop"
        answers.append(Answer(text.text if stop else tokenizer.decode(new), new, finished))
    return answers


def generate_beams(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,  # max_new_tokens, stop_ids, repetition_penalty
    *,
    n_beams: int,
    length_penalty: float = 1.0,
    adapters: Sequence[str | None] | None = None,
    template: ChatTemplate | None = None,
    stop: Sequence[str] = (),
) -> list[Answer]:
    """The best beam after each prompt (base/generate/beam.py), up to a stop token or string. Raises ValueError as it does,
    and for an empty stop string."""
    TextUntil(stop)  # raises for an empty one
    stops = stop_ids(model.config, tokenizer, template)
    sampling = replace(sampling, stop_ids={*sampling.stop_ids, *stops})
    allowed = ids_with_text(model, tokenizer, stops)
    names = rows_of(model, len(prompts), adapters) or [None] * len(prompts)

    def ends(ids: list[int]) -> bool:
        text = tokenizer.decode(ids)
        return any(one in text for one in stop)

    answers = []
    for prompt, name in zip(prompts, names, strict=True):
        [best, *_] = beam_search(
            model, prompt, sampling, n_beams=n_beams, length_penalty=length_penalty, adapter=name, allowed=allowed,
            ends=ends if stop else None,
        )  # fmt: skip
        new = best.ids[:-1] if best.ids[-1] in sampling.stop_ids else best.ids
        until = TextUntil(stop)
        until.push(tokenizer.decode(new))
        until.flush()
        answers.append(Answer(until.text, new, "stop" if best.ended else "length"))
    return answers


def rows_of(model: Transformer, n_rows: int, adapters: Sequence[str | None] | None) -> Sequence[str | None] | None:
    """Each row's adapter: as given, else what this thread's block (`adapters_off`, `use_adapters`) or the bank's default
    chooses. Raises ValueError for another number of adapters."""
    if adapters is None:
        bank = bank_of(model)
        choice = None if bank is None else bank.registry.choice()
        name = choice if isinstance(choice, str) else None
        adapters = choice.names if isinstance(choice, RowSelection) else [name] * n_rows
    if len(adapters) != n_rows:
        raise ValueError(f"{len(adapters)} adapters for {n_rows} prompts; give one for each, None for the base")
    return adapters


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
