"""One base, many adapters: loaded once, swapped by name, or chosen for each row of a batch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ...base.model.huggingface import fingerprint
from ...base.model.transformer import Transformer
from .attach import install
from .files import Adapter, check_fits, read_adapter
from .lora import remove_adapter
from .selection import RowSelection, registry_of


class AdapterBank:
    """Adapters on one base, by name: reading, keeping and removing them; which one acts is `selection`'s business.

    `load` reads a PEFT folder, `use` sets the default of the whole process (None: the bare base), `rows` gives each row of a
    batch its own. The base's weights are never changed, so a swap is exact in both directions and takes microseconds.
    """

    def __init__(self, model: Transformer) -> None:
        if getattr(model, "adapter_bank", None) is not None:
            raise ValueError("this model has an adapter bank already; use model.adapter_bank")
        self.model, self.registry = model, registry_of(model)
        self.adapters: dict[str, Adapter] = {}
        self._contents: dict[str, str] = {}  # the hash of each adapter's weights as they are used
        self._fingerprint = fingerprint(model)
        model.adapter_bank = self  # pyright: ignore[reportArgumentType]
        model.row_selector = self.rows  # the decoding engine gives each request's row its adapter by it
        model.adapter_content = self.content

    @property
    def names(self) -> list[str]:
        """The loaded adapters in the order of loading."""
        return list(self.adapters)

    @property
    def active(self) -> str | None:
        """The adapter that acts where no block has chosen another."""
        return self.registry.default

    def load(self, name: str, folder: Path | str) -> None:
        """Read an adapter and keep it under `name`, replacing an older one of that name.

        Raises ValueError when it was made for another base, or while the older one has users.
        """
        if not name:
            raise ValueError("an adapter needs a name; the empty string is none")
        self.add(name, read_adapter(folder))

    def add(self, name: str, adapter: Adapter) -> None:
        """`load` for an adapter that was read already. Raises ValueError when it was made for another base, or while an
        older one of that name has users."""
        check_fits(adapter, self.model, fingerprint=self._fingerprint)
        self.registry.refuse_if_used(name, "replaced")
        active = self.active
        if name in self.adapters:
            self.unload(name)
        install(self.model, name, adapter)
        self.adapters[name], self._contents[name] = adapter, _hash(adapter, self.model.model.embed_tokens.weight.dtype)
        self.registry.default = active

    def content(self, name: str) -> str:
        """A hash of the adapter's weights: equal for equal weights, whatever the name. Raises ValueError for an unknown one."""
        self._check(name)
        return self._contents[name]

    def unload(self, name: str) -> None:
        """Forget an adapter; layers that no adapter touches any more become plain linears again.

        Raises ValueError for an unknown name, and while a selection or a request uses it.
        """
        self._check(name)
        remove_adapter(self.model, name)
        del self.adapters[name], self._contents[name]

    def use(self, name: str | None) -> None:
        """Every call of every thread uses this adapter from now on, unless a block chooses another; None is the bare base."""
        if name is not None:
            self._check(name)
        self.registry.default = name

    def rows(self, names: Sequence[str | None]) -> RowSelection:
        """`with bank.rows(names):` row i of every batch uses names[i], None being the bare base.

        May be kept and entered again for each model call, which saves stacking the matrices again.
        """
        for name in names:
            if name is not None:
                self._check(name)
        return RowSelection(self.registry, names)

    def _check(self, name: str) -> None:
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"no adapter {name!r} is loaded; loaded are: {known}")


def _hash(adapter: Adapter, dtype: torch.dtype) -> str:
    """Of the weights as they are used, in the base's dtype."""
    content = hashlib.sha256(repr([(path, scale) for path, (_, _, scale) in adapter.layers.items()]).encode())
    for name, tensor in adapter.tensors().items():
        content.update(f"{name} {tuple(tensor.shape)}".encode())
        content.update(tensor.to(dtype).contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def bank_of(model: nn.Module) -> AdapterBank | None:
    """The bank that was made for this model, if any."""
    return getattr(model, "adapter_bank", None)
