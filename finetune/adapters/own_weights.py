"""Weights of an adapter's own in place of the base's: whole modules (PEFT's modules_to_save), or a few rows of the embedding.

Linears take these updates in their `LoRALinear`; embeddings and norms are wrapped in an `AdaptedModule`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.model.norm import RMSNorm
from ...kernels.rms_norm import rms_norm
from .named import Update, by_groups, drop_update, put_update
from .selection import AdapterRegistry, RowSelection


class OwnModule(nn.Module):
    """An adapter's own weight (and bias) of an embedding, a linear or a norm. Raises TypeError for another module."""

    stacks: ClassVar[bool] = False
    weight: nn.Parameter

    def __init__(self, base: nn.Module, tensors: Mapping[str, Tensor | nn.Parameter], *, trained: bool) -> None:
        super().__init__()
        if not isinstance(base, nn.Embedding | nn.Linear | RMSNorm):
            raise TypeError(f"{type(base).__name__} can't have weights of an adapter's own")
        role = "embedding" if isinstance(base, nn.Embedding) else "gain" if isinstance(base, RMSNorm) else "head"
        self.ROLES = {"weight": role, "bias": "bias"}
        for name, tensor in tensors.items():
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=trained)
            self.register_parameter(name, parameter)

    def apply_to(self, base: nn.Module, x: Tensor) -> Tensor:
        """What `base` would give with these weights; in the base's dtype."""
        weight, bias = self.weight, self._parameters.get("bias")
        if isinstance(base, nn.Embedding):
            return F.embedding(x, weight).to(base.weight.dtype)
        if isinstance(base, RMSNorm):
            return rms_norm(x, weight.to(base.weight.dtype), eps=base.eps)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class TokenRows(nn.Module):
    """An adapter's own rows of an embedding, or of a head, for a few token ids (PEFT's trainable_token_indices)."""

    stacks: ClassVar[bool] = False
    ids: Tensor  # (n,) int64

    def __init__(self, ids: Tensor, rows: Tensor | nn.Parameter, *, trained: bool) -> None:
        super().__init__()
        self.ROLES = {"rows": "embedding"}
        self.rows = rows if isinstance(rows, nn.Parameter) else nn.Parameter(rows, requires_grad=trained)  # (n, D)
        self.register_buffer("ids", ids, persistent=False)

    def apply_to(self, base: nn.Module, x: Tensor) -> Tensor:
        """Ids (...) -> (..., D) of an embedding; (..., D) -> (..., V) of a head."""
        out = base(x)
        if not isinstance(base, nn.Embedding):
            own = F.linear(x, self.rows.to(x.dtype)).to(out.dtype)  # (..., n)
            return out.index_copy(-1, self.ids, own)
        is_own = x[..., None] == self.ids  # (..., n)
        own = F.embedding(is_own.to(torch.uint8).argmax(-1), self.rows)
        return torch.where(is_own.any(-1, keepdim=True), own.to(out.dtype), out)


class AdaptedModule(nn.Module):
    """An embedding or a norm with the named updates that touch it, chosen as a LoRALinear's are."""

    def __init__(self, base: nn.Module, registry: AdapterRegistry) -> None:
        super().__init__()
        self.base, self.registry = base, registry
        self.adapters = nn.Module()
        self.updates: dict[str, Update] = {}
        self.slot = registry.add_layer(self)

    @property
    def weight(self) -> Tensor:
        """The base's: what asks for it wants its device, dtype or shape."""
        assert isinstance(self.base.weight, Tensor)
        return self.base.weight

    def add_update(self, name: str, update: Update) -> None:
        """Register an update under a name; an older one of that name is replaced."""
        put_update(self, name, update)

    def remove(self, name: str) -> None:
        """Forget the update of that name, if there is one."""
        drop_update(self, name)

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, or that of the update which this thread's selection or the default names."""
        choice = self.registry.choice()
        if isinstance(choice, RowSelection):
            layer = choice.layers.get(self.slot)
            return self.base(x) if layer is None else by_groups(self, x, choice)
        update = self.updates.get(choice) if isinstance(choice, str) else None
        return self.base(x) if update is None else update.apply_to(self.base, x)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """A norm of x + residual, and the sum, as RMSNorm.add gives them."""
        assert isinstance(self.base, RMSNorm)
        if self.registry.choice() is None:
            return self.base.add(x, residual)
        total = x + residual
        return self(total), total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedModule":
        """As nn.Module's; row selections made before are out of date."""
        super()._apply(fn, recurse)
        self.registry.changed()
        return self


def own_places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, bare module) of what can have weights of an adapter's own: embedding, head, linears, norms."""
    inside: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if any(path.startswith(start) for start in inside):
            continue
        is_linear = hasattr(module, "in_features")
        bare = getattr(module, "base", module) if is_linear or isinstance(module, AdaptedModule) else module
        if is_linear or isinstance(bare, nn.Embedding | RMSNorm):
            yield path, bare
            inside.append(f"{path}.")
