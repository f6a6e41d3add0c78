"""Adapters of a folder, loaded when they are first asked for: the least recently used ones go when memory is short.

shelf = AdapterShelf(bank, "runs/adapters", budget_bytes=64 << 20)
with bank.rows([shelf.take("spam"), shelf.take("spam:0.7,style:0.3")]): ...
"""

from pathlib import Path

from ...base.model.transformer import Transformer
from .bank import AdapterBank
from .combine import stacked_adapter
from .files import CONFIG, Adapter, read_adapter


class AdapterShelf:
    """A bank filled on demand from the adapter folders below `folder`, within a budget of bytes.

    `take` gives a name that the bank knows, loading it first where needed. Pinned adapters and those in use stay; others leave,
    the least recently taken first. A stack such as spam:0.7,style:0.3 is an adapter of its own, the exact weighted sum.
    """

    def __init__(self, bank: AdapterBank, folder: Path | str, *, budget_bytes: int) -> None:
        self.bank, self.folder, self.budget_bytes = bank, Path(folder), budget_bytes
        if not self.folder.is_dir():
            raise FileNotFoundError(f"folder {folder} does not exist")
        if budget_bytes < 1:
            raise ValueError(f"budget_bytes={budget_bytes} must be >= 1")
        self.pinned: set[str] = set()
        self._sizes: dict[str, int] = {}  # of what this shelf has loaded, the least recently taken first

    @property
    def names(self) -> list[str]:
        """The adapters that the folder holds, loaded or not."""
        return sorted(path.parent.relative_to(self.folder).as_posix() for path in self.folder.rglob(CONFIG))

    @property
    def n_bytes(self) -> int:
        """Bytes of the adapters that are loaded."""
        return sum(self._sizes.values())

    def take(self, spec: str) -> str:
        """Load an adapter, or a stack of several, unless it is there; returns the name under which the bank has it.

        Raises ValueError for a name that the folder doesn't have, and for an adapter that doesn't fit into the budget beside those
        that must stay.
        """
        if spec in self._sizes and spec in self.bank.adapters:
            self._sizes[spec] = self._sizes.pop(spec)  # now the most recent
            return spec
        adapter = stacked_adapter(spec, self._read) if ":" in spec else self._read(spec)
        size = resident_bytes(adapter, self.bank.model)
        self._make_room(spec, size)
        self.bank.add(spec, adapter)
        self._sizes[spec] = size
        return spec

    def pin(self, spec: str) -> None:
        """Load it and keep it until `unpin`."""
        self.pinned.add(self.take(spec))

    def unpin(self, spec: str) -> None:
        """It may leave again when room is needed."""
        self.pinned.discard(spec)

    def _read(self, name: str) -> Adapter:
        folder = self.folder / name
        if not (folder / CONFIG).is_file() or folder.resolve() == self.folder.resolve() or ".." in Path(name).parts:
            raise ValueError(f"no adapter {name!r} below {self.folder}; there are: {', '.join(self.names) or 'none'}")
        return read_adapter(folder)

    def _make_room(self, spec: str, size: int) -> None:
        if size > self.budget_bytes:
            raise ValueError(
                f"adapter {spec!r} takes {size:,} bytes, more than the whole budget of {self.budget_bytes:,}; raise budget_bytes"
            )
        users = self.bank.registry.users
        leaving: list[str] = []
        room = self.budget_bytes - self.n_bytes
        for name in self._sizes:
            if room >= size:
                break
            if name not in self.pinned and not users.get(name) and name != self.bank.active:
                leaving.append(name)
                room += self._sizes[name]
        if room < size:
            raise ValueError(
                f"adapter {spec!r} takes {size:,} bytes, but only {room:,} of the budget of {self.budget_bytes:,} can be freed: "
                "the rest is pinned or in use; raise budget_bytes, or unpin one"
            )
        for name in leaving:
            del self._sizes[name]
            self.bank.unload(name)


def resident_bytes(adapter: Adapter, model: Transformer) -> int:
    """Bytes of a loaded adapter: in the base's dtype, and the copy that the bank keeps as it was read."""
    width = model.model.embed_tokens.weight.element_size()
    return adapter.n_bytes + adapter.n_values * width
