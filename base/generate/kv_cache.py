"""Keys and values of the tokens already read, so that each new token costs one row of attention."""

import torch
from torch import Tensor

from ..model.config import ModelConfig


class LayerCache:
    """One layer's keys and values, (B, K, capacity, Dh) each, filled row by row from the left."""

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        self.keys, self.values = keys, values
        self.lengths = lengths  # (B,) int32, shared by all layers; advanced once a step by KVCache.advance

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write k, v (B, K, T, Dh) behind each row's keys; returns all keys, all values and the rows' key counts.

        While every row is empty the new keys are the only ones, so they are returned as they are with no counts:
        the prompt is read by plain causal attention (rows are padded on the right, where causality hides the padding).
        """
        T, first = k.shape[2], bool((self.lengths == 0).all())
        if first:
            self.keys[:, :, :T], self.values[:, :, :T] = k, v
            return k, v, None
        rows = torch.arange(k.shape[0], device=k.device)
        for t in range(T):
            at = self.lengths.long() + t  # (B,)
            self.keys[rows, :, at], self.values[rows, :, at] = k[:, :, t], v[:, :, t]
        counts = self.lengths + T
        S = int(counts.max())
        return self.keys[:, :, :S], self.values[:, :, :S], counts.to(torch.int32)


class KVCache:
    """A cache for each layer, all rows' lengths in one place."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (batch, config.n_kv_heads, capacity, config.d_head)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.layers = [
            LayerCache(
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
                self.lengths,
            )
            for _ in range(config.n_layers)
        ]

    def advance(self, counts: Tensor) -> None:
        """Each row has read `counts` (B,) more tokens; padding beyond a row's count is overwritten later."""
        self.lengths += counts.to(self.lengths)

    @property
    def n_bytes(self) -> int:
        return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in self.layers)
