"""The named updates of one adapted layer, whatever its kind: registered, forgotten, applied to the rows of a mixed batch."""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .selection import AdapterRegistry, RowSelection


class Update(Protocol):
    """What one adapter makes of one layer; an nn.Module, whose parameters are the adapter's."""

    stacks: ClassVar[bool]  # whether a mixed batch may take several of them in one product, as pairs of A and B

    def apply_to(self, base: nn.Module, x: Tensor) -> Tensor:
        """The layer's output in place of base(x)."""
        ...


class AdaptedLayer(Protocol):
    """A layer of the model with named updates: LoRALinear, AdaptedModule, PrefixSlot."""

    base: Any  # what stands there again when the last update is gone
    registry: AdapterRegistry
    adapters: nn.Module  # the updates, registered by key
    updates: dict[str, Any]  # the same, by name
    slot: int  # its key in a RowSelection
    training: bool

    def remove(self, name: str) -> None:
        """Forget the update of that name, if there is one."""
        ...


def module_key(name: str) -> str:
    """An adapter's name as a module's: state dicts separate modules by dots."""
    return name.replace("%", "%25").replace(".", "%2E")


def put_update(layer: AdaptedLayer, name: str, update: Any) -> None:
    """Register an update under a name; an older one of that name is replaced."""
    layer.adapters._modules[module_key(name)] = update.train(layer.training)
    layer.updates = {**layer.updates, name: update}  # a new dict: other threads may be reading the old one
    layer.registry.changed()


def drop_update(layer: AdaptedLayer, name: str) -> None:
    """Forget the update of that name, if there is one."""
    layer.adapters._modules.pop(module_key(name), None)
    layer.updates = {other: update for other, update in layer.updates.items() if other != name}
    layer.registry.changed()


def by_groups(layer: AdaptedLayer, x: Tensor, rows: RowSelection) -> Tensor:
    """Row i of x (B, ...) by the update of rows.names[i]: the rows of each adapter together, then put back in order."""
    check_rows(x, rows.names)
    parts, order = [], []
    for name in dict.fromkeys(rows.names):
        own = [i for i, other in enumerate(rows.names) if other == name]
        update = layer.updates.get(name) if name is not None else None
        part = x[torch.tensor(own, device=x.device)]
        parts.append(layer.base(part) if update is None else update.apply_to(layer.base, part))
        order += own
    back = torch.tensor(order).argsort().to(x.device)
    return torch.cat(parts)[back]


def check_rows(x: Tensor, names: Sequence[str | None]) -> None:
    """Raise ValueError when a batch x (B, ...) has another number of rows than adapters were chosen for."""
    if x.shape[0] != len(names):
        raise ValueError(f"the batch has {x.shape[0]} rows, adapters were chosen for {len(names)}")
