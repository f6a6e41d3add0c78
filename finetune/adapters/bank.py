"""One base, many adapters: loaded once, swapped by name, or chosen for each row of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.model.huggingface import fingerprint
from ...base.model.transformer import Transformer
from ...kernels.grouped_lora import grouped_lora
from .files import Adapter, as_dtype, check_fits, read_adapter
from .lora import replace_module, width


@dataclass
class Selection:
    """Which adapters act now; one object shared by every layer of a bank, so that a swap is one assignment."""

    active: str | None = None  # for all rows
    rows: list[str | None] | None = None  # for each row of the batch; overrides `active`


class BankLinear(nn.Module):
    """A linear with the low-rank updates of all adapters of the bank that touch it."""

    def __init__(self, base: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.base, self.selection = base, selection
        self.in_features, self.out_features = width(base, "in_features"), width(base, "out_features")
        self.layers: dict[str, tuple[Tensor, Tensor, float]] = {}  # name -> A (R, in), B (out, R), scale

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        out = self.base(x)
        if self.selection.rows is not None:
            return out + self._by_row(x, self.selection.rows)
        if self.selection.active not in self.layers:
            return out
        a, b, scale = self.layers[self.selection.active]
        return out + F.linear(F.linear(x, a), b) * scale

    def _by_row(self, x: Tensor, rows: Sequence[str | None]) -> Tensor:
        """Each row's own update in one grouped product; rows without an adapter here get zero."""
        if x.shape[0] != len(rows):
            raise ValueError(f"the batch has {x.shape[0]} rows, adapters were chosen for {len(rows)}")
        slots = {name: i for i, name in enumerate(self.layers)}
        index = torch.tensor([slots.get(name, -1) if name else -1 for name in rows], device=x.device)
        index = index.repeat_interleave(x.numel() // (len(rows) * x.shape[-1]))  # (B * T,)
        lora_a, lora_b, scales = zip(*self.layers.values(), strict=True)
        flat = grouped_lora(x.flatten(0, -2), list(lora_a), list(lora_b), index, list(scales))
        return flat.view(*x.shape[:-1], self.out_features)


class AdapterBank:
    """Adapters on one base.

    `load` reads a PEFT folder, `use` swaps (None: the bare base), `use_rows` gives each row of the batch its own.
    The base's weights are never changed, so a swap is exact in both directions and takes microseconds.
    """

    def __init__(self, model: Transformer) -> None:
        if getattr(model, "adapter_bank", None) is not None:
            raise ValueError("this model has an adapter bank already; use model.adapter_bank")
        self.model, self.selection = model, Selection()
        self.adapters: dict[str, Adapter] = {}
        self._fingerprint = fingerprint(model)
        model.adapter_bank = self  # pyright: ignore[reportArgumentType]

    @property
    def names(self) -> list[str]:
        """The loaded adapters in the order of loading."""
        return list(self.adapters)

    @property
    def active(self) -> str | None:
        return self.selection.active

    def load(self, name: str, folder: Path | str) -> None:
        """Read an adapter and keep it under `name`, replacing an older one of that name.

        Raises ValueError when it was made for another base.
        """
        if not name:
            raise ValueError("an adapter needs a name; the empty string is none")
        adapter = read_adapter(folder)
        check_fits(adapter, self.model, fingerprint=self._fingerprint)
        active = self.selection.active
        if name in self.adapters:
            self.unload(name)
        weight = self.model.model.embed_tokens.weight
        for path, layer in as_dtype(adapter, weight.dtype, weight.device).items():
            module = self.model.get_submodule(path)
            if not isinstance(module, BankLinear):
                module = BankLinear(module, self.selection)
                replace_module(self.model, path, module)
            module.layers[name] = layer
        self.adapters[name] = adapter
        self.selection.active = active

    def unload(self, name: str) -> None:
        """Forget an adapter; layers that no adapter touches any more become plain linears again."""
        self._check(name)
        del self.adapters[name]
        for path, module in list(self.model.named_modules()):
            if isinstance(module, BankLinear):
                module.layers.pop(name, None)
                if not module.layers:
                    replace_module(self.model, path, module.base)
        if self.selection.active == name:
            self.selection.active = None

    def use(self, name: str | None) -> None:
        """Every row uses this adapter from now on; None is the bare base."""
        if name is not None:
            self._check(name)
        self.selection.active, self.selection.rows = name, None

    @contextmanager
    def use_rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the block row i of every batch uses names[i]; None is the bare base."""
        for name in names:
            if name is not None:
                self._check(name)
        before, self.selection.rows = self.selection.rows, list(names)
        try:
            yield
        finally:
            self.selection.rows = before

    def _check(self, name: str) -> None:
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"no adapter {name!r} is loaded; loaded are: {known}")


def bank_of(model: nn.Module) -> AdapterBank | None:
    """The bank that was made for this model, if any."""
    return getattr(model, "adapter_bank", None)
