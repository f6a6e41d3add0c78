"""The models that a server offers: the base, and adapters that are found in a folder and loaded on first use.

An adapter's weights live in the bank under a name of their own for each version ("spam#2"), so that a new version takes
over at once while requests of the old one end in peace; the old one is removed when its last request has ended. A name that
a client sends is looked up among those found, and never made part of a path.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from ...base.hub import model_folder, name_of
from ...base.json_fields import read_json
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ..adapters.bank import AdapterBank
from ..adapters.combine import parse_stack, stacked_adapter
from ..adapters.files import CONFIG, GRAFT, Adapter, read_adapter
from ..adapters.selection import RowSelection
from ..adapters.shelf import resident_bytes
from ..data.chat import ChatTemplate
from ..data.stop import stop_ids
from .errors import ApiError


@dataclass(frozen=True, eq=False)
class Served:
    """What answering as one model needs."""

    internal: str | None  # the bank's name for this version; None: the base
    template: ChatTemplate
    is_chat: bool  # whether it learned conversations; a single message to one that did not is its plain text
    stops: frozenset[int]


class Lease:
    """The use of a served model by one request: until it is closed, that version of the adapter stays."""

    def __init__(self, served: Served, selection: RowSelection | None) -> None:
        self.served, self._selection = served, selection

    def close(self) -> None:
        """The request has ended. May be called twice."""
        if self._selection is not None:
            self._selection.close()


class Models:
    """Names to adapters. `find`, `lease` and `names` may be called from any thread; what changes the model (`attach`,
    `detach`, `sweep`) belongs to the engine's thread."""

    def __init__(
        self,
        base: Path | str,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        folder: Path | None = None,  # its subfolders that hold an adapter are offered
        named: dict[str, Path] | None = None,  # adapters elsewhere
        max_loaded: int = 64,  # adapters in memory; the least recently used one goes
        budget_bytes: int | None = None,  # of their weights; None: no limit
        pinned: Collection[str] = (),  # names that stay once they are loaded
    ) -> None:
        base = model_folder(base)
        self.base_name = name_of(base) or base.resolve().name
        self.folder, self.max_loaded, self.budget_bytes = folder, max_loaded, budget_bytes
        self.pinned = frozenset(pinned)
        self.bank, self.tokenizer = AdapterBank(model), tokenizer
        self._named = dict(named or {})
        self._unloaded: set[str] = set()  # names that a client took out of service
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"the adapters' folder {folder} does not exist")
        if self.base_name in self.names()[1:]:
            raise ValueError(f"an adapter has the base's name {self.base_name!r}; rename one of the two folders")
        if unknown := sorted(self.pinned - set(self.names())):
            raise ValueError(
                f"pinned adapter {unknown[0]!r} does not exist; there are {', '.join(self.names()[1:]) or 'none'}"
            )
        facts = read_json(base / GRAFT) if (base / GRAFT).exists() else {}
        is_chat = facts.get("prompt_format") == "chat" or (not facts and tokenizer.chat_template is not None)
        self.base = self._served(None, None, is_chat)
        self._loaded: OrderedDict[str, Served] = OrderedDict()  # the most recently used last
        self._sizes: dict[str, int] = {}
        self._retired: list[str] = []  # internal names of versions that only running requests still use
        self._versions = count(1)
        self._lock = threading.Lock()

    def _served(self, internal: str | None, source: str | None, is_chat: bool) -> Served:
        template = ChatTemplate.of(self.tokenizer, source)
        return Served(internal, template, is_chat, stop_ids(self.bank.model.config, self.tokenizer, template))

    def _folders(self) -> dict[str, Path]:
        """The adapters on disk, by name."""
        found = {}
        if self.folder is not None:
            found = {path.name: path for path in sorted(self.folder.iterdir()) if (path / CONFIG).is_file()}
        return {**found, **self._named}

    def names(self) -> list[str]:
        """All that `model` may be, the base first."""
        return [self.base_name, *(name for name in self._folders() if name not in self._unloaded)]

    @property
    def n_loaded(self) -> int:
        """Adapters in memory, versions that are on their way out included."""
        return len(self.bank.names)

    @property
    def has_retired(self) -> bool:
        """Whether a version waits for its last request to end."""
        return bool(self._retired)

    def lease(self, name: str) -> Lease | None:
        """The model of that name for one request; None when it must be loaded first."""
        if name == self.base_name:
            return Lease(self.base, None)
        with self._lock:
            served = self._loaded.get(name)
            if served is None:
                return None
            self._loaded.move_to_end(name)
            return Lease(served, self.bank.rows([served.internal]))

    def find(self, name: str) -> Path | str:
        """The folder of an adapter, or the spec of a stack such as spam:0.7,style:0.3. Raises ApiError 404 that lists the names
        there are."""
        folder: Path | str | None = None if name in self._unloaded else self._folders().get(name)
        if folder is None and (parts := _parts(name)):
            for part in parts:
                self.find(part)
            folder = name
        if folder is None:
            shown = name if len(name) <= 60 else f"{name[:57]}..."
            known = self.names()
            more = f" and {len(known) - 20} more" if len(known) > 20 else ""
            raise ApiError(
                404,
                f"the model {shown!r} does not exist; there are {', '.join(known[:20])}{more}",
                param="model",
                code="model_not_found",
            )
        return folder

    def read(self, name: str, folder: Path | str) -> Adapter:
        """An adapter's files, or the weighted sum that a stack's spec means. Raises ApiError 500, as the client can't mend them,
        and 400 for adapters that don't add up or don't fit into the budget."""
        if isinstance(folder, str):
            folders = self._folders()
            try:
                return stacked_adapter(folder, lambda part: self.read(part, folders[part]))
            except ValueError as error:
                raise ApiError(400, str(error), param="model") from None
        try:
            return read_adapter(folder)
        except (ValueError, OSError) as error:
            reason = str(error).replace(str(folder), name)
            raise ApiError(500, f"adapter {name!r} can't be read: {reason}", param="model") from None

    def check_path(self, path: str) -> Path:
        """A folder that a client names for loading: only one below the adapters' folder. Raises ApiError 400."""
        if self.folder is None:
            raise ApiError(400, "this server has no folder of adapters; start it with --adapters", param="lora_path")
        root = self.folder.resolve()
        try:
            resolved = (root / path).resolve()
            inside = resolved.is_relative_to(root) and (resolved / CONFIG).is_file()
        except (ValueError, OSError, RuntimeError):
            inside, resolved = False, root
        if not inside:
            raise ApiError(400, "lora_path names no adapter below the server's folder of adapters", param="lora_path")
        return resolved

    # --- in the engine's thread ---

    def attach(self, name: str, adapter: Adapter, folder: Path | None = None) -> None:
        """Put an adapter in service, in place of an older version of that name. `folder`: where it lies, if a client named
        it. Raises ApiError 409 when it was made for another base."""
        internal = f"{name}#{next(self._versions)}"
        size = resident_bytes(adapter, self.bank.model)
        if self.budget_bytes is not None and size > self.budget_bytes:
            raise ApiError(
                400,
                f"adapter {name!r} takes {size:,} bytes, more than the server's whole budget of {self.budget_bytes:,}; raise "
                "--adapter-budget",
                param="model",
            )
        try:
            served = self._served(internal, adapter.chat_template, adapter.graft.get("prompt_format", "chat") == "chat")
            self.bank.add(internal, adapter)
        except ValueError as error:
            reason = str(error).replace(adapter.where, repr(name)) if adapter.where else str(error)
            raise ApiError(409, f"{reason}", param="model", code="adapter_of_another_base") from None
        with self._lock:
            older = self._loaded.pop(name, None)
            if older is not None:
                self._retired.append(str(older.internal))
            self._loaded[name], self._sizes[name] = served, size
            self._unloaded.discard(name)
            if folder is not None:
                self._named[name] = folder
            if older is not None or folder is not None:
                for other in [other for other in self._loaded if name in _parts(other)]:
                    self._retire(other)  # a stack of the older version
            for oldest in list(self._loaded):
                if not self._is_too_much():
                    break
                if oldest not in self.pinned and oldest != name:
                    self._retire(oldest)
        self.sweep()

    def _is_too_much(self) -> bool:
        """Whether more adapters are loaded than are wanted, pinned ones included."""
        n_bytes = sum(self._sizes[name] for name in self._loaded)
        return len(self._loaded) > self.max_loaded or (self.budget_bytes is not None and n_bytes > self.budget_bytes)

    def _retire(self, name: str) -> None:
        self._retired.append(str(self._loaded.pop(name).internal))

    def detach(self, name: str) -> None:
        """Take an adapter out of service; requests that run end as they began. Raises ApiError 404."""
        if name not in self.names()[1:]:
            self.find(name)  # raises for an unknown name
            what = "the base" if name == self.base_name else "a stack, which goes with its adapters"
            raise ApiError(400, f"{name!r} is {what}; only adapters can be unloaded", param="lora_name")
        with self._lock:
            self._unloaded.add(name)
            for other in [other for other in self._loaded if other == name or name in _parts(other)]:
                self._retire(other)
        self.sweep()

    def sweep(self) -> None:
        """Forget the retired versions that no request uses any more."""
        if not self._retired:
            return
        with self._lock:
            users = self.bank.registry.users
            gone = [internal for internal in self._retired if not users.get(internal)]
            for internal in gone:
                self.bank.unload(internal)
            self._retired = [internal for internal in self._retired if internal not in gone]


def _parts(name: str) -> list[str]:
    """The adapters of a stack such as spam:0.7,style:0.3; none of a plain name."""
    try:
        return list(parse_stack(name))
    except ValueError:
        return []
