"""What latent attention keeps of a token, in rows and in pages: its latent and its rope key side by side, R + Dr values."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kv_cache import LayerCache
from .paged_cache import PagedLayer

if TYPE_CHECKING:
    from .kv_cache import StepContext


class LatentCache(LayerCache):
    """One layer's entries in rows, (rows, 1, capacity, R + Dr)."""

    def __init__(self, entries: Tensor) -> None:
        self.entries = entries

    def write_entries(self, entries: Tensor, context: "StepContext") -> None:
        """Put entries (B, 1, T, R + Dr) into the step's columns."""
        self.entries[: entries.shape[0], :, context.start : context.stop].copy_(entries)

    def read_entries(
        self, n_rows: int, T: int, context: "StepContext", window: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """All entries up to the step's last column, (B, 1, S, R + Dr), and their mask; see LayerCache.read."""
        del T
        first, mask = self.seen(context, window)
        return self.entries[:n_rows, :, first : context.stop], mask

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.entries,)

    def replace(self, tensors: list[Tensor]) -> None:
        (self.entries,) = tensors


class PagedLatent(PagedLayer):
    """One layer's pages of entries, (n_pages, 1, PAGE, R + Dr)."""

    def __init__(self, entries: Tensor) -> None:
        self.entries = entries

    def write_entries(self, entries: Tensor, context: "StepContext") -> None:
        """Put entries (B, 1, T, R + Dr) where the step's tokens go."""
        assert context.pages is not None
        self.entries[context.pages.page, :, context.pages.offset] = entries.transpose(1, 2)

    def read_entries(
        self, n_rows: int, T: int, context: "StepContext", window: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """The rows' pages side by side (a copy), (B, 1, S, R + Dr), and what hides what lies past a row's end or window."""
        assert context.pages is not None
        table, lengths = context.pages.table, context.pages.lengths
        read = self.entries.index_select(0, table.reshape(-1).long()).view(n_rows, 1, -1, self.entries.shape[3])
        column = torch.arange(read.shape[2], device=read.device)  # (S,)
        last = lengths.long()[:, None, None] - T + torch.arange(T, device=read.device)[:, None]  # (B, T, 1)
        seen = column <= last
        if window is not None:
            seen &= column > last - window
        mask = torch.zeros(n_rows, 1, T, len(column), dtype=read.dtype, device=read.device)
        return read, mask.masked_fill_(~seen[:, None], -torch.inf)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.entries,)
