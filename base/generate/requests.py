"""What the engine keeps of a request, and what it reports of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .prefix_cache import Block
from .sampling import Matcher, Sampling


class TokenLogprob(NamedTuple):
    """How likely the model found a token, before temperature and filters."""

    logprob: float  # in nats
    top: list[tuple[int, float]]  # (token, log-probability) of the likeliest tokens, in falling order


class Event(NamedTuple):
    """One new token of one request."""

    request: int
    token: int
    finished: Literal["stop", "length", "error"] | None  # "stop": the token is one of the request's stop ids
    logprob: TokenLogprob | None = None  # where the request's Sampling asks for it
    failure: str | None = None  # of "error": why its grammar gave up; the token means nothing then


@dataclass(eq=False)
class Request:
    """What the engine keeps of a request."""

    id: int
    ids: Sequence[int]  # the prompt
    sampling: Sampling
    adapter: str | None  # a name that the model's row selector understands; the engine passes it on
    hold: object  # while it lives, the adapter can't be removed or replaced
    generator: torch.Generator
    content: str | None  # what the prefix cache knows the weights by; None: keep nothing of this request
    priority: int = 0  # the lowest first; among equals the one that came first
    produced: list[int] = field(default_factory=list)
    prefix: list[Block] = field(default_factory=list)  # what the prefix cache holds of the prompt, while it is read
    seen: Tensor | None = None  # (V,) bool: the tokens that came before, kept for a repetition penalty
    matcher: Matcher | None = None  # of its grammar, if it has one
    failure: str | None = None  # why the grammar gave up

    @property
    def tokens(self) -> list[int]:
        """The prompt and what was produced."""
        return [*self.ids, *self.produced]

    @property
    def n_tokens(self) -> int:
        """Their number."""
        return len(self.ids) + len(self.produced)

    def allowed(self) -> Tensor | None:
        """(V,) bool, what its grammar lets come next; None: all. A grammar that gives up ends this request alone, in `take`."""
        if self.matcher is None:
            return None
        try:
            return self.matcher.allowed()
        except ValueError as error:
            self.failure = str(error)
            return None

    def take(self, token: int) -> Literal["stop", "length", "error"] | None:
        """Note the next token; why it is the last one, if it is."""
        if self.failure is not None:
            return "error"
        self.produced.append(token)
        if self.seen is not None:
            self.seen[token] = True
        if token in self.sampling.stop_ids:
            return "stop"
        if len(self.produced) == self.sampling.max_new_tokens:
            return "length"
        if self.matcher is not None:
            try:
                self.matcher.advance(token)
            except ValueError as error:
                self.failure = str(error)
                return "error"
        return None


def token_logprobs(
    logits: Tensor,  # (B, V)
    tokens: Sequence[int],  # the chosen one of each row
    n_top: Sequence[int | None],  # how many of the likeliest to report; None: nothing for this row
) -> list[TokenLogprob | None] | None:
    """Each row's log-probabilities, in float32; None where no row asks."""
    rows = [row for row, n in enumerate(n_top) if n is not None]
    if not rows:
        return None
    found: list[TokenLogprob | None] = [None] * len(tokens)
    most = min(max(n for n in n_top if n is not None), logits.shape[-1])
    chosen = torch.tensor([tokens[row] for row in rows], device=logits.device)[:, None]
    logprobs = logits[rows].float().log_softmax(-1)
    top = logprobs.topk(most)
    own = logprobs.gather(1, chosen)[:, 0].tolist()
    for row, logprob, values, indices in zip(rows, own, top.values.tolist(), top.indices.tolist(), strict=True):
        kept = [(i, value) for i, value in zip(indices, values, strict=True) if value > -math.inf][: n_top[row]]
        found[row] = TokenLogprob(logprob, kept)
    return found
