"""4-bit quantization as PyTorch operators: opaque to torch.compile, shapes known to fake and meta tensors.

As operators they cost memory for their results alone, real or fake, which is what a memory prediction counts. CPU tensors go
to Numba, a GPU's to Triton where a kernel exists, all others to the reference. `torch.library.custom_op` would say the
same in fewer lines and add 10 us a call: as much as a small weight's dequantization, for which even the operator is
bypassed where nobody wants to see it (`is_watched`).
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .. import huge_pages
from ..dispatch import choose_backend
from . import reference

NESTED_BLOCK_SIZE = 256  # absmax values that share one scale on the second level
COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what Numba's CPU path reads and writes
CHUNK = 2**24  # weights that the reference quantizes at a time: its temporaries take 20 bytes each

SCHEMAS = {
    "quantize_4bit": "(Tensor weight, Tensor codebook, int block_size) -> (Tensor, Tensor)",
    "quantize_absmax": "(Tensor shifted, Tensor nested_codebook) -> (Tensor, Tensor)",
    "dequantize_4bit": "(Tensor packed, Tensor absmax, Tensor[] nested, Tensor codebook, int block_size, SymInt[] shape, "
    "ScalarType dtype) -> Tensor",
    "dequantize_absmax": "(Tensor absmax_q, Tensor absmax_scale, Tensor absmax_mean, Tensor nested_codebook) -> Tensor",
    "linear_4bit": "(Tensor x, Tensor? bias, Tensor packed, Tensor absmax, Tensor[] nested, Tensor codebook, int block_size, "
    "SymInt out_features) -> Tensor",
    "linear_4bit_gradient": "(Tensor grad, Tensor packed, Tensor absmax, Tensor[] nested, Tensor codebook, int block_size, "
    "SymInt in_features) -> Tensor",
    "quantize_8bit": "(Tensor values, Tensor borders, int block_size) -> (Tensor, Tensor)",
    "dequantize_8bit": "(Tensor codes, Tensor absmax, Tensor codebook, int block_size) -> Tensor",
}
for name, schema in SCHEMAS.items():
    torch.library.define(f"graft::{name}", schema, tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl("graft::quantize_4bit", "default")
def _quantize_4bit(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    if weight.device.type == "cpu" and weight.dtype in COMPILED_DTYPES:
        return _numba_cpu().quantize_4bit(weight, codebook, block_size=block_size)
    parts = [reference.quantize_4bit(part, codebook, block_size=block_size) for part in weight.reshape(-1).split(CHUNK)]
    return parts[0] if len(parts) == 1 else (torch.cat([p for p, _ in parts]), torch.cat([a for _, a in parts]))


@torch.library.register_fake("graft::quantize_4bit")
def _(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    packed = weight.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty((-(-n // block_size),), dtype=torch.float32)


@torch.library.impl("graft::quantize_absmax", "default")
def _quantize_absmax(shifted: Tensor, nested_codebook: Tensor) -> tuple[Tensor, Tensor]:
    if shifted.device.type == "cpu":
        return _numba_cpu().quantize_absmax(shifted, nested_codebook, block_size=NESTED_BLOCK_SIZE)
    return reference.quantize_8bit_by_table(shifted, nested_codebook, block_size=NESTED_BLOCK_SIZE)


@torch.library.register_fake("graft::quantize_absmax")
def _(shifted: Tensor, nested_codebook: Tensor) -> tuple[Tensor, Tensor]:
    scale = shifted.new_empty((-(-shifted.numel() // NESTED_BLOCK_SIZE),), dtype=torch.float32)
    return shifted.new_empty(shifted.shape, dtype=torch.uint8), scale  # torch.empty_like imports sympy


def _dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    codebook: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    if packed.device.type == "cpu" and dtype in COMPILED_DTYPES:
        out = huge_pages.empty(shape, dtype)
        dequantize_4bit_(out, packed, absmax, nested, codebook, block_size)
        return out
    if choose_backend("nf4", "auto", (codebook,)) == "triton":
        from .triton_dequantize import dequantize_4bit_triton

        return dequantize_4bit_triton(
            packed, absmax, nested, codebook, block_size=block_size, shape=tuple(shape), dtype=dtype
        )
    if nested:
        absmax = reference.dequantize_absmax(absmax, *nested, nested_block_size=NESTED_BLOCK_SIZE)
    return reference.dequantize_4bit(packed, absmax, codebook, block_size=block_size, shape=tuple(shape), dtype=dtype)


torch.library.impl("graft::dequantize_4bit", "default", _dequantize_4bit)


@torch.library.register_fake("graft::dequantize_4bit")
def _(
    packed: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    codebook: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


@torch.library.impl("graft::dequantize_absmax", "default")
def _dequantize_absmax(absmax_q: Tensor, absmax_scale: Tensor, absmax_mean: Tensor, nested_codebook: Tensor) -> Tensor:
    if absmax_q.device.type == "cpu":
        return _numba_cpu().dequantize_absmax(absmax_q, absmax_scale, absmax_mean, nested_codebook)
    if choose_backend("nf4", "auto", (nested_codebook,)) == "triton":
        from .triton_dequantize import dequantize_absmax_triton

        return dequantize_absmax_triton(absmax_q, absmax_scale, absmax_mean, nested_codebook)
    return reference.dequantize_absmax(
        absmax_q, absmax_scale, absmax_mean, nested_codebook, nested_block_size=NESTED_BLOCK_SIZE
    )


@torch.library.register_fake("graft::dequantize_absmax")
def _(absmax_q: Tensor, absmax_scale: Tensor, absmax_mean: Tensor, nested_codebook: Tensor) -> Tensor:
    return absmax_q.new_empty(absmax_q.shape, dtype=torch.float32)


@torch.library.impl("graft::linear_4bit", "default")
def _linear_4bit(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    codebook: Tensor,
    block_size: int,
    out_features: int,
) -> Tensor:
    from .triton_product import forward_triton

    return forward_triton(x, bias, packed, absmax, nested, codebook, block_size=block_size, out_features=out_features)


@torch.library.register_fake("graft::linear_4bit")
def _(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    codebook: Tensor,
    block_size: int,
    out_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.impl("graft::linear_4bit_gradient", "default")
def _linear_4bit_gradient(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    codebook: Tensor,
    block_size: int,
    in_features: int,
) -> Tensor:
    from .triton_product import backward_triton

    return backward_triton(grad, packed, absmax, nested, codebook, block_size=block_size, in_features=in_features)


@torch.library.register_fake("graft::linear_4bit_gradient")
def _(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    codebook: Tensor,
    block_size: int,
    in_features: int,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.impl("graft::quantize_8bit", "default")
def _quantize_8bit(values: Tensor, borders: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    if values.device.type == "cpu":
        return _numba_cpu().quantize_8bit(values, borders, block_size=block_size)
    return reference.quantize_8bit(values, borders, block_size=block_size)


@torch.library.register_fake("graft::quantize_8bit")
def _(values: Tensor, borders: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    absmax = values.new_empty((-(-values.numel() // block_size),), dtype=torch.float32)
    return torch.empty_like(values, dtype=torch.uint8, memory_format=torch.contiguous_format), absmax


@torch.library.impl("graft::dequantize_8bit", "default")
def _dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    if codes.device.type == "cpu":
        return _numba_cpu().dequantize_8bit(codes, absmax, codebook, block_size=block_size)
    return reference.dequantize_8bit(codes, absmax, codebook, block_size=block_size)


@torch.library.register_fake("graft::dequantize_8bit")
def _(codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32, memory_format=torch.contiguous_format)


def quantize_4bit(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes (ceil(n / 2), 1) uint8 and absmax (n_blocks,) float32; see reference.quantize_4bit."""
    return torch.ops.graft.quantize_4bit.default(weight, codebook, block_size)


def quantize_absmax(shifted: Tensor, nested_codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The second level: absmax minus its mean in 8 bits, and a scale for every 256; see reference.quantize_8bit_by_table."""
    return torch.ops.graft.quantize_absmax.default(shifted, nested_codebook)


def dequantize_4bit(
    packed: Tensor,  # (ceil(n / 2), 1) uint8
    absmax: Tensor,  # (n_blocks,) float32, or uint8 with the second level
    nested: Sequence[Tensor],  # absmax_scale, absmax_mean and the (256,) codebook; empty without the second level
    codebook: Tensor,  # (16,) float32
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight; see reference.dequantize_4bit."""
    if not torch.compiler.is_compiling() and not is_watched(packed) and packed.is_cpu and dtype in COMPILED_DTYPES:
        return _dequantize_4bit(packed, absmax, nested, codebook, block_size, shape, dtype)
    return torch.ops.graft.dequantize_4bit.default(packed, absmax, nested, codebook, block_size, shape, dtype)


def is_watched(tensor: Tensor) -> bool:
    """Whether somebody wants to see the operator: a mode, a subclass of Tensor, a transform of torch.func, a tracer.

    Where nobody does, its code is called directly, which halves the call's cost (24 to 12 us). A profiler doesn't see it then.
    """
    return (
        type(tensor) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._get_tracing_state() is not None
    )


def dequantize_4bit_(
    out: Tensor,  # contiguous CPU tensor of a COMPILED_DTYPES; is overwritten
    packed: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor],
    codebook: Tensor,
    block_size: int,
) -> None:
    """`dequantize_4bit` into memory that is there already: fresh small pages cost several times the arithmetic."""
    _numba_cpu().dequantize_4bit_(out, packed, absmax, nested, codebook, block_size=block_size)


@cache
def _numba_cpu() -> ModuleType:
    """numba_cpu, imported late: an import statement asks the import system each time, a tenth of a small weight's time."""
    from . import numba_cpu

    return numba_cpu


def dequantize_absmax(absmax_q: Tensor, absmax_scale: Tensor, absmax_mean: Tensor, nested_codebook: Tensor) -> Tensor:
    """The first level's absmax; see reference.dequantize_absmax."""
    return torch.ops.graft.dequantize_absmax.default(absmax_q, absmax_scale, absmax_mean, nested_codebook)


def quantize_8bit(values: Tensor, borders: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes of the values' shape and absmax (n_blocks,) float32; see reference.quantize_8bit."""
    return torch.ops.graft.quantize_8bit.default(values, borders, block_size)


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    """codebook[code] * absmax[block], float32; see reference.dequantize_8bit."""
    return torch.ops.graft.dequantize_8bit.default(codes, absmax, codebook, block_size)
