"""Keys and values of the tokens already read, so that each new token costs one row of attention.

Rows are aligned at their right end: every live row's newest token lies in the same column, so a decoding step writes one
slice and reads one slice, whatever the rows' lengths. Row b's tokens lie in the columns [end - lengths[b], end); what lies
before them is hidden by a mask, which exists only while lengths differ:

                 column  0 1 2 3 4 5 | 6            end = 6; the next step writes column 6 of every row
    row 0, length 6      a b c d e f |
    row 1, length 3      . . . g h i |              "." is masked
    row 2, length 1      . . . . . j |

Lengths are kept on the host: no step asks the device anything. Live rows are the first `n_rows`; a row that ends gives its
place to the last one, so finished rows cost nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig
from .paged_cache import PAGE, Pages
from .rope import angle_tables
from .router_losses import RouterLosses
from .state_cache import NO_WAY_BACK, StateCache


class StepContext(NamedTuple):
    """What all layers share in one call of the model, computed once."""

    cos: Tensor  # (B or 1, T, Dh/2) float32, of the new tokens' positions
    sin: Tensor
    cu_seqlens: Tensor | None = None  # (n_docs + 1,) int32 with B = 1: documents packed in one row
    start: int = 0  # with a cache: the first column that the new tokens take
    stop: int = 0  # one past the last
    masks: Mapping[int | None, Tensor | None] | None = (
        None  # by window: (B or 1, 1, T, stop) of 0 and -inf; None: no mask
    )
    pages: Pages | None = None  # of a PagedKVCache, in place of `stop` and `masks`
    router_losses: RouterLosses | None = None  # in training: each mixture of experts adds its () float32
    n_new: Tensor | None = None  # (B,) int64: each row's new tokens that are no padding; None: all are none
    local_cos: Tensor | None = None  # the angles of layers with a base of their own, in the shapes of cos and sin
    local_sin: Tensor | None = None
    positions: Tensor | None = None  # (B or 1, T) int64, where they are added to the embeddings
    attend: Callable[..., Tensor] | None = None  # in place of kernels.attention, where ranks share the rows

    def angles(self, *, local: bool) -> tuple[Tensor, Tensor]:
        """cos and sin of a layer that rotates; `local`: its spec's local_rope."""
        if local:
            assert self.local_cos is not None
            assert self.local_sin is not None
            return self.local_cos, self.local_sin
        return self.cos, self.sin

    @property
    def unturned(self) -> tuple[Tensor, Tensor]:
        """cos and sin of no rotation, in the shapes of the step's own."""
        return torch.ones_like(self.cos), torch.zeros_like(self.sin)


class LayerCache:
    """One attention layer's keys and values, (rows, K, capacity, Dh) each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def write(self, k: Tensor, v: Tensor, context: StepContext) -> None:
        """Put k, v (B, K, T, Dh) into the step's columns."""
        B = k.shape[0]
        self.keys[:B, :, context.start : context.stop].copy_(k)
        self.values[:B, :, context.start : context.stop].copy_(v)

    def read(self, n_rows: int, context: StepContext, window: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """All keys and values up to the step's last column, and the mask of that window (None: all is seen)."""
        first, mask = self.seen(context, window)
        return self.keys[:n_rows, :, first : context.stop], self.values[:n_rows, :, first : context.stop], mask

    @staticmethod
    def seen(context: StepContext, window: int | None) -> tuple[int, Tensor | None]:
        """The first column that a step's queries see, and the mask of those from there on."""
        mask = context.masks[window] if context.masks else None
        if window is not None and mask is None:  # one query a row and equal lengths: the window is a slice
            return max(0, context.stop - window), None
        return 0, mask

    def tensors(self) -> tuple[Tensor, ...]:
        """What the cache holds, each with rows on its first axis and columns on its third."""
        return self.keys, self.values

    def replace(self, tensors: list[Tensor]) -> None:
        """Hold others in place of `tensors()`, in its order."""
        self.keys, self.values = tensors

    def resize(self, capacity: int, n_rows: int, end: int, drop: int) -> None:
        """Move to new memory of `capacity` columns, without the first `drop` (negative: with that many empty ones before)."""
        moved = []
        for old in self.tensors():
            new = old.new_zeros(old.shape[0], old.shape[1], capacity, old.shape[3])
            source, target = max(0, drop), max(0, -drop)
            new[:n_rows, :, target : target + end - source] = old[:n_rows, :, source:end]
            moved.append(new)
        self.replace(moved)

    def insert(self, row: int, end: int, other: "LayerCache", other_row: int, start: int, length: int) -> None:
        """Copy `length` columns of another cache's row, from its column `start`, so that they end at column `end` here."""
        for mine, source in zip(self.tensors(), other.tensors(), strict=True):
            mine[row, :, end - length : end] = source[other_row, :, start : start + length]

    def align(self, row: int, length: int, end: int) -> None:
        """Move a row's first `length` columns so that they end at column `end`."""
        for tensor in self.tensors():
            tensor[row, :, end - length : end] = tensor[row, :, :length].clone()

    def move(self, source: int, target: int, end: int) -> None:
        """Copy one row over another."""
        for tensor in self.tensors():
            tensor[target, :, :end] = tensor[source, :, :end]

    def select(self, index: Tensor, end: int) -> None:
        """Row i becomes what row index[i] was."""
        for tensor in self.tensors():
            tensor[: len(index), :, :end] = tensor[index, :, :end]


class KVCache:
    """The layers' caches and the rows' lengths. Made by `Transformer.new_cache`.

    `limits`: row i's tokens are padding from limits[i] on; None: no padding. Recurrent layers have to know, since a state can't
    give up what it has read: a row that is then taken with fewer tokens than were read is refused without it.
    """

    def __init__(
        self, config: ModelConfig, layers: "Sequence[LayerCache | StateCache]", n_rows: int, capacity: int
    ) -> None:
        self.config = config
        self.layers: list[Any] = list(layers)
        self.states = [layer for layer in self.layers if isinstance(layer, StateCache)]
        self.limits: list[int] | None = None
        self.windows = {config.layer(i).window for i in range(config.n_layers)}
        self.max_rows, self.capacity = n_rows, capacity
        self.lengths = [0] * n_rows  # of the live rows, on the host
        self.end = 0  # columns in use
        first = self.layers[0].tensors()[0]
        self.device = first.device
        self._positions: Tensor | None = None  # (B, 1) int64, of the next token; None while all lengths are equal
        self._padding: Tensor | None = None  # (B, 1, 1, capacity), -inf on the columns before each row's first token
        self._dtype = first.dtype
        self._make_angles(capacity)

    def _make_angles(self, n_positions: int) -> None:
        """Angles of every position up to `n_positions`, (1, n, Dh/2) each: a step slices or gathers from them."""
        positions = torch.arange(n_positions, device=self.device)[None]
        self.angles = angle_tables(self.config, positions)

    @property
    def n_rows(self) -> int:
        """Live rows."""
        return len(self.lengths)

    @property
    def n_bytes(self) -> int:
        """Memory of keys and values, free columns included."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors())

    def clear(self, n_rows: int | None = None) -> None:
        """Forget all tokens; the cache then holds `n_rows` empty rows."""
        self.lengths, self.end = [0] * (self.max_rows if n_rows is None else n_rows), 0
        self.limits = None
        for layer in self.states:
            layer.clear()
        self._lengths_changed()

    def begin(self, n_rows: int, T: int) -> StepContext:
        """Make room for T more tokens a row and return what the layers need. Raises ValueError for another row count."""
        if n_rows != self.n_rows:
            raise ValueError(f"the cache holds {self.n_rows} rows, ids have {n_rows}; give one row of ids for each")
        if self.end + T > self.capacity:
            self.reserve(self.end + T)
        start, stop = self.end, self.end + T
        if self._positions is None:
            first = self.lengths[0]
            angles = {name: table[:, first : first + T] for name, table in self.angles.items()}
        else:
            positions = self._positions if T == 1 else self._positions + torch.arange(T, device=self.device)
            angles = {name: table[0][positions] for name, table in self.angles.items()}  # (B, T, Dh/2)
        masks = {window: self._mask(T, start, stop, window) for window in self.windows}
        return StepContext(**angles, start=start, stop=stop, masks=masks, n_new=self._n_new(T))

    def _n_new(self, T: int) -> Tensor | None:
        """See StepContext; None where no layer asks."""
        if not self.states or self.limits is None:
            return None
        n_new = [min(max(limit - n, 0), T) for limit, n in zip(self.limits, self.lengths, strict=True)]
        return torch.tensor(n_new, device=self.device)

    def _mask(self, T: int, start: int, stop: int, window: int | None) -> Tensor | None:
        """(B or 1, 1, T, stop): 0 where a new token sees a column, -inf where not. None where no mask is needed."""
        padding = self._padding
        if T == 1 and (window is None or padding is None):
            return None if padding is None else padding[..., :stop]
        if start == 0 and padding is None:
            return None  # plain causal attention; LayerCache.read hands the new keys back alone
        columns = torch.arange(stop, device=self.device)
        last = torch.arange(start, stop, device=self.device)[:, None]  # each new token's own column
        hidden = columns > last
        if window is not None:
            hidden |= columns <= last - window
        mask = torch.zeros(T, stop, dtype=self._dtype, device=self.device).masked_fill_(hidden, -torch.inf)[None, None]
        return mask if padding is None else torch.minimum(mask, padding[..., :stop])

    def advance(self, T: int) -> None:
        """Each live row has read T more tokens."""
        self.lengths = [length + T for length in self.lengths]
        self.end += T
        if self._positions is not None:
            self._positions += T

    def reserve(self, columns: int) -> None:
        """Room for `columns` columns: first by dropping columns that no row uses, then by twice the memory."""
        unused = self.end - max(self.lengths, default=0)
        columns -= unused
        capacity = self.capacity if columns <= self.capacity else max(columns, 2 * self.capacity)
        for layer in self.layers:
            layer.resize(capacity, self.n_rows, self.end, unused)
        self.end -= unused
        if capacity > self.capacity:
            self.capacity = capacity
            self._make_angles(capacity)
        self._lengths_changed()

    def align(self, lengths: Sequence[int]) -> None:
        """Every row was just read from column 0, padded on the right; keep its first lengths[i] tokens, at the right end."""
        self._check_states([*enumerate(lengths)])
        self.limits = None
        for row, length in enumerate(lengths):
            if length < self.end:
                for layer in self.layers:
                    layer.align(row, length, self.end)
        self.lengths = list(lengths)
        self._lengths_changed()

    def _check_states(self, taken: Sequence[tuple[int, int]]) -> None:
        """Raise ValueError where a state has read more of a row than the tokens (row, length) that are taken of it."""
        for row, length in taken if self.states else ():
            n_read = self.lengths[row] if self.limits is None else min(self.lengths[row], self.limits[row])
            if length != n_read:
                raise ValueError(f"{length} of the {n_read} tokens of row {row} are wanted, but {NO_WAY_BACK}")

    # --- what the prefix cache keeps: copies of blocks of tokens ---

    def keep_block(self, row: int, start: int) -> Tensor:
        """(n,): the keys and values of a row's PAGE tokens from `start`: every layer's (K, PAGE, Dh) tensors in turn."""
        column = self.end - self.lengths[row] + start
        here = slice(column, column + PAGE)
        return torch.cat([t[row, :, here].reshape(-1) for layer in self.layers for t in layer.tensors()])

    def drop_block(self, block: Tensor) -> None:
        """The prefix cache keeps it no longer."""

    def restore(self, rows: Sequence[Sequence[Tensor]]) -> None:
        """Make row i hold the given blocks. Equal neighbours are written at once."""
        lengths = [len(blocks) * PAGE for blocks in rows]
        end, first = max(lengths), 0
        while first < len(rows):
            last = first + 1
            while last < len(rows) and [*map(id, rows[last])] == [*map(id, rows[first])]:
                last += 1
            if rows[first]:
                stacked, offset = torch.stack(list(rows[first])), 0  # (n_blocks, n)
                for layer in self.layers:
                    for tensor in layer.tensors():
                        _, K, _, Dh = tensor.shape
                        piece = stacked[:, offset : offset + K * PAGE * Dh].view(-1, K, PAGE, Dh)
                        offset += K * PAGE * Dh
                        tensor[first:last, :, end - lengths[first] : end] = piece.transpose(0, 1).flatten(1, 2)
            first = last
        self.lengths, self.end = lengths, end
        self._lengths_changed()

    @property
    def block_bytes(self) -> int:
        """Memory of a block's copy."""
        tensors = [t for layer in self.layers for t in layer.tensors()]
        return sum(t.shape[1] * PAGE * t.shape[3] * t.element_size() for t in tensors)

    def append_rows(
        self,
        other: "KVCache",
        lengths: Sequence[int],
        starts: Sequence[int] | None = None,
        *,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Take rows of another cache, whose prompts were padded on the right: lengths[i] tokens of its row rows[i] (None: of
        row i), from column starts[i] (None: 0). Raises ValueError when there is no place for them."""
        if self.n_rows + len(lengths) > self.max_rows:
            raise ValueError(f"{len(lengths)} more rows than the {self.max_rows} of the cache; remove some first")
        other._check_states([(rows[i] if rows else i, length) for i, length in enumerate(lengths)])
        longest = max(lengths)
        if not self.lengths:
            self.end = 0
        if longest > self.end:  # move the live rows to the right
            ahead = longest - self.end
            capacity = max(self.capacity, longest)
            if self.lengths:
                for layer in self.layers:
                    layer.resize(capacity, self.n_rows, self.end, -ahead)
            elif capacity > self.capacity:
                for layer in self.layers:
                    layer.resize(capacity, 0, 0, 0)
            self.end = longest
            if capacity > self.capacity:
                self.capacity = capacity
                self._make_angles(capacity)
        for i, length in enumerate(lengths):
            for mine, source in zip(self.layers, other.layers, strict=True):
                row, start = rows[i] if rows else i, starts[i] if starts else 0
                mine.insert(len(self.lengths), self.end, source, row, start, length)
            self.lengths.append(length)
        self._lengths_changed()

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep each row's first lengths[i] tokens: what speculation wrote and the model did not confirm is forgotten.

        Rows stay aligned at their right end, so those that lose more than another move right: one copy of such a row.
        """
        self._check_states([*enumerate(lengths)])
        starts = [self.end - length for length in self.lengths]
        end = max(start + length for start, length in zip(starts, lengths, strict=True))
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if start + length < end and length:
                for layer in self.layers:
                    for tensor in layer.tensors():
                        tensor[row, :, end - length : end] = tensor[row, :, start : start + length].clone()
        self.lengths, self.end = list(lengths), end
        self._lengths_changed()

    def remove_row(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = self.n_rows - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row, self.end)
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self._lengths_changed()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was; a row may come several times, or go. Raises ValueError for too many rows."""
        if len(rows) > self.max_rows:
            raise ValueError(f"{len(rows)} rows are more than the {self.max_rows} of the cache")
        if list(rows) == list(range(self.n_rows)):
            return
        index = torch.tensor(rows, device=self.device)
        for layer in self.layers:
            layer.select(index, self.end)
        self.lengths = [self.lengths[row] for row in rows]
        self._lengths_changed()

    def _lengths_changed(self) -> None:
        """Write the mask and the positions anew; needed only when rows come or go."""
        if len(set(self.lengths)) <= 1 and (not self.lengths or self.lengths[0] == self.end):
            self._positions = self._padding = None
            return
        starts = torch.tensor([self.end - length for length in self.lengths])[:, None]  # (B, 1)
        hidden = torch.arange(self.capacity) < starts  # (B, capacity)
        padding = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -torch.inf)
        self._padding = padding[:, None, None].to(self.device)
        self._positions = torch.tensor(self.lengths)[:, None].to(self.device)
