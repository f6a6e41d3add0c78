"""Keys and values of prompts read before, so that a prompt that begins alike is read from where it differs.

Prompts are cut into blocks of `BLOCK` tokens. A block is found by its own tokens and the block before it, the first one by
the adapter's weights (a hash of their content, never a name): two adapters share nothing, and an adapter that was replaced
under its name meets no block of the old one. Tokens are compared as they are, so no two prompts can be confused.

    adapter's weights -> block 0 (32 tokens) -> block 1 -> block 2
                                            \\-> block 1'            another prompt with the same first 32 tokens

The least recently used blocks go when the budget is full; a block is always used together with those before it and is
touched before them, so a chain loses its end first.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from ..model.kv_cache import KVCache
from ..model.paged_cache import PAGE, PagedKVCache

BLOCK = PAGE  # tokens; smaller blocks waste less of a shared prefix and cost more copies

Key = tuple[int | str, tuple[int, ...]]


@dataclass(eq=False)
class Block:
    """The keys and values of BLOCK tokens in all layers."""

    serial: int  # names this block as the parent of others; never used again
    values: Any  # what the cache's keep_block gave: a copy, or a page's number
    n_bytes: int
    drop: Callable[[Any], None]  # the cache's drop_block


class PrefixCache:
    """Blocks under a byte budget, the least recently used going first. For one model: give it to one Engine."""

    def __init__(self, max_bytes: int) -> None:
        if type(max_bytes) is not int or max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} must be >= 1, a whole number of bytes")
        self.max_bytes, self.n_bytes = max_bytes, 0
        self.n_hit_tokens = self.n_prompt_tokens = 0  # of all prompts so far: found here, and in all
        self._blocks: OrderedDict[Key, Block] = OrderedDict()  # the most recently used last
        self._serials = count()

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, content: str, ids: Sequence[int]) -> list[Block]:
        """The blocks that the prompt begins with, in order. At least one token is left over, to give logits."""
        keys, found = [], []
        parent: int | str = content
        for start in range(0, (len(ids) - 1) // BLOCK * BLOCK, BLOCK):
            key = (parent, tuple(ids[start : start + BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                break
            keys.append(key)
            found.append(block)
            parent = block.serial
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        return found

    def missing(self, content: str, ids: Sequence[int], found: Sequence[Block]) -> Key | None:
        """The first block after the found ones, which reading the prompt will bring in; None when there is no whole one."""
        start = len(found) * BLOCK
        if start + BLOCK > len(ids):
            return None
        return (found[-1].serial if found else content, tuple(ids[start : start + BLOCK]))

    def store(self, cache: KVCache | PagedKVCache, row: int, content: str, ids: Sequence[int]) -> None:
        """Keep the whole blocks of `ids`, which row `row` of the cache holds as its first tokens: copies of them from a
        KVCache, the pages themselves from a PagedKVCache."""
        parent: int | str = content
        keys: list[Key] = []
        for start in range(0, len(ids) // BLOCK * BLOCK, BLOCK):
            key = (parent, tuple(ids[start : start + BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                if (len(keys) + 1) * cache.block_bytes > self.max_bytes:
                    break  # the chain alone would be more than the budget
                block = Block(next(self._serials), cache.keep_block(row, start), cache.block_bytes, cache.drop_block)
                self._blocks[key] = block
                self.n_bytes += block.n_bytes
            keys.append(key)
            parent = block.serial
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        while self.n_bytes > self.max_bytes:
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Forget the least recently used block; False when there is none."""
        if not self._blocks:
            return False
        _, gone = self._blocks.popitem(last=False)
        self.n_bytes -= gone.n_bytes
        gone.drop(gone.values)
        return True

    def clear(self) -> None:
        """Forget everything; needed when the base's own weights change."""
        while self.drop_oldest():
            pass
