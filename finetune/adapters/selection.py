"""Which adapters act: chosen for the calls that one thread makes inside a `with` block, else the model's default.

A choice is None (the bare base), one adapter's name, or a `RowSelection`: a name for each row of the batch. It is kept in a
`threading.local` and not in a `ContextVar`, because torch.compile (2.13) traces and guards the former and breaks its graph
at the latter. With gradient checkpointing a layer runs again in the backward pass, where it asks again: keep the backward
pass inside the block, or train the default adapter.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .lora import LoRALinear
    from .low_rank import LowRank
    from .named import AdaptedLayer

# Sum of ranks, by row of the batch, up to which its adapters are applied by plain products. One layer's linears in
# bench/lora.py's sizes, 8 adapters of rank 16, by products / gathered by row over the base alone: 8 rows 3.7 / 2.1 of its
# time, 16 rows 1.7 / 2.0, 32 rows 1.0 / 2.0 (a loaded machine).
MOST_TOGETHER = 8

Choice = Union[str, "RowSelection", "LayerForward", None]


class LayerForward(Protocol):
    """A choice that computes the adapted linears' outputs itself, such as many adapters in training (stacked.py)."""

    def forward(self, layer: "LoRALinear", x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        ...


class Link(NamedTuple):
    """One open block: which model, what it chose, and the block around it."""

    registry: "AdapterRegistry"
    choice: Choice
    outer: "Link | None"


class Thread(threading.local):
    """This thread's innermost open block."""

    link: Link | None = None


_THREAD = Thread()
_LOCK = threading.Lock()  # for the counts of users


class AdapterRegistry:
    """What the adapted linears of one model share: the default choice, and how many users each adapter has."""

    def __init__(self) -> None:
        self.default: str | None = None  # acts in every thread that has no block of its own
        self.layers: dict[int, AdaptedLayer] = {}  # slot -> layer
        self.users: dict[str, int] = {}
        self.version = 0  # changes when an adapter is added, replaced, removed or moved
        self._n_slots = 0

    def choice(self) -> Choice:
        """What acts in this thread now."""
        link = _THREAD.link
        while link is not None:
            if link.registry is self:
                return link.choice
            link = link.outer
        return self.default

    def add_layer(self, layer: "AdaptedLayer") -> int:
        """Take in a layer; returns the slot under which row selections know it."""
        slot, self._n_slots = self._n_slots, self._n_slots + 1
        self.layers[slot] = layer
        return slot

    def changed(self) -> None:
        """Row selections made before are out of date."""
        self.version += 1

    def check_names(self, names: Sequence[str | None]) -> None:
        """Raise ValueError for a name that no adapter has."""
        known = {name: None for layer in list(self.layers.values()) for name in layer.updates}
        for name in names:
            if name is not None and name not in known:
                raise ValueError(f"no adapter {name!r} is loaded; loaded are: {', '.join(known) or 'none'}")

    def hold(self, name: str) -> None:
        """Count one more user of an adapter: until `release` it can't be removed or replaced."""
        with _LOCK:
            self.users[name] = self.users.get(name, 0) + 1

    def release(self, name: str) -> None:
        """Count one user less."""
        with _LOCK:
            self.users[name] = self.users.get(name, 0) - 1
            if self.users[name] <= 0:
                del self.users[name]

    def refuse_if_used(self, name: str, what: str) -> None:
        """Raise ValueError while the adapter has users."""
        if n := self.users.get(name, 0):
            raise ValueError(
                f"adapter {name!r} can't be {what}: it has {n} user{'s' if n > 1 else ''} (open selections or running "
                "requests); end them first"
            )


class LayerRows(NamedTuple):
    """What one linear needs for a batch's rows: matrices on the CPU, names and an index on a GPU.

    On the CPU, few adapters lie one below the other and a mask keeps to each row what is its own (`mask` is given): two
    plain products that read each adapter once. Many are gathered by row for two batched products, whose time does not grow
    with their number. An update that is more than a pair of A and B acts on its adapter's rows apart (`names` alone is given).
    """

    lora_a: Tensor | None  # (sum of ranks, in); or (B, in, R), ranks padded, zero for a row without an adapter
    lora_b: Tensor | None  # (sum of ranks, out), times scale; or (B, R, out)
    mask: Tensor | None  # (B, sum of ranks) of 0 and 1
    names: tuple[str, ...]  # the adapters in use
    row_index: Tensor | None  # (B,) each row's place in names, -1 for none


class RowSelection:
    """An adapter for each row of the batch, stacked once: `with selection:` around each model call.

    Keep it while the rows stay the same: the work is in making it. It counts as a user of its adapters until `close()`, or
    until nothing refers to it any more. Several threads may enter it. Raises ValueError for a name that the model hasn't.
    """

    def __init__(self, registry: AdapterRegistry, names: Sequence[str | None]) -> None:
        self.names, self.registry = tuple(names), registry
        registry.check_names(self.names)
        self._held = sorted({name for name in self.names if name is not None})
        for name in self._held:
            registry.hold(name)
        self._mixed = len(set(self.names)) > 1  # a reference to itself would keep it alive until the next collection
        self.layers: dict[int, LayerRows] = {}
        self._trained: list[Tensor] = []
        self._made_for: tuple[int, int] | None = None
        self._refresh()

    @property
    def trained(self) -> bool:
        """Whether one of the adapters is being trained."""
        return bool(self._trained)

    def _refresh(self) -> None:
        """Stack the rows' matrices, again where they may have changed: after a load, a move, or an optimizer's step."""
        if not self._mixed or self._made_for == self._state():
            return
        layers: dict[int, LayerRows] = {}
        trained: dict[Tensor, None] = {}
        with torch.inference_mode(False), torch.no_grad():
            for slot, layer in list(self.registry.layers.items()):
                updates = [layer.updates.get(name) if name is not None else None for name in self.names]
                present = {update: None for update in updates if update is not None}
                trained |= {t: None for update in present for t in update.parameters() if t.requires_grad}
                if present:
                    layers[slot] = self._rows_of(layer, updates)
        self.layers, self._trained = layers, list(trained)
        self._made_for = self._state()

    def _rows_of(self, layer: "AdaptedLayer", updates: "Sequence[LowRank | None]") -> LayerRows:
        used = tuple(name for name in self._held if name in layer.updates)
        if not all(layer.updates[name].stacks for name in used):
            return LayerRows(None, None, None, used, None)
        device = layer.updates[used[0]].lora_a.device
        if device.type != "cuda":
            if sum(layer.updates[name].lora_a.shape[0] for name in used) <= MOST_TOGETHER * len(self.names):
                return LayerRows(*self._together(layer, used), used, None)
            return LayerRows(*stack_updates(updates), None, used, None)
        index = [-1 if name not in used else used.index(name) for name in self.names]
        return LayerRows(None, None, None, used, torch.tensor(index, device=device))

    def _together(self, layer: "AdaptedLayer", used: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """The adapters one below the other, and which rows of that each row of the batch uses."""
        chosen = [layer.updates[name] for name in used]
        a = torch.cat([update.lora_a for update in chosen])  # (sum of ranks, in)
        b = torch.cat([update.lora_b.T * update.scale for update in chosen])  # (sum of ranks, out)
        owner = torch.cat([torch.full((u.lora_a.shape[0],), i) for i, u in enumerate(chosen)])  # (sum of ranks,)
        of_row = torch.tensor([used.index(name) if name in used else -1 for name in self.names])  # (B,)
        mask = (of_row[:, None] == owner).to(a.device, a.dtype)  # (B, sum of ranks)
        return a, b, mask

    def _state(self) -> tuple[int, int]:
        """Changes whenever the matrices do; frozen ones change only by way of the registry."""
        return self.registry.version, sum(tensor._version for tensor in self._trained)

    def __enter__(self) -> "RowSelection":
        self._refresh()
        choice: Choice = self if self._mixed else self.names[0] if self.names else None
        _THREAD.link = Link(self.registry, choice, _THREAD.link)
        return self

    def __exit__(self, *error: object) -> None:
        _leave()

    def close(self) -> None:
        """No longer a user of its adapters."""
        held, self._held = self._held, []
        for name in held:
            self.registry.release(name)

    def __del__(self) -> None:
        if getattr(self, "_held", None):
            self.close()


def _leave() -> None:
    """Close this thread's innermost block."""
    assert _THREAD.link is not None
    _THREAD.link = _THREAD.link.outer


def stack_updates(updates: "Sequence[LowRank | None]") -> tuple[Tensor, Tensor]:
    """The updates of a batch's rows as A (B, in, R) and scale * B (B, R, out), ranks padded with zeros; None is zero."""
    present = list(dict.fromkeys(update for update in updates if update is not None))
    rank = max(update.lora_a.shape[0] for update in present)
    padded: dict[LowRank | None, tuple[Tensor, Tensor]] = {}
    for update in present:
        a, b = update.lora_a, update.lora_b.T * update.scale  # (R, in), (R, out)
        if more := rank - a.shape[0]:
            a, b = F.pad(a, (0, 0, 0, more)), F.pad(b, (0, 0, 0, more))
        padded[update] = a, b
    if None in updates:
        a, b = padded[present[0]]
        padded[None] = torch.zeros_like(a), torch.zeros_like(b)
    a, b = zip(*(padded[update] for update in updates), strict=True)
    return torch.stack(a).transpose(1, 2), torch.stack(b)


def registry_of(model: nn.Module) -> AdapterRegistry:
    """The model's registry, made on first use; found through wrappers such as a compiled or a data-parallel model."""
    for module in model.modules():
        registry = module.__dict__.get("adapter_registry")
        if registry is not None:
            return registry
    registry = AdapterRegistry()
    model.adapter_registry = registry  # pyright: ignore[reportArgumentType]
    return registry


@contextmanager
def use_adapters(model: nn.Module, choice: str | Sequence[str | None] | None) -> Iterator[None]:
    """Within the block, and in this thread only, the model's calls use this adapter; a sequence names one for each row.

    None is the bare base. Blocks nest: the innermost one wins, and the model's default acts outside of all. Raises
    ValueError for a name that the model hasn't.
    """
    registry = registry_of(model)
    if choice is not None and not isinstance(choice, str):
        selection = RowSelection(registry, choice)
        try:
            with selection:
                yield
        finally:
            selection.close()
        return
    registry.check_names([choice])
    if choice is not None:
        registry.hold(choice)
    _THREAD.link = Link(registry, choice, _THREAD.link)
    try:
        yield
    finally:
        _leave()
        if choice is not None:
            registry.release(choice)


@contextmanager
def choosing(registry: AdapterRegistry, choice: Choice) -> Iterator[None]:
    """Within the block, and in this thread only, this choice acts; it is neither checked nor counted as a use."""
    _THREAD.link = Link(registry, choice, _THREAD.link)
    try:
        yield
    finally:
        _leave()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block, and in this thread only, the model is its bare base. May be nested, also in `use_adapters`."""
    with choosing(registry_of(model), None):
        yield
