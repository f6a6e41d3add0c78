"""One base, many adapters: loaded once, swapped by name, or chosen for each row of a batch."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ...base.model.huggingface import fingerprint
from ...base.model.transformer import Transformer
from .files import Adapter, as_dtype, check_fits, read_adapter
from .lora import LowRank, remove_adapter, wrapped
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
        self._fingerprint = fingerprint(model)
        model.adapter_bank = self  # pyright: ignore[reportArgumentType]
        model.row_selector = self.rows  # the decoding engine gives each request's row its adapter by it

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
        """Keep an adapter that is in memory already, as `load` does."""
        check_fits(adapter, self.model, fingerprint=self._fingerprint)
        self.registry.refuse_if_used(name, "replaced")
        active = self.active
        if name in self.adapters:
            self.unload(name)
        weight = self.model.model.embed_tokens.weight
        for path, (a, b, scale) in as_dtype(adapter, weight.dtype, weight.device).items():
            wrapped(self.model, path).add(name, LowRank(a, b, scale, trained=False))
        self.adapters[name] = adapter
        self.registry.default = active

    def unload(self, name: str) -> None:
        """Forget an adapter; layers that no adapter touches any more become plain linears again.

        Raises ValueError for an unknown name, and while a selection or a request uses it.
        """
        self._check(name)
        remove_adapter(self.model, name)
        del self.adapters[name]

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


def bank_of(model: nn.Module) -> AdapterBank | None:
    """The bank that was made for this model, if any."""
    return getattr(model, "adapter_bank", None)
