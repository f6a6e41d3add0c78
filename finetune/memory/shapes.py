"""Tensors that have a shape and no memory, for a step of which only the bytes matter.

What torch's FakeTensorMode does, but that one imports the compiler, which takes as long as importing torch, and is three times
slower per operator. It checks more, and knows symbolic sizes; bytes are the same.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor

CPU = torch.device("cpu")
VALUES = {
    torch.bool: True,
    torch.int64: 1,
    torch.int32: 1,
    torch.uint8: 1,
}  # what `.item()` gives; 1.0 for other dtypes


class ShapeTensor(Tensor):
    """A meta tensor that reports the CPU as its device, so that autograd, autocast and our kernels treat it as a CPU tensor."""

    STANDS_FOR_MEMORY: ClassVar = True  # kernels/cpu_loops: allocate what a real one needs, compute nothing
    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> "ShapeTensor":
        self = Tensor._make_subclass(cls, meta, False, dispatch_device=True, device_for_backend_keys=CPU)
        self.meta = meta
        return self

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
        return CPU

    @classmethod
    def __torch_dispatch__(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return run_on_shapes(func, args, kwargs or {})


def run_on_shapes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One operator on ShapeTensors: the shapes, strides and dtypes of its results, from PyTorch's rules for meta tensors.

    A real tensor among the arguments counts by its shape. An operator that asks for a value (`.item()`, `bool()`) is given 1:
    only code whose memory does not depend on values may run so. Raises NotImplementedError for an operator without a rule.
    """
    if func is torch.ops.prim.device.default:
        return CPU
    if func is torch.ops.aten._local_scalar_dense.default:
        return VALUES.get(args[0].dtype, 1.0)
    if func is torch.ops.aten._fused_sdp_choice.default:
        return torch.nn.attention.SDPBackend.FLASH_ATTENTION.value  # the CPU's
    given: dict[int, Tensor] = {}  # id of a meta tensor -> the argument that it was made from
    meta_args = [_to_meta(value, given) for value in args]
    meta_kwargs = {name: _to_meta(value, given) for name, value in kwargs.items()}
    if _has_device(func) and (not given or meta_kwargs.get("device") is not None):
        meta_kwargs["device"] = "meta"
    if func._schema.is_mutable and not func._schema.returns:
        return None  # torch._foreach_mul_, torch._fused_adamw_: no shape changes
    meta_out = _by_own_rule(func, meta_args, meta_kwargs)
    return _to_shape(func(*meta_args, **meta_kwargs) if meta_out is None else meta_out, given)


@cache
def _has_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _to_meta(value: Any, given: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        meta = value.meta if isinstance(value, ShapeTensor) else value.to("meta")
        given[id(meta)] = value
        return meta
    return [_to_meta(item, given) for item in value] if isinstance(value, list | tuple) else value


def _to_shape(value: Any, given: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        argument = given.get(id(value))
        return argument if isinstance(argument, ShapeTensor) else ShapeTensor(value)
    return type(value)(_to_shape(item, given) for item in value) if isinstance(value, list | tuple) else value


# --- rules of our own: PyTorch's for these operators are written in Python, which imports sympy and the compiler ----------


aten = torch.ops.aten
FILLS = {aten.normal_.default, aten.uniform_.default, aten.bernoulli_.float}
LIKE = {aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
ARANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
# Reductions: where their list of dimensions stands among the arguments (keepdim follows it); None: they take none.
REDUCTIONS = {
    aten.mean.default: None,
    aten.mean.dim: 1,
    aten.all.default: None,
    aten.linalg_vector_norm.default: 2,
    aten.amax.default: 1,
}


def _by_own_rule(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | tuple[Tensor, ...] | None:
    """The result of an operator that alignment, generation or training uses often, on meta tensors; None for any other."""
    if func in REDUCTIONS:
        return _reduced(
            args[0], *_dims(args, REDUCTIONS[func]), torch.bool if func is aten.all.default else kwargs.get("dtype")
        )
    if func in (aten.addmm_.default, aten.baddbmm_.default):
        return args[0]  # the sum is made in place
    if func is aten.mm.default:
        return args[0].new_empty((args[0].shape[0], args[1].shape[1]))
    if func is aten._grouped_mm.default:  # PyTorch's rule knows bfloat16 alone
        # rows sorted by group (N, K) x (G, K, M), or the matrices' gradients (K, N) x (N, M)
        ends = args[2] if len(args) > 2 else kwargs["offs"]
        groups = () if args[1].ndim == 3 else (ends.shape[0],)
        return args[0].new_empty((*groups, args[0].shape[0], args[1].shape[-1]))
    if func is aten.softplus_backward.default:
        return torch.empty_like(args[0])
    if func in (aten.tril.default, aten.triu.default) or (func is aten.cumsum.default and args[0].is_floating_point()):
        return args[0].new_empty(args[0].shape, dtype=kwargs.get("dtype"))
    if func is aten.mv.default:
        return args[0].new_empty(args[0].shape[:1])
    if func is aten.embedding.default:
        return args[0].new_empty((*args[1].shape, args[0].shape[1]))
    if func is aten._log_softmax.default:
        return args[0].new_empty(args[0].shape, dtype=torch.float32 if args[2] else None)
    if func is aten.log_sigmoid_forward.default:
        return torch.empty_like(args[0]), torch.empty_like(args[0])  # and e^-|x|, which the backward pass reads
    if func is aten.log_sigmoid_backward.default:
        return torch.empty_like(args[1])
    if func is aten.clone.default and kwargs.get("memory_format") is torch.contiguous_format:
        return args[0].new_empty(args[0].shape)
    if func in LIKE:
        x, wanted = args[0], kwargs.get("memory_format")
        if wanted is torch.contiguous_format:
            return x.new_empty(x.shape, dtype=kwargs.get("dtype"))
        strides = _result_strides(list(x.shape), [x])
        return torch.empty_strided(x.shape, strides, dtype=kwargs.get("dtype") or x.dtype, device="meta")
    if func in ARANGES:
        start, end, step = (0, args[0], 1) if len(args) == 1 else (*args[:2], args[2] if len(args) > 2 else 1)
        whole = all(isinstance(value, int) for value in (start, end, step))
        dtype = kwargs.get("dtype") or (torch.int64 if whole else torch.get_default_dtype())
        return torch.empty(math.ceil((end - start) / step), dtype=dtype, device="meta")
    if func is aten.stack.default:
        first, shape = args[0][0], list(args[0][0].shape)
        shape.insert((args[1] if len(args) > 1 else 0) % (first.ndim + 1), len(args[0]))
        return first.new_empty(shape)
    if func is aten.cat.default:
        parts = [part for part in args[0] if part.shape != (0,)]
        dim = (args[1] if len(args) > 1 else 0) % parts[0].ndim
        shape = list(parts[0].shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        dtype = parts[0].dtype
        return parts[0].new_empty(shape) if all(part.dtype == dtype for part in parts) else None
    if func in FILLS:
        return args[0]
    if torch.Tag.pointwise not in func.tags or "out" in kwargs:
        return None
    if func._schema.is_mutable:
        return args[0] if len(func._schema.returns) == 1 else None
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if any(isinstance(value, list) and value and isinstance(value[0], Tensor) for value in args):
        return None  # a list of tensors: torch._foreach_*
    dtype = _result_dtype(func, tuple(map(_kind, args)), tuple((name, _kind(value)) for name, value in kwargs.items()))
    if dtype is None:
        return None
    # torch.broadcast_shapes imports sympy
    sizes = zip_longest(*(reversed(tensor.shape) for tensor in tensors), fillvalue=1)
    shape = [next((size for size in at_dim if size != 1), 1) for at_dim in sizes][::-1]
    strides = _result_strides(shape, tensors)
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _dims(args: Sequence[Any], at: int | None) -> tuple[Sequence[int], bool]:
    """The dimensions that are reduced, and whether they stay with size 1."""
    if at is None or len(args) <= at or not args[at]:
        return range(args[0].ndim), at is not None and len(args) > at + 1 and args[at + 1]
    return [dim % args[0].ndim for dim in args[at]], len(args) > at + 1 and args[at + 1]


def _reduced(x: Tensor, dims: Sequence[int], keepdim: bool, dtype: torch.dtype | None) -> Tensor:
    sizes = [1 if dim in dims else size for dim, size in enumerate(x.shape) if keepdim or dim not in dims]
    return x.new_empty(sizes, dtype=dtype)


def _kind(value: Any) -> Any:
    """What decides the result's dtype of an argument: a tensor's dtype and whether it is a 0-d one, or the value itself."""
    return ("tensor", value.dtype, value.ndim > 0) if isinstance(value, Tensor) else ("value", type(value), value)


@cache
def _result_dtype(func: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> torch.dtype | None:
    """The dtype that the operator gives real tensors of one element; None where the result is not one tensor."""

    def example(kind: Any) -> Any:
        return torch.ones((1,) if kind[2] else (), dtype=kind[1]) if kind[0] == "tensor" else kind[2]

    out = func(*map(example, args), **{name: example(kind) for name, kind in kwargs})
    return out.dtype if isinstance(out, Tensor) else None


def _result_strides(shape: list[int], tensors: Sequence[Tensor]) -> Sequence[int]:
    """An elementwise result's strides: its dimensions lie in memory in the operands' order, the first operand's before the others'
    (aten/src/ATen/TensorIterator.cpp, fast_set_up and reorder_dimensions)."""
    first = tensors[0].stride()
    same = all(list(tensor.shape) == shape and tensor.stride() == first for tensor in tensors)
    if same and _is_dense(shape, first):
        return first
    operands = [_broadcast_strides(tensor, shape) for tensor in tensors]
    order = list(reversed(range(len(shape))))  # dimensions from the fastest to the slowest
    for i in range(1, len(order)):
        moving = i
        for at in reversed(range(i)):
            compared = _compare(shape, operands, order[at], order[moving])
            if compared > 0:
                order[at], order[moving], moving = order[moving], order[at], at
            elif compared < 0:
                break
    return _strides_in(order, shape)


def _compare(shape: list[int], operands: list[list[int]], a: int, b: int) -> int:
    """1: dimension b is faster than a; -1: a is faster; 0: no operand decides."""
    for strides in operands:
        if strides[a] == 0 or strides[b] == 0:
            continue
        if strides[a] != strides[b]:
            return -1 if strides[a] < strides[b] else 1
        if shape[a] > shape[b]:
            return 1
    return 0


def _broadcast_strides(tensor: Tensor, shape: list[int]) -> list[int]:
    """The tensor's strides with 0 for dimensions in which it is repeated."""
    missing = len(shape) - tensor.ndim
    own = zip(tensor.shape, shape[missing:], tensor.stride(), strict=True)
    return [0] * missing + [0 if size == 1 and wanted != 1 else stride for size, wanted, stride in own]


def _strides_in(order: Sequence[int], shape: list[int]) -> list[int]:
    """Dense strides with the dimensions in this order, the fastest first."""
    strides, step = [1] * len(shape), 1
    for dim in order:
        strides[dim] = step
        step *= max(shape[dim], 1)
    return strides


def _is_dense(shape: list[int], strides: Sequence[int]) -> bool:
    order = sorted(range(len(shape)), key=lambda dim: (strides[dim], shape[dim]))
    return all(shape[dim] == 1 or strides[dim] == dense for dim, dense in enumerate(_strides_in(order, shape)))
