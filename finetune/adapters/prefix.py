"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190, section 4.1): learned keys and values before each layer's own.

Every token sees them. In PEFT they are P tokens at the start of the cache whose keys are not rotated, and the real tokens have
the positions P, P + 1, ... Scores depend on differences of positions alone, so here the tokens keep the positions 0, 1, ... and the
learned keys are turned to position -P.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.model.config import ModelConfig
from ...base.model.rope import inverse_frequencies
from ...kernels.rope import rope
from .named import drop_update, put_update
from .selection import AdapterRegistry, RowSelection

SLOT = "prefix"  # the name of a PrefixSlot in its attention


class PrefixKeys(nn.Module):
    """One adapter's keys and values in one layer."""

    stacks: ClassVar[bool] = False

    def __init__(self, keys: Tensor, values: Tensor, config: ModelConfig, *, rotates: bool, trained: bool) -> None:
        super().__init__()
        self.ROLES = {"keys": "adapter", "values": "adapter"}
        self.keys = nn.Parameter(keys, requires_grad=trained)  # (P, K, Dh), not rotated
        self.values = nn.Parameter(values, requires_grad=trained)  # (P, K, Dh)
        self.config, self.rotates = config, rotates  # rotates: whether the layer's keys have positions at all

    def turned(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys at position -P and values, (1, K, P, Dh)."""
        keys, values = (t.transpose(0, 1)[None] for t in (self.keys, self.values))
        if self.rotates:  # without YaRN's factor, which PEFT's keys lack too
            n = keys.shape[2]
            angles = (-n * inverse_frequencies(self.config, keys.device)).expand(1, n, -1)  # (1, P, Dh/2)
            keys, _ = rope(keys.float(), keys.float(), angles.cos().contiguous(), angles.sin().contiguous())
        return keys.to(dtype), values.to(dtype)


class PrefixSlot(nn.Module):
    """What stands before one attention's keys: nothing, one adapter's prefix, or one for each row of the batch."""

    base = None  # where no prefix is left, the attention has no slot

    def __init__(self, registry: AdapterRegistry, config: ModelConfig) -> None:
        super().__init__()
        self.registry, self.config = registry, config
        self.adapters = nn.Module()
        self.updates: dict[str, PrefixKeys] = {}
        self.slot = registry.add_layer(self)

    def add_update(self, name: str, update: PrefixKeys) -> None:
        """Register a prefix under a name; an older one of that name is replaced."""
        put_update(self, name, update)

    def remove(self, name: str) -> None:
        """Forget the prefix of that name, if there is one."""
        drop_update(self, name)

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys and values (B or 1, K, P, Dh) and what hides some from a row, (B, 1, 1, P) of 0 and -inf, or None."""
        choice = self.registry.choice()
        if isinstance(choice, RowSelection):
            return self._by_row(choice, dtype)
        update = self.updates.get(choice) if isinstance(choice, str) else None
        return None if update is None else (*update.turned(dtype), None)

    def _by_row(self, rows: RowSelection, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Each row's prefix, padded at its left end to the longest one."""
        turned = {name: self.updates[name].turned(dtype) for name in {*rows.names} if name in self.updates}
        if not turned:
            return None
        longest = max(keys.shape[2] for keys, _ in turned.values())
        device = next(iter(turned.values()))[0].device
        keys, values = [], []
        hidden = torch.zeros(len(rows.names), 1, 1, longest, dtype=dtype, device=device)
        nothing = torch.zeros(1, self.config.n_kv_heads, 0, self.config.d_head, dtype=dtype, device=device)
        for row, name in enumerate(rows.names):
            k, v = turned.get(name, (nothing, nothing))  # pyright: ignore[reportArgumentType, reportCallIssue]
            n_padded = longest - k.shape[2]
            keys.append(F.pad(k, (0, 0, n_padded, 0)))
            values.append(F.pad(v, (0, 0, n_padded, 0)))
            hidden[row, ..., :n_padded] = -torch.inf
        return torch.cat(keys), torch.cat(values), hidden

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PrefixSlot":
        """As nn.Module's; row selections made before are out of date."""
        super()._apply(fn, recurse)
        self.registry.changed()
        return self


def split_embeddings(embeddings: Tensor, config: ModelConfig) -> list[tuple[Tensor, Tensor]]:
    """PEFT's prompt_embeddings (P, n_layers * 2 * K * Dh) -> each layer's keys and values (P, K, Dh)."""
    parts = embeddings.view(-1, config.n_layers * 2, config.n_kv_heads, config.d_head)
    return [(parts[:, 2 * i].contiguous(), parts[:, 2 * i + 1].contiguous()) for i in range(config.n_layers)]


def joined_embeddings(layers: list[PrefixKeys]) -> Tensor:
    """The reverse of split_embeddings: (P, n_layers * 2 * K * Dh)."""
    return torch.stack([t for layer in layers for t in (layer.keys, layer.values)], dim=1).flatten(1)
