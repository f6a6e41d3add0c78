"""4-bit quantization as PyTorch operators: opaque to torch.compile, shapes known to fake and meta tensors.

As operators they cost memory for their results alone, real or fake, which is what a memory prediction counts. CPU tensors go
to Numba, a GPU's to Triton where a kernel exists, all others to the reference. Each implementation checks its tensors before
an address is read (numba_cpu does it where this file only passes a weight on). An operator takes a PackedWeight as the list of
its tensors, the block size and the shape.

`torch.library.custom_op` would say the same in fewer lines and add 10 us a call: as much as a small weight's dequantization,
for which even the operator is bypassed where nothing needs to see it (`is_watched`).
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import choose_backend
from . import reference
from .weight import (
    CODES,
    NESTED_BLOCK_SIZE,
    NESTED_CODES,
    PackedWeight,
    check_block_size,
    check_float,
    check_packed,
    check_tensor,
)

COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what Numba's CPU path reads and writes
CHUNK = 2**24  # weights that the reference quantizes at a time: its temporaries take 20 bytes each

SCHEMAS = {
    "quantize_4bit": "(Tensor weight, Tensor codebook, int block_size) -> (Tensor, Tensor)",
    "dequantize_4bit": "(Tensor[] weight, int block_size, SymInt[] shape, ScalarType dtype) -> Tensor",
    "quantize_absmax": "(Tensor shifted, Tensor nested_codebook) -> (Tensor, Tensor)",
    "dequantize_absmax": "(Tensor absmax_q, Tensor absmax_scale, Tensor absmax_mean, Tensor nested_codebook) -> Tensor",
    "linear_4bit": "(Tensor x, Tensor? bias, Tensor[] weight, int block_size, SymInt[] shape) -> Tensor",
    "linear_4bit_gradient": "(Tensor grad, Tensor[] weight, int block_size, SymInt[] shape) -> Tensor",
    "quantize_8bit": "(Tensor values, Tensor bounds, int block_size) -> (Tensor, Tensor)",
    "dequantize_8bit": "(Tensor codes, Tensor absmax, Tensor codebook, int block_size) -> Tensor",
}
for name, schema in SCHEMAS.items():
    torch.library.define(f"graft::{name}", schema, tags=torch.Tag.pt2_compliant_tag)


def quantize_4bit(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes (ceil(n / 2), 1) uint8 and absmax (n_blocks,) float32; see reference.quantize_4bit.

    Raises ValueError for a weight that isn't floating point or not finite, a codebook that isn't 16 float32 on the
    weight's device, and an odd block size.
    """
    return torch.ops.graft.quantize_4bit.default(weight, codebook, block_size)


@torch.library.impl("graft::quantize_4bit", "default")
def _quantize_4bit(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    check_float("weight", weight)
    check_tensor("codebook", codebook, torch.float32, CODES, weight.device)
    check_block_size(block_size, even=True)
    if weight.device.type == "cpu" and weight.dtype in COMPILED_DTYPES:
        return _numba_cpu().quantize_4bit(weight, codebook, block_size=block_size)
    size = max(1, CHUNK // block_size) * block_size  # whole blocks
    parts = [reference.quantize_4bit(part, codebook, block_size=block_size) for part in weight.reshape(-1).split(size)]
    return parts[0] if len(parts) == 1 else (torch.cat([p for p, _ in parts]), torch.cat([a for _, a in parts]))


@torch.library.register_fake("graft::quantize_4bit")
def _(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    packed = weight.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty((-(-n // block_size),), dtype=torch.float32)


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight; see reference.dequantize_4bit. Raises ValueError for tensors that do not fit its shape."""
    packed = weight.packed
    if not torch.compiler.is_compiling() and not is_watched(packed) and packed.is_cpu and dtype in COMPILED_DTYPES:
        return _numba_cpu().dequantize_4bit(weight, dtype)
    return torch.ops.graft.dequantize_4bit.default(weight.tensors, weight.block_size, weight.shape, dtype)


def dequantize_4bit_(out: Tensor, weight: PackedWeight) -> None:
    """`dequantize_4bit` into memory that is there already: fresh small pages cost several times the arithmetic.

    `out` is a contiguous CPU tensor of the weight's size and one of COMPILED_DTYPES; it is overwritten. Raises ValueError
    for another `out`, and for tensors that do not fit the weight's shape.
    """
    _numba_cpu().dequantize_4bit_(out, weight)


@torch.library.impl("graft::dequantize_4bit", "default")
def _dequantize_4bit(tensors: Sequence[Tensor], block_size: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    weight = PackedWeight.of(tensors, block_size, shape)
    if weight.packed.device.type == "cpu" and dtype in COMPILED_DTYPES:
        return _numba_cpu().dequantize_4bit(weight, dtype)
    check_packed(weight)
    if choose_backend("nf4", "auto", (weight.codebook,)) == "triton":
        from .triton_dequantize import dequantize_4bit_triton

        return dequantize_4bit_triton(weight, dtype)
    return reference.dequantize_4bit(weight, dtype)


@torch.library.register_fake("graft::dequantize_4bit")
def _(tensors: Sequence[Tensor], block_size: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(shape, dtype=dtype)


def is_watched(tensor: Tensor) -> bool:
    """True if a dispatch mode, tensor subclass, torch.func transform or tracer must see this operator.

    Where none must, its code is called directly, which halves the call's cost (24 to 12 us). A profiler doesn't see it then.
    """
    return (
        type(tensor) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._get_tracing_state() is not None
    )


def quantize_absmax(shifted: Tensor, nested_codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The second level: absmax minus its mean in 8 bits, and a scale for every 256; see reference.quantize_8bit_by_table."""
    return torch.ops.graft.quantize_absmax.default(shifted, nested_codebook)


@torch.library.impl("graft::quantize_absmax", "default")
def _quantize_absmax(shifted: Tensor, nested_codebook: Tensor) -> tuple[Tensor, Tensor]:
    check_float("shifted", shifted)
    check_tensor("nested_codebook", nested_codebook, torch.float32, NESTED_CODES, shifted.device)
    if shifted.device.type == "cpu":
        return _numba_cpu().quantize_absmax(shifted, nested_codebook)
    return reference.quantize_8bit_by_table(shifted, nested_codebook, block_size=NESTED_BLOCK_SIZE)


@torch.library.register_fake("graft::quantize_absmax")
def _(shifted: Tensor, nested_codebook: Tensor) -> tuple[Tensor, Tensor]:
    scale = shifted.new_empty((-(-shifted.numel() // NESTED_BLOCK_SIZE),), dtype=torch.float32)
    return torch.empty_like(shifted, dtype=torch.uint8, memory_format=torch.contiguous_format), scale


def dequantize_absmax(absmax_q: Tensor, absmax_scale: Tensor, absmax_mean: Tensor, nested_codebook: Tensor) -> Tensor:
    """The first level's absmax, float32, from a DoubleQuantized's tensors; see reference.dequantize_absmax."""
    return torch.ops.graft.dequantize_absmax.default(absmax_q, absmax_scale, absmax_mean, nested_codebook)


@torch.library.impl("graft::dequantize_absmax", "default")
def _dequantize_absmax(absmax_q: Tensor, absmax_scale: Tensor, absmax_mean: Tensor, nested_codebook: Tensor) -> Tensor:
    n_blocks, device = absmax_q.numel(), absmax_q.device
    check_tensor("absmax_q", absmax_q, torch.uint8, n_blocks, device)
    check_tensor("absmax_scale", absmax_scale, torch.float32, -(-n_blocks // NESTED_BLOCK_SIZE), device)
    check_tensor("absmax_mean", absmax_mean, torch.float32, 1, device)
    check_tensor("nested_codebook", nested_codebook, torch.float32, NESTED_CODES, device)
    if device.type == "cpu":
        return _numba_cpu().dequantize_absmax(absmax_q, absmax_scale, absmax_mean, nested_codebook)
    if choose_backend("nf4", "auto", (nested_codebook,)) == "triton":
        from .triton_dequantize import dequantize_absmax_triton

        return dequantize_absmax_triton(absmax_q, absmax_scale, absmax_mean, nested_codebook)
    return reference.dequantize_absmax(absmax_q, absmax_scale, absmax_mean, nested_codebook)


@torch.library.register_fake("graft::dequantize_absmax")
def _(absmax_q: Tensor, absmax_scale: Tensor, absmax_mean: Tensor, nested_codebook: Tensor) -> Tensor:
    return torch.empty_like(absmax_q, dtype=torch.float32, memory_format=torch.contiguous_format)


@torch.library.impl("graft::linear_4bit", "default")
def _linear_4bit(
    x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], block_size: int, shape: Sequence[int]
) -> Tensor:
    from .triton_product import forward_triton

    weight = PackedWeight.of(tensors, block_size, shape)
    check_product(x, weight, axis=1)
    if bias is not None and bias.numel() != shape[0]:
        raise ValueError(f"bias has {bias.numel()} values; the weight {tuple(shape)} needs {shape[0]}")
    return forward_triton(x, bias, weight)


@torch.library.register_fake("graft::linear_4bit")
def _(x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], block_size: int, shape: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.impl("graft::linear_4bit_gradient", "default")
def _linear_4bit_gradient(grad: Tensor, tensors: Sequence[Tensor], block_size: int, shape: Sequence[int]) -> Tensor:
    from .triton_product import backward_triton

    weight = PackedWeight.of(tensors, block_size, shape)
    check_product(grad, weight, axis=0)
    return backward_triton(grad, weight)


@torch.library.register_fake("graft::linear_4bit_gradient")
def _(grad: Tensor, tensors: Sequence[Tensor], block_size: int, shape: Sequence[int]) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], shape[1]))


def check_product(x: Tensor, weight: PackedWeight, *, axis: int) -> None:
    """Raise ValueError unless the weight is whole and x's last axis is the weight's axis 1 (forward) or 0 (gradient)."""
    check_packed(weight)
    if x.shape[-1] != weight.shape[axis]:
        raise ValueError(f"the last axis of {tuple(x.shape)} does not fit the weight's shape {tuple(weight.shape)}")


def quantize_8bit(values: Tensor, bounds: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes of the values' shape and absmax (n_blocks,) float32; see reference.quantize_8bit."""
    return torch.ops.graft.quantize_8bit.default(values, bounds, block_size)


@torch.library.impl("graft::quantize_8bit", "default")
def _quantize_8bit(values: Tensor, bounds: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    check_float("values", values)
    check_tensor("bounds", bounds, torch.float32, NESTED_CODES - 1, values.device)
    check_block_size(block_size, even=False)
    if values.device.type == "cpu":
        return _numba_cpu().quantize_8bit(values, bounds, block_size=block_size)
    return reference.quantize_8bit(values, bounds, block_size=block_size)


@torch.library.register_fake("graft::quantize_8bit")
def _(values: Tensor, bounds: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    absmax = values.new_empty((-(-values.numel() // block_size),), dtype=torch.float32)
    return torch.empty_like(values, dtype=torch.uint8, memory_format=torch.contiguous_format), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    """codebook[code] * absmax[block], float32; see reference.dequantize_8bit."""
    return torch.ops.graft.dequantize_8bit.default(codes, absmax, codebook, block_size)


@torch.library.impl("graft::dequantize_8bit", "default")
def _dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    check_block_size(block_size, even=False)
    n, device = codes.numel(), codes.device
    check_tensor("codes", codes, torch.uint8, n, device)
    check_tensor("absmax", absmax, torch.float32, -(-n // block_size), device)
    check_tensor("codebook", codebook, torch.float32, NESTED_CODES, device)
    if device.type == "cpu":
        return _numba_cpu().dequantize_8bit(codes, absmax, codebook, block_size=block_size)
    return reference.dequantize_8bit(codes, absmax, codebook, block_size=block_size)


@torch.library.register_fake("graft::dequantize_8bit")
def _(codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32, memory_format=torch.contiguous_format)


@cache
def _numba_cpu() -> ModuleType:
    """numba_cpu, imported late: an import statement asks the import system each time, a tenth of a small weight's time."""
    from . import numba_cpu

    return numba_cpu
