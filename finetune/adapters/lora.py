"""LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1): h = W x + (alpha / rank) B A x, with W frozen.

`LoRALinear` wraps a linear of any kind and holds any number of named adapters as registered parameters. Which of them acts
is not part of the layer: it is chosen for the calls of one thread (`selection.py`), else by the model's default.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ...base.model.attention import project
from ...kernels.grouped_lora import grouped_lora
from .selection import AdapterRegistry, LayerRows, RowSelection, registry_of, stack_updates

FEW_TOKENS = 4  # a row, up to which a batch's few adapters are applied together to all rows
ALL_LINEAR = "all-linear"  # PEFT's name for every linear layer but the output head
DEFAULT = "default"  # the adapter's name where there is only one, as in PEFT


@dataclass(frozen=True)
class LoraConfig:
    """What is attached where. The defaults follow "LoRA Without Regret" (Schulman et al. 2025): every linear, alpha 32."""

    rank: int = 16  # of the update's two factors
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on the adapter's input, while training
    targets: tuple[str, ...] = (ALL_LINEAR,)  # last parts of module paths, or whole paths, or all-linear
    rank_stabilized: bool = False  # scale = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732, eq. 4)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be >= 1; start from 16")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be > 0 and finite; start from 32")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class LowRank(nn.Module):
    """One adapter's update of one linear: scale * B A. Parameters only; `LoRALinear` does the arithmetic."""

    ROLES: ClassVar = {"lora_a": "adapter", "lora_b": "adapter"}

    def __init__(self, lora_a: Tensor, lora_b: Tensor, scale: float, *, dropout: float = 0.0, trained: bool) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(lora_a, requires_grad=trained)  # (R, in)
        self.lora_b = nn.Parameter(lora_b, requires_grad=trained)  # (out, R)
        self.scale, self.dropout = scale, dropout

    def delta(self) -> Tensor:
        """What merging adds to W: scale * B A, (out, in) float32."""
        return self.scale * (self.lora_b.detach().float() @ self.lora_a.detach().float())


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
        self.updates: dict[str, LowRank] = {}  # name -> the same modules
        self.slot = registry.add_layer(self)  # the layer's key in a RowSelection

    def add(self, name: str, update: LowRank) -> None:
        """Register an update under a name; an older one of that name is replaced."""
        self.adapters._modules[module_key(name)] = update.train(self.training)
        self.updates = {**self.updates, name: update}  # a new dict: other threads may be reading the old one
        self.registry.changed()

    def remove(self, name: str) -> None:
        """Forget the update of that name, if there is one."""
        self.adapters._modules.pop(module_key(name), None)
        self.updates = {other: update for other, update in self.updates.items() if other != name}
        self.registry.changed()

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
        dropped = F.dropout(x, update.dropout) if update.dropout and self.training else None
        return apply_update(self.base, x, dropped, update)

    def _by_row(self, x: Tensor, rows: RowSelection, layer: LayerRows) -> Tensor:
        """Row i of x (B, ..., in) gets the update of rows.names[i]: two batched products, or on a GPU the grouped kernel."""
        n_rows = len(rows.names)
        if x.shape[0] != n_rows:
            raise ValueError(f"the batch has {x.shape[0]} rows, adapters were chosen for {n_rows}")
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


def module_key(name: str) -> str:
    """An adapter's name as a module's: state dicts separate modules by dots."""
    return name.replace("%", "%25").replace(".", "%2E")


def apply_update(base: nn.Module, x: Tensor, dropped: Tensor | None, update: LowRank) -> Tensor:
    """base(x) + scale * (dropped A^T) B^T, where `dropped` is x after dropout, or None for x itself."""
    a, b, scale = update.lora_a, update.lora_b, update.scale
    tracked = torch.is_grad_enabled()
    if torch.compiler.is_compiling() or (tracked and any(p.requires_grad for p in base.parameters(recurse=False))):
        # Plain operators: a compiler fuses the sums itself, and a base that trains needs its own gradient.
        out = base(x)
        inner = F.linear((x if dropped is None else dropped).to(out.dtype), a.to(out.dtype)) * scale
        return out + F.linear(inner, b.to(out.dtype))
    if tracked and (x.requires_grad or a.requires_grad or b.requires_grad):
        return BaseAndUpdate.apply(x, dropped, a, b, scale, base)  # pyright: ignore[reportReturnType]
    out = project(base, x)
    inner = F.linear((x if dropped is None else dropped).to(out.dtype), a.to(out.dtype))  # (..., R)
    out.view(-1, out.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), b.to(out.dtype).T, alpha=scale)
    return out


class BaseAndUpdate(torch.autograd.Function):
    """y = base(x) + scale * (x A^T) B^T with a frozen base, each sum made inside a product (beta = 1 in addmm).

    With u = scale * dy B (N, R):   dA = u^T x,   dB = scale * dy^T (x A^T),   dx = dy W + u A.
    Saved: x and x A^T, and of the base what its own backward needs (nothing but W for nn.Linear and NF4Linear).
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,  # (..., in)
        dropped: Tensor | None,  # (..., in): x after dropout; None: x
        a: Tensor,  # (R, in)
        b: Tensor,  # (out, R)
        scale: float,
        base: nn.Module,
    ) -> Tensor:  # (..., out)
        ctx.scale, ctx.edge, ctx.weight = scale, None, None
        out = run_base(ctx, base, x)
        rows = (x if dropped is None else dropped).reshape(-1, x.shape[-1]).to(out.dtype)  # (N, in)
        low_a, low_b = a.to(out.dtype), b.to(out.dtype)
        inner = rows @ low_a.T  # (N, R)
        out.view(-1, out.shape[-1]).addmm_(inner, low_b.T, alpha=scale)
        ctx.has_dropout, ctx.x_shape, ctx.x_dtype = dropped is not None, x.shape, x.dtype
        ctx.save_for_backward(rows, inner, low_a, low_b)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, inner, a, b = ctx.saved_tensors
        need_x, need_dropped, need_a, need_b, *_ = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])  # (N, out)
        dx = d_dropped = da = db = None
        if need_b:
            db = (dy.T @ inner).mul_(ctx.scale)
        needs_input = need_dropped if ctx.has_dropout else need_x
        u = (dy @ b).mul_(ctx.scale) if need_a or needs_input else None  # (N, R)
        if need_a and u is not None:
            da = u.T @ rows
        if need_x:
            dx = base_gradient(ctx, grad, dy)  # (N, in), not shared with anything
        if needs_input and u is not None:
            if dx is not None and not ctx.has_dropout:
                dx.addmm_(u.to(dx.dtype), a.to(dx.dtype))
            else:
                d_dropped = (u @ a).view(ctx.x_shape).to(ctx.x_dtype)
        return (None if dx is None else dx.view(ctx.x_shape).to(ctx.x_dtype)), d_dropped, da, db, None, None


def run_base(ctx: Any, base: nn.Module, x: Tensor) -> Tensor:
    """base(x) without a graph; keeps in ctx what the input's gradient needs."""
    if type(base) is nn.Linear and not base._forward_hooks and not base._forward_pre_hooks:
        dtype = torch.get_autocast_dtype(x.device.type) if autocast_is_on(x) else x.dtype
        ctx.weight = base.weight.to(dtype) if ctx.needs_input_grad[0] else None
        weight = base.weight.to(dtype) if ctx.weight is None else ctx.weight
        return F.linear(x.to(dtype), weight, None if base.bias is None else base.bias.to(dtype))
    if not ctx.needs_input_grad[0]:
        return base(x)
    with torch.enable_grad():  # a graph of this linear alone, of which only the two ends are kept
        start = Start.apply(x.detach(), torch.empty(0, requires_grad=True))
        out = base(start)
    ctx.edge = (get_gradient_edge(out), get_gradient_edge(start))
    return out.detach()


class Start(torch.autograd.Function):
    """x itself, as the first node of a graph. A leaf would be one too, but its node keeps the leaf's memory alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, empty: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx, empty  # `empty` only asks for a gradient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx, grad
        return None, None


def base_gradient(ctx: Any, grad: Tensor, dy: Tensor) -> Tensor:
    """dy W (N, in), in a buffer of its own."""
    if ctx.weight is not None:
        return dy @ ctx.weight
    out, start = ctx.edge
    assert isinstance(out, GradientEdge)
    [dx] = torch.autograd.grad([out], [start], [grad])
    return dx.reshape(-1, dx.shape[-1])


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast would cast x; meta tensors know no autocast, and float64 is never cast."""
    return x.device.type != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def width(module: nn.Module, name: str) -> int:
    """A linear's in_features or out_features, whatever its kind."""
    width = getattr(module, name)
    assert isinstance(width, int)
    return width


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every linear of any kind, wrapped or not; the insides of a linear are not visited."""
    for name, child in model.named_children():
        if hasattr(child, "in_features") and hasattr(child, "out_features"):
            yield name, child
        else:
            for path, module in linears(child):
                yield f"{name}.{path}", module


def matching(paths: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The paths that the targets name. Raises ValueError that lists the model's linears when a target names none."""
    found = set()
    unmatched = []
    for target in targets:
        if target == ALL_LINEAR:
            hits = [path for path in paths if path != "lm_head"]
        else:
            hits = [path for path in paths if path == target or path.endswith(f".{target}")]
        if not hits:
            unmatched.append(target)
        found.update(hits)
    if unmatched:
        known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        raise ValueError(f"lora targets {set(unmatched)} match no linear; this model has {known}")
    return [path for path in paths if path in found]


def attach_lora(model: nn.Module, config: LoraConfig, *, seed: int = 0, name: str = DEFAULT) -> list[str]:
    """Freeze the model and give the target linears a new adapter, the model's default from now on; returns their paths.

    Only the new adapter's lora_a and lora_b train. Raises ValueError for targets that match no linear, for a rank above a
    layer's smaller side and for a name that is taken.
    """
    chosen = matching([path for path, _ in linears(model)], config.targets)
    if any(name in layer.updates for _, layer in lora_layers(model)):
        raise ValueError(f"the model has an adapter {name!r} already; choose another name, or remove_adapter first")
    shapes = {path: (width(m, "out_features"), width(m, "in_features")) for path, m in linears(model)}
    for path in chosen:
        if config.rank > min(shapes[path]):
            limit = min(shapes[path])
            raise ValueError(f"rank={config.rank} is more than the layer's smaller side {limit}; use rank <= {limit}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path in chosen:
        layer = wrapped(model, path)
        n_out, n_in = shapes[path]
        # A ~ U(-1/sqrt(in), 1/sqrt(in)) as PEFT draws it (kaiming_uniform with a = sqrt(5)), B = 0: the base at first.
        bound = 1 / math.sqrt(n_in)
        a = torch.empty(config.rank, n_in).uniform_(-bound, bound, generator=generator)
        device = next((t.device for t in [*layer.base.parameters(), *layer.base.buffers()]), torch.device("cpu"))
        b = torch.zeros(n_out, config.rank, device=device)
        layer.add(name, LowRank(a.to(device), b, config.scale, dropout=config.dropout, trained=True))
    registry_of(model).default = name
    return chosen


def wrapped(model: nn.Module, path: str) -> LoRALinear:
    """The LoRALinear at that path of the model, made around the linear there if it is a bare one."""
    module = model.get_submodule(path)
    if not isinstance(module, LoRALinear):
        module = LoRALinear(module, registry_of(model)).train(module.training)
        replace_module(model, path, module)
    return module


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter; linears that no adapter touches any more become bare again. Raises ValueError while it is used."""
    registry = registry_of(model)
    registry.refuse_if_used(name, "removed")
    for path, layer in list(lora_layers(model)):
        layer.remove(name)
        if not layer.updates:
            replace_module(model, path, layer.base)
            del registry.layers[layer.slot]
    if registry.default == name:
        registry.default = None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(path in the base, wrapper) of every linear that has adapters."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """model.<path> = module."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
