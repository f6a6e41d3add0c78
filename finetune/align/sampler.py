"""Answers from the model in training, by the decoding engine; the answers to one prompt share its keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...base.generate.engine import Engine, Request, evaluating
from ...base.generate.sampling import Sampling
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ..data.chat import ChatTemplate
from ..data.stop import stop_ids
from ..generate import ids_with_text
from .prompts import Prompt


@dataclass(frozen=True, eq=False)
class Answer:
    """One sampled answer."""

    ids: list[int]  # with the stop token, if it came
    logp: list[float]  # of each under the sampler, nats; empty when greedy
    truncated: bool  # max_new_tokens came before a stop token


class Sampler:
    """Answers from the model as it is now."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, template: ChatTemplate | None, *, max_batch: int
    ) -> None:
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.stops = stop_ids(model.config, tokenizer, template)
        self.allowed = ids_with_text(model, tokenizer, self.stops)

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """One answer for each prompt; answer i has the seed `sampling.seed + i`."""
        logp: dict[int, list[float]] = {}

        def record(requests: Sequence[Request], logits: Tensor, tokens: Sequence[int]) -> None:
            at = torch.tensor(tokens, device=logits.device)[:, None]
            chosen = (logits.float() / sampling.temperature).log_softmax(-1).gather(1, at)
            for request, value in zip(requests, chosen[:, 0].tolist(), strict=True):
                logp.setdefault(request.id, []).append(value)

        hook = record if sampling.temperature else None
        engine = Engine(self.model, max_batch=self.max_batch, allowed=self.allowed, on_choice=hook)
        sampling = replace(sampling, stop_ids=self.stops)
        order = [engine.add(p.ids, replace(sampling, seed=sampling.seed + i)) for i, p in enumerate(prompts)]
        ids: dict[int, list[int]] = {request: [] for request in order}
        ended: dict[int, str] = {}
        with evaluating(self.model):  # else each of the engine's steps switches every module
            while engine.n_running or engine.n_waiting:
                for event in engine.step():
                    ids[event.request].append(event.token)
                    if event.finished:
                        ended[event.request] = event.finished
        return [Answer(ids[r], logp.get(r, []), ended[r] == "length") for r in order]

    def text(self, answer: Answer) -> str:
        """Without what ended it."""
        return self.tokenizer.decode([one for one in answer.ids if one not in self.stops])
