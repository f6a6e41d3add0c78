"""LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1): h = W x + (alpha / rank) B A x, with W frozen.

`LoRALinear` wraps a linear of any kind and holds any number of named adapters as registered parameters. Which of them acts
is not part of the layer: it is chosen for the calls of one thread (`selection.py`), else by the model's default.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base.model.attention import project
from ...kernels.grouped_lora import grouped_lora
from .config import ALL_LINEAR, DEFAULT, LoraConfig
from .dora import DoRA
from .low_rank import LowRank, apply_update, base_gradient, run_base, weight_of, width
from .named import AdaptedLayer, Update, by_groups, check_rows, drop_update, module_key, put_update
from .own_weights import AdaptedModule
from .pissa import Pissa, principal
from .selection import AdapterRegistry, LayerRows, RowSelection, registry_of, stack_updates
from .targets import chosen, linears, matching, ranks_and_scales

__all__ = [
    "ALL_LINEAR", "DEFAULT", "LoRALinear", "LoraConfig", "LowRank", "adapted_layers", "attach_lora", "base_gradient", "linears",
    "lora_layers", "matching", "module_key", "remove_adapter", "replace_module", "run_base", "width", "wrapped",
]  # fmt: skip

FEW_TOKENS = 4  # a row, up to which a batch's few adapters are applied together to all rows


class LoRALinear(nn.Module):
    """A linear of any kind (anything with in_features and out_features) plus the named low-rank updates that touch it.

    The updates are registered as `adapters.<key>.lora_a` and `.lora_b`, with "." in an adapter's name written "%2E": they
    follow `.to()` and appear in `state_dict()` and `named_parameters()`.
    """

    def __init__(self, base: nn.Module, registry: AdapterRegistry) -> None:
        super().__init__()
        self.base, self.registry = base, registry
        self.in_features, self.out_features = width(base, "in_features"), width(base, "out_features")
        self.adapters = nn.Module()  # a namespace, filled by `add`
        # Name -> the same modules; those that are no LowRank bring their own arithmetic (`Update.apply_to`).
        self.updates: dict[str, LowRank] = {}
        self.slot = registry.add_layer(self)  # the layer's key in a RowSelection

    def add(self, name: str, update: LowRank | Update) -> None:
        """Register an update under a name; an older one of that name is replaced."""
        put_update(self, name, update)

    def remove(self, name: str) -> None:
        """Forget the update of that name, if there is one."""
        drop_update(self, name)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out): the base, plus the update that this thread's selection or the default names."""
        choice = self.registry.choice()
        if choice is None:
            return self.base(x)
        if isinstance(choice, RowSelection):
            layer = choice.layers.get(self.slot)
            return self.base(x) if layer is None else self._by_row(x, choice, layer)
        if not isinstance(choice, str):
            return choice.forward(self, x)
        update = self.updates.get(choice)
        if update is None:
            return self.base(x)
        if type(update) is not LowRank:
            return update.apply_to(self.base, x)
        dropped = F.dropout(x, update.dropout) if update.dropout and self.training else None
        return apply_update(self.base, x, dropped, update.lora_a, update.lora_b, update.scale)

    def _by_row(self, x: Tensor, rows: RowSelection, layer: LayerRows) -> Tensor:
        """Row i of x (B, ..., in) gets the update of rows.names[i]: two batched products, or on a GPU the grouped kernel."""
        n_rows = len(rows.names)
        check_rows(x, rows.names)
        if layer.lora_a is None and layer.row_index is None:
            return by_groups(self, x, rows)
        out = project(self.base, x)
        if layer.row_index is not None:
            index = layer.row_index.repeat_interleave(x.numel() // (n_rows * self.in_features))
            updates = [self.updates[name] for name in layer.names]
            a, b = [u.lora_a.to(out.dtype) for u in updates], [u.lora_b.to(out.dtype) for u in updates]
            scales = [u.scale for u in updates]
            return out + grouped_lora(x.flatten(0, -2).to(out.dtype), a, b, index, scales).view(out.shape)
        tracked = torch.is_grad_enabled()
        # Prompts are long: each token through its own adapter only, with the matrices gathered by row for this call.
        long = x.ndim == 3 and x.shape[1] > FEW_TOKENS and not torch.compiler.is_compiling()
        by_row = layer.mask is None or (tracked and rows.trained) or long
        if by_row and (layer.mask is not None or (tracked and rows.trained)):
            a, b = stack_updates([self.updates.get(name) if name is not None else None for name in rows.names])
        else:
            a, b = layer.lora_a, layer.lora_b
        assert a is not None
        assert b is not None
        if layer.mask is not None and not by_row:
            return self._together(x, out, a, b, layer.mask, tracked)
        if a.dtype != out.dtype:
            a, b = a.to(out.dtype), b.to(out.dtype)
        inner = torch.bmm(x.reshape(n_rows, -1, self.in_features).to(out.dtype), a)  # (B, T, R)
        flat = out.view(n_rows, -1, self.out_features)
        if tracked or torch.compiler.is_compiling():
            return torch.baddbmm(flat, inner, b).view(out.shape)
        flat.baddbmm_(inner, b)
        return out

    def _together(self, x: Tensor, out: Tensor, a: Tensor, b: Tensor, mask: Tensor, tracked: bool) -> Tensor:
        """out + ((x A^T) * mask) B: the few adapters of a batch in two plain products; x (B, ..., in), mask (B, R)."""
        if a.dtype != out.dtype:
            x, a, b, mask = x.to(out.dtype), a.to(out.dtype), b.to(out.dtype), mask.to(out.dtype)
        if x.ndim == 2 and not tracked:  # a decoding step: as few operators as there can be
            return out.addmm_(F.linear(x, a).mul_(mask), b)
        inner = F.linear(x, a)  # (B, ..., R)
        inner = inner * mask.view(mask.shape[0], *[1] * (inner.ndim - 2), -1)
        flat, inner = out.view(-1, self.out_features), inner.view(-1, inner.shape[-1])
        if tracked or torch.compiler.is_compiling():
            return torch.addmm(flat, inner, b).view(out.shape)
        flat.addmm_(inner, b)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALinear":
        """As nn.Module's; row selections made before are out of date."""
        super()._apply(fn, recurse)
        self.registry.changed()
        return self


def attach_lora(
    model: nn.Module, config: LoraConfig, *, seed: int = 0, name: str = DEFAULT, shapes_only: bool = False
) -> list[str]:
    """Freeze the model and give the target linears a new adapter, the model's default from now on; returns their paths.

    Only the new adapter's parameters train; what a config asks for beside linears is attach.py's. `shapes_only` draws nothing
    that needs the weights' values. Raises ValueError for targets that match no linear, for a rank above a
    layer's smaller side and for a name that is taken.
    """
    all_linears = dict(linears(model))
    paths = chosen([*all_linears], config)
    if any(name in layer.updates for _, layer in adapted_layers(model)):
        raise ValueError(f"the model has an adapter {name!r} already; choose another name, or remove_adapter first")
    shapes = {path: (width(m, "out_features"), width(m, "in_features")) for path, m in all_linears.items()}
    sizes = ranks_and_scales(paths, config)
    for path, (rank, _) in sizes.items():
        if rank > min(shapes[path]):
            limit = min(shapes[path])
            raise ValueError(
                f"rank={rank} is more than the layer's smaller side {limit} ({path} is {' x '.join(map(str, shapes[path]))}); "
                f"use rank <= {limit}"
            )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        layer = wrapped(model, path)
        layer.add(name, fresh_update(layer.base, *sizes[path], config, generator, shapes_only=shapes_only))
    registry_of(model).default = name
    return paths


def fresh_update(
    base: nn.Module, rank: int, scale: float, config: LoraConfig, generator: torch.Generator, *, shapes_only: bool
) -> LowRank | DoRA | Pissa:
    """A new update of one linear, which changes nothing yet.

    A ~ U(-1/sqrt(in), 1/sqrt(in)) as PEFT draws it (kaiming_uniform with a = sqrt(5)), or N(0, 1 / rank^2) with
    init=gaussian (its name for the same thing); B = 0.
    """
    n_in, n_out = width(base, "in_features"), width(base, "out_features")
    device = next((t.device for t in [*base.parameters(), *base.buffers()]), torch.device("cpu"))
    a = torch.empty(rank, n_in)
    b = torch.zeros(n_out, rank, device=device)
    if config.init == "pissa":
        a, b = (a, b) if shapes_only else principal(weight_of(base), rank, scale, seed=generator.initial_seed())
        return Pissa(a.to(device), b, scale, dropout=config.dropout)
    if config.init == "gaussian":
        a = a.normal_(0, 1 / rank, generator=generator)
    else:
        bound = 1 / math.sqrt(n_in)
        a = a.uniform_(-bound, bound, generator=generator)
    if config.use_dora:
        return DoRA(base, a.to(device), b, scale, dropout=config.dropout, trained=True)
    return LowRank(a.to(device), b, scale, dropout=config.dropout, trained=True)


def wrapped(model: nn.Module, path: str) -> LoRALinear:
    """The LoRALinear at that path of the model, made around the linear there if it is a bare one."""
    module = model.get_submodule(path)
    if not isinstance(module, LoRALinear):
        module = LoRALinear(module, registry_of(model)).train(module.training)
        replace_module(model, path, module)
    return module


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter; layers that no adapter touches any more become bare again. Raises ValueError while it is used."""
    registry = registry_of(model)
    registry.refuse_if_used(name, "removed")
    for path, layer in list(adapted_layers(model)):
        layer.remove(name)
        if not layer.updates:
            replace_module(model, path, layer.base)
            del registry.layers[layer.slot]
    if registry.default == name:
        registry.default = None
    if not any(isinstance(layer, AdaptedModule) for layer in registry.layers.values()):
        model.fused_decoding = True  # pyright: ignore[reportArgumentType]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(path in the base, wrapper) of every linear that has adapters."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """(path in the base, wrapper) of every layer that has adapters, of any kind."""
    layers = {id(layer) for layer in registry_of(model).layers.values()}
    for path, module in model.named_modules():
        if id(module) in layers:
            yield path, module  # pyright: ignore[reportReturnType]


def replace_module(model: nn.Module, path: str, module: nn.Module | None) -> None:
    """model.<path> = module."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
