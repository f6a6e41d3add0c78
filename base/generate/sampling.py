"""Logits to a token: greedy, temperature, top-k, nucleus, min-p, repetition penalty.

Each request has its own settings and random numbers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SMALLEST_TEMPERATURE = 1e-5  # below it logits / temperature leaves float32's range


class Matcher(Protocol):
    """Which tokens may come next in one request's text, by its grammar."""

    def allowed(self) -> Tensor:
        """(V,) bool on the CPU: the tokens that may come now; those that end the text only where it may end."""
        ...

    def advance(self, token: int) -> None:
        """The token, one of the allowed ones, has come."""
        ...


class Grammar(Protocol):
    """What a text must be."""

    def matcher(self) -> Matcher:
        """At the text's beginning."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen, and when it ends. Raises ValueError for values out of range."""

    temperature: float = 0.0  # 0: always the most probable token
    top_k: int | None = None  # keep the k largest
    top_p: float | None = None  # keep the smallest set that holds this probability (arXiv:1904.09751)
    min_p: float | None = None  # keep tokens of at least min_p x the largest probability (arXiv:2407.01082)
    max_new_tokens: int = 64
    stop_ids: Iterable[int] = frozenset()  # a token that ends the request; it is reported, and not part of the text
    seed: int = 0
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and of the answer become less likely; see penalize
    logprobs: int | None = None  # report each token's log-probability, and those of so many of the likeliest; None: no
    grammar: "Grammar | None" = None  # what the text must be, such as JSON of a schema: json_grammar.py

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_ids", frozenset(self.stop_ids))
        if not (self.temperature == 0 or SMALLEST_TEMPERATURE <= self.temperature < math.inf):
            raise ValueError(
                f"temperature={self.temperature} must be 0 (greedy), or at least {SMALLEST_TEMPERATURE} and finite"
            )
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k={self.top_k} must be >= 1, a whole number")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value} must lie in (0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be > 0 and finite; 1 is none")
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be >= 1, a whole number")
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} must be a whole number of at most 64 bits")
        if self.logprobs is not None and (type(self.logprobs) is not int or self.logprobs < 0):
            raise ValueError(f"logprobs={self.logprobs} must be >= 0, a whole number")

    @property
    def filters(self) -> tuple[float, int | None, float | None, float | None]:
        """What decides the probabilities: requests with equal ones are filtered together."""
        return self.temperature, self.top_k, self.top_p, self.min_p


def filter_logits(
    logits: Tensor,  # (B, V)
    *,
    temperature: float,  # > 0
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Probabilities (B, V) float32 after temperature, then top-k, then top-p, then min-p. Raises ValueError for values out
    of range."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0 here; 0 means greedy and needs no filter")
    Sampling(temperature, top_k, top_p, min_p)  # checks the ranges
    scaled = logits.float() / temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        least = scaled.topk(top_k).values[:, -1:]  # (B, 1)
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = scaled.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of what ranks above
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        probabilities /= probabilities.sum(-1, keepdim=True)
    if min_p is not None:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0.0)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def penalize(
    logits: Tensor,  # (B, V)
    seen: Sequence[Tensor | None],  # for each row the tokens that came before, (V,) bool; None: no penalty
    settings: Sequence[Sampling],
) -> Tensor:  # (B, V), a copy where any row has a penalty
    """Repetition penalty (Keskar et al. 2019, CTRL, arXiv:1909.05858, section 4.1): a seen token's logit is divided by it.

    Negative logits are multiplied instead, as transformers does, so that the token becomes less likely there too.
    """
    if all(tokens is None for tokens in seen):
        return logits
    logits = logits.float().clone()
    for row, (tokens, each) in enumerate(zip(seen, settings, strict=True)):
        if tokens is not None:
            values, penalty = logits[row], each.repetition_penalty
            logits[row] = torch.where(tokens, torch.where(values > 0, values / penalty, values * penalty), values)
    return logits


def choose_tokens(
    logits: Tensor,  # (B, V)
    settings: Sequence[Sampling],  # one a row
    generators: Sequence[torch.Generator],  # one a row, so that a row's text does not depend on its neighbours
) -> list[int]:
    """The next token of each row."""
    tokens: list[int] = logits.argmax(-1).tolist()
    groups: dict[tuple, list[int]] = {}
    for row, each in enumerate(settings):
        if each.temperature > 0:
            groups.setdefault(each.filters, []).append(row)
    for (temperature, top_k, top_p, min_p), rows in groups.items():
        chosen = logits if len(rows) == len(settings) else logits[rows]
        probabilities = filter_logits(chosen, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        drawn = [torch.multinomial(p, 1, generator=generators[row]) for p, row in zip(probabilities, rows, strict=True)]
        for row, token in zip(rows, torch.cat(drawn).tolist(), strict=True):
            tokens[row] = token
    return tokens
