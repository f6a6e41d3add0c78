"""Prompts on their way into the cache: read together, in chunks, so that running requests go on meanwhile (Agrawal et al.
2023, "Sarathi", arXiv:2308.16369, section 4.1: chunked prefill)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..model.kv_cache import KVCache
from ..model.paged_cache import PagedKVCache
from ..model.transformer import Transformer
from .prefix_cache import BLOCK
from .requests import Request

PROMPT_TOKENS_AT_ONCE = 8192  # prompts are read in groups of at most so many tokens, padding included


class Reading:
    """A group of requests whose texts are read together; of equal ones only the first is read.

    `cache` gets one row for each different text. With `n_known[i]` tokens of row i in it already, texts are padded on the
    right, where causality hides the padding.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self.requests = list(requests)
        first: dict[tuple[str | None, tuple[int, ...]], int] = {}
        self.rows = [first.setdefault((each.adapter, tuple(each.tokens)), len(first)) for each in requests]
        self.readers = [self.requests[self.rows.index(row)] for row in range(len(first))]
        self.lengths = [each.n_tokens for each in self.readers]
        self.n_known = [len(each.prefix) * BLOCK for each in self.readers]
        self.n_unread = [n - known for n, known in zip(self.lengths, self.n_known, strict=True)]
        self._device, self._n_read = device, 0
        self._ids = torch.zeros(len(self.readers), max(self.n_unread), dtype=torch.int64)
        for ids, each, n in zip(self._ids, self.readers, self.n_known, strict=True):
            ids[: each.n_tokens - n] = torch.tensor(each.tokens[n:])
        self._logits: list[Tensor | None] = [None] * len(self.readers)
        self.cache: KVCache | PagedKVCache | None = None

    @property
    def width(self) -> int:
        """Columns that are left to read."""
        return self._ids.shape[1] - self._n_read

    @property
    def starts(self) -> list[int]:
        """Each reader's first column in a KVCache."""
        return [max(self.n_known) - n for n in self.n_known]

    @property
    def logits(self) -> Tensor:
        """(requests, V): after each request's last token, once all is read."""
        found = torch.stack([each for each in self._logits if each is not None])  # (readers, V)
        return found[torch.tensor(self.rows, device=found.device)]

    def read(
        self,
        model: Transformer,
        n: int,  # columns at most
        select: Callable[[Sequence[Request]], AbstractContextManager[object]],
    ) -> bool:
        """Read on; True when all is read. Raises ValueError for logits that are not finite."""
        begin, end = self._n_read, min(self._n_read + n, self._ids.shape[1])
        last = torch.tensor([min(max(n - 1, begin), end - 1) - begin for n in self.n_unread], device=self._device)
        with select(self.readers):
            logits = model(self._ids[:, begin:end].to(self._device), cache=self.cache, logits_at=last)[:, 0]  # (R, V)
        for row, n_row in enumerate(self.n_unread):
            if begin < n_row <= end:
                self._logits[row] = logits[row]
        self._n_read = end
        if self.width:
            return False
        if not all(bool(each.isfinite().all()) for each in self._logits if each is not None):
            raise ValueError(
                "the model's logits hold NaN or infinity: its weights or an adapter's do, or float16 overflows; "
                "try dtype float32, and look at the weights"
            )
        return True

    def drop(self, request: int) -> bool:
        """Forget a request; False where it isn't here. While others of the group are left, its text is read to the end."""
        for i, each in enumerate(self.requests):
            if each.id == request:
                del self.requests[i], self.rows[i]
                return True
        return False
