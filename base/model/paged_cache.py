"""Keys and values in pages of 32 tokens that rows take one by one from a common pool (Kwon et al. 2023, "vLLM",
arXiv:2309.06180, section 4): no memory is set aside for tokens that may never come, and equal beginnings are one page.

    pool        page 0 (scratch) | 1 | 2 | 3 | 4 | 5 | ...
    row 0, 70 tokens   table 3 1 5          32 + 32 + 6
    row 1, 40 tokens   table 3 4            its first 32 tokens are row 0's: the page has two users

A page with several users is full and never written. Tokens that only pad a batch are written to page 0.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .rope import angle_tables

if TYPE_CHECKING:
    from .config import ModelConfig
    from .kv_cache import StepContext

PAGE = 32  # tokens; a row wastes half a page on average


class Pages(NamedTuple):
    """Where a step's tokens go and what they see, for all layers."""

    page: Tensor  # (B, T) int64, of each new token
    offset: Tensor  # (B, T) int64, within its page
    table: Tensor  # (B, n) int32: each row's pages in order, then 0
    lengths: Tensor  # (B,) int32: each row's tokens, the new ones included


class PagedLayer:
    """One attention layer's pages, (n_pages, K, PAGE, Dh) each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def write(self, k: Tensor, v: Tensor, context: "StepContext") -> None:
        """Put k, v (B, K, T, Dh) where the step's tokens go."""
        assert context.pages is not None
        page, offset = context.pages.page, context.pages.offset
        self.keys[page, :, offset] = k.transpose(1, 2)
        self.values[page, :, offset] = v.transpose(1, 2)

    def tensors(self) -> tuple[Tensor, ...]:
        """What the layer holds."""
        return self.keys, self.values


class PagePool:
    """All pages of a model and how many users each has. Page 0 belongs to nobody."""

    def __init__(self, layers: Sequence[PagedLayer]) -> None:
        first = layers[0].tensors()[0]
        self.layers, self.n_pages, self.device = list(layers), first.shape[0], first.device
        self.page_bytes = sum(t[0].numel() * t.element_size() for layer in layers for t in layer.tensors())
        self.users = [0] * self.n_pages
        self._free = list(range(self.n_pages - 1, 0, -1))
        self.reclaim: Callable[[], bool] = lambda: False  # gives up something that was only kept; False: nothing is

    @property
    def n_free(self) -> int:
        """Pages without a user."""
        return len(self._free)

    def has(self, n: int) -> bool:
        """Whether n pages are free, or become so when what is only kept is given up."""
        while len(self._free) < n:
            if not self.reclaim():
                return False
        return True

    def take(self) -> int:
        """A free page, now with one user. Raises ValueError when there is none."""
        if not self.has(1):
            raise ValueError(f"all {self.n_pages - 1} pages of the key-value cache are in use; give it more memory")
        page = self._free.pop()
        self.users[page] = 1
        return page

    def share(self, page: int) -> int:
        """One more user."""
        self.users[page] += 1
        return page

    def release(self, page: int) -> None:
        """One user less."""
        self.users[page] -= 1
        if self.users[page] == 0:
            self._free.append(page)

    def copy(self, page: int) -> int:
        """A new page with the same contents."""
        new = self.take()
        for layer in self.layers:
            for tensor in layer.tensors():
                tensor[new] = tensor[page]
        return new


def n_pages(n_tokens: int) -> int:
    """Pages that so many tokens need."""
    return -(-n_tokens // PAGE)


class PagedKVCache:
    """Some rows over a pool: the same methods as KVCache, so that the model and the engine use either.

    `limits`: the tokens that row i will hold at most; what is read beyond them is padding. None: no padding.
    """

    def __init__(self, config: "ModelConfig", pool: PagePool, n_rows: int) -> None:
        self.config, self.pool, self.layers = config, pool, pool.layers
        self.tables: list[list[int]] = [[] for _ in range(n_rows)]
        self.lengths = [0] * n_rows
        self.limits: list[int] | None = None
        positions = torch.arange(config.max_seq_len + PAGE, device=pool.device)[None]
        self._angles = {name: table[0] for name, table in angle_tables(config, positions).items()}  # (n, Dh/2)

    @property
    def n_rows(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def n_bytes(self) -> int:
        """Memory of the pages that these rows use; shared ones count once."""
        return len({page for table in self.tables for page in table}) * self.pool.page_bytes

    def n_missing(self, T: int) -> int:
        """Pages that T more tokens in every row would take, padding aside."""
        limits = self.limits or [length + T for length in self.lengths]
        return sum(
            max(0, n_pages(min(length + T, limit)) - len(table))
            for table, length, limit in zip(self.tables, self.lengths, limits, strict=True)
        )

    def begin(self, n_rows: int, T: int) -> "StepContext":
        """Pages for T more tokens a row, and what the layers need. Raises ValueError for another row count, and when the
        pool has no page left."""
        from .kv_cache import StepContext

        if n_rows != self.n_rows:
            raise ValueError(f"the cache holds {self.n_rows} rows, ids have {n_rows}; give one row of ids for each")
        limits = self.limits or [length + T for length in self.lengths]
        for table, length, limit in zip(self.tables, self.lengths, limits, strict=True):
            while len(table) < n_pages(min(length + T, limit)):
                table.append(self.pool.take())
        width = n_pages(max(self.lengths) + T)
        rows = torch.tensor([table + [0] * (width - len(table)) for table in self.tables], dtype=torch.int32)
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        positions = lengths[:, None] + torch.arange(T)  # (B, T)
        page = rows.gather(1, positions // PAGE).long()
        page[positions >= torch.tensor(limits)[:, None]] = 0
        device = self.pool.device
        where = positions.clamp(max=self._angles["cos"].shape[0] - 1).to(device)
        pages = Pages(page.to(device), (positions % PAGE).to(device), rows.to(device), (lengths + T).int().to(device))
        angles = {name: table[where] for name, table in self._angles.items()}
        return StepContext(**angles, start=max(self.lengths), pages=pages)

    def advance(self, T: int) -> None:
        """Each row has read T more tokens, padding aside."""
        limits = self.limits or [length + T for length in self.lengths]
        self.lengths = [min(n + T, limit) for n, limit in zip(self.lengths, limits, strict=True)]

    def clear(self, n_rows: int) -> None:
        """Give back all pages; the cache then holds `n_rows` empty rows."""
        self.truncate([0] * self.n_rows)
        self.tables, self.lengths = [[] for _ in range(n_rows)], [0] * n_rows

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep each row's first lengths[i] tokens."""
        for table, length in zip(self.tables, lengths, strict=True):
            while len(table) > n_pages(length):
                self.pool.release(table.pop())
        self.lengths = list(lengths)

    def append_rows(
        self,
        other: "PagedKVCache",
        lengths: Sequence[int],
        starts: Sequence[int] | None = None,
        *,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Take over lengths[i] tokens of row rows[i] (None: of row i) of another cache of the same pool, which is empty
        afterwards. A row that is taken twice is shared but for its last page. `starts` is KVCache's."""
        del starts
        rows = range(len(lengths)) if rows is None else rows
        taken: set[int] = set()
        for row, length in zip(rows, lengths, strict=True):
            source = other.tables[row][: n_pages(length)]
            if row in taken:
                whole = length // PAGE
                table = [self.pool.share(page) for page in source[:whole]]
                table += [self.pool.copy(page) for page in source[whole:]]
            else:
                table = [self.pool.share(page) for page in source]
            taken.add(row)
            self.tables.append(table)
            self.lengths.append(length)
        other.clear(0)

    def remove_row(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        for page in self.tables[row]:
            self.pool.release(page)
        self.tables[row], self.lengths[row] = self.tables[-1], self.lengths[-1]
        self.tables.pop()
        self.lengths.pop()

    # --- what the prefix cache keeps: whole pages ---

    def keep_block(self, row: int, start: int) -> int:
        """The page of the PAGE tokens from `start`, with one more user."""
        return self.pool.share(self.tables[row][start // PAGE])

    def drop_block(self, block: int) -> None:
        """The prefix cache keeps it no longer."""
        self.pool.release(block)

    def restore(self, rows: Sequence[Sequence[int]]) -> None:
        """Make the empty row i begin with the given pages."""
        self.tables = [[self.pool.share(page) for page in pages] for pages in rows]
        self.lengths = [len(pages) * PAGE for pages in rows]

    @property
    def block_bytes(self) -> int:
        """Memory of a page."""
        return self.pool.page_bytes
