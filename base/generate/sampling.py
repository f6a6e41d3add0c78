"""Logits to a token: greedy, temperature, top-k, nucleus. Each row has its own generator."""

import torch
from torch import Tensor


def filter_logits(
    logits: Tensor,  # (B, V)
    *,
    temperature: float,  # > 0
    top_k: int | None = None,  # keep the k largest
    top_p: float
    | None = None,  # keep the smallest set that holds this probability (Holtzman et al. 2019, arXiv:1904.09751)
) -> Tensor:
    """Probabilities (B, V) float32 after temperature, then top-k, then top-p. Raises ValueError for values out of range."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0 here; 0 means greedy and needs no filter")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be >= 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")
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
    return probabilities


def sample(
    logits: Tensor,  # (B, V)
    generators: list[torch.Generator],  # one a row, so that a row's text does not depend on its neighbours
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The next token of each row, (B,) int64. Temperature 0 takes the most probable one."""
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be >= 0; 0 is greedy")
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn)
