"""One low-rank update and its arithmetic: base(x) + scale B A x, with the gradient of a frozen base (section 4.1)."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ...base.model.attention import project


class LowRank(nn.Module):
    """One adapter's update of one linear: scale * B A. `LoRALinear` does the arithmetic."""

    ROLES: ClassVar = {"lora_a": "adapter", "lora_b": "adapter"}
    stacks: ClassVar[bool] = True  # a mixed batch may take several of them in one product

    def __init__(self, lora_a: Tensor, lora_b: Tensor, scale: float, *, dropout: float = 0.0, trained: bool) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(lora_a, requires_grad=trained)  # (R, in)
        self.lora_b = nn.Parameter(lora_b, requires_grad=trained)  # (out, R)
        self.scale, self.dropout = scale, dropout

    def apply_to(self, base: nn.Module, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), for a batch whose other rows have adapters of other kinds."""
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else None
        return apply_update(base, x, dropped, self.lora_a, self.lora_b, self.scale)

    def delta(self) -> Tensor:
        """What merging adds to W: scale * B A, (out, in) float32."""
        return self.scale * (self.lora_b.detach().float() @ self.lora_a.detach().float())


def apply_update(
    base: nn.Module,
    x: Tensor,  # (..., in)
    dropped: Tensor | None,  # (..., in): x after dropout; None: x
    a: Tensor,  # (R, in)
    b: Tensor,  # (out, R)
    scale: float,
) -> Tensor:  # (..., out)
    """base(x) + scale * (dropped A^T) B^T."""
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


def weight_of(base: nn.Module) -> Tensor:
    """A linear's weight (out, in) in float32, whatever its kind; of a 4-bit one a new tensor."""
    if type(base) is nn.Linear:
        return base.weight.detach().float()
    if hasattr(base, "dequantize"):
        return base.dequantize(torch.float32)  # pyright: ignore[reportCallIssue]
    with torch.no_grad():  # another library's layer: its product with the unit vectors
        device = next(iter(base.parameters())).device
        return without_bias(base, torch.eye(width(base, "in_features"), device=device)).T.float()


def without_bias(base: nn.Module, x: Tensor) -> Tensor:
    """x W^T."""
    out = project(base, x)
    bias = getattr(base, "bias", None)
    return out if bias is None else out - bias.to(out.dtype)


def width(module: nn.Module, name: str) -> int:
    """A linear's in_features or out_features, whatever its kind."""
    width = getattr(module, name)
    assert isinstance(width, int)
    return width
