"""What a recurrent layer keeps of the tokens already read: a state of one size, whatever the text's length.

It can't forget its last tokens, so padding must not enter it (`KVCache.limits`), and what needs a way back (speculation,
prefixes in blocks, pages) refuses such models by name.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .kv_cache import StepContext

NO_WAY_BACK = "the state of linear attention can't give up tokens that it has read"


class StateCache:
    """One recurrent layer's states, with rows on their first axis; the methods of LayerCache, for which columns are nothing."""

    def __init__(self, recent: Tensor, state: Tensor) -> None:
        self.recent = recent  # (rows, K - 1, C): the convolution's last inputs
        self.state = state  # (rows, H, Dk, Dv) float32

    def tensors(self) -> tuple[Tensor, ...]:
        """What the cache holds."""
        return self.recent, self.state

    def read(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """The first rows' recent inputs and states."""
        return self.recent[:n_rows], self.state[:n_rows]

    def write(self, seen: Tensor, state: Tensor, context: "StepContext") -> None:
        """Keep the states after this step. `seen` (B, K - 1 + T, C): the convolution's inputs, the recent ones first."""
        B, kept = state.shape[0], self.recent.shape[1]
        self.state[:B].copy_(state)
        if context.n_new is None:
            self.recent[:B].copy_(seen[:, seen.shape[1] - kept :])
        else:  # each row's last ones before its padding
            columns = context.n_new[:, None] + torch.arange(kept, device=seen.device)  # (B, K - 1)
            self.recent[:B].copy_(seen.gather(1, columns[..., None].expand(-1, -1, seen.shape[2])))

    def clear(self) -> None:
        """Forget all tokens."""
        for tensor in self.tensors():
            tensor.zero_()

    def resize(self, capacity: int, n_rows: int, end: int, drop: int) -> None:
        """Nothing: a state has no columns."""

    def align(self, row: int, length: int, end: int) -> None:
        """Nothing: padding never entered the state."""

    def insert(self, row: int, end: int, other: "StateCache", other_row: int, start: int, length: int) -> None:
        """Copy another cache's row."""
        for mine, source in zip(self.tensors(), other.tensors(), strict=True):
            mine[row] = source[other_row]

    def move(self, source: int, target: int, end: int) -> None:
        """Copy one row over another."""
        for tensor in self.tensors():
            tensor[target] = tensor[source]

    def select(self, index: Tensor, end: int) -> None:
        """Row i becomes what row index[i] was."""
        for tensor in self.tensors():
            tensor[: len(index)] = tensor[index]
