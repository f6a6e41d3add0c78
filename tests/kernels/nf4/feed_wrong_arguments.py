"""Run by test_safety.py in a process of its own: `feed_wrong_arguments.py ENTRY` prints how many wrong calls were refused."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from graft.kernels import nf4
from graft.kernels.nf4 import DoubleQuantized, PackedWeight
from graft.quant.codebooks import codebook, dynamic8

CODEBOOK, NESTED = torch.tensor(codebook("nf4")), torch.tensor(dynamic8())
BOUNDS = (NESTED[1:] + NESTED[:-1]) / 2
SHAPE = (300, 128)  # 600 blocks of 64: three scales on the second level
WEIGHT = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
FAR = 2**40  # as a code it would be read a tebibyte away


def main() -> None:
    entry = sys.argv[1]
    call, arguments = entries()[entry]
    call(*arguments)  # the right ones pass
    n = 0
    for i, argument in enumerate(arguments):
        for wrong in wrongs(argument, values=i == 0 and entry.startswith("quantize")):
            if i == 0 and entry == "dequantize_4bit_" and wrong.dtype in (torch.float32, torch.float16):
                continue  # where the result goes, any of the three dtypes is right
            changed = [*arguments[:i], wrong, *arguments[i + 1 :]]
            try:
                call(*changed)
            except ValueError:
                n += 1
            else:
                raise AssertionError(f"{entry}: argument {i} as {described(wrong)} was accepted")
    print(n)


def wrongs(argument: Any, *, values: bool) -> Iterator[Any]:
    """The same tensor in other dtypes and lengths; `values` to be quantized may have any float dtype and length."""
    if isinstance(argument, int):
        yield from (0, -1, -argument, *((63, 1) if argument == 64 else ()))
        return
    for dtype in (
        torch.int64,
        torch.int32,
        torch.int8,
        torch.bool,
        torch.uint8,
        torch.float64,
        torch.float32,
        torch.float16,
    ):
        if dtype != argument.dtype and not (values and dtype.is_floating_point):
            yield torch.full(argument.shape, FAR if dtype == torch.int64 else 1).to(dtype)
    if not values:
        flat = argument.flatten()
        yield from (flat[:0], torch.cat([flat, flat]), flat.repeat(3))
        if len(flat) > 1:
            yield flat[: len(flat) // 2]
        if len(flat) in (16, 255, 256):
            yield from (flat[:4], flat[:-1])


def described(wrong: Any) -> str:
    return f"{tuple(wrong.shape)} {wrong.dtype} {wrong.device}" if isinstance(wrong, Tensor) else repr(wrong)


def entries() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Each entry: how it is called with tensors and numbers alone, right arguments."""
    packed, absmax = nf4.quantize_4bit(WEIGHT, CODEBOOK, 64)
    mean = absmax.mean()
    double = DoubleQuantized(*nf4.quantize_absmax(absmax - mean, NESTED), mean, NESTED)
    codes, code_absmax = nf4.quantize_8bit(WEIGHT.flatten(), BOUNDS, 256)
    single_tensors = [packed, CODEBOOK, absmax]
    tensors = [packed, CODEBOOK, *double]

    def dequantize(*arguments: Any) -> Tensor:
        return nf4.dequantize_4bit(PackedWeight.of(arguments[:-1], arguments[-1], SHAPE), torch.float32)

    def into(*arguments: Any) -> None:
        nf4.dequantize_4bit_(arguments[0], PackedWeight.of(arguments[1:], 64, SHAPE))

    def product(*arguments: Any) -> Tensor:
        x = torch.ones(2, SHAPE[1], requires_grad=True)
        y = nf4.linear_4bit(x, PackedWeight.of(arguments[:-1], arguments[-1], SHAPE))
        return torch.autograd.grad(y.sum(), x)[0]

    return {
        "quantize_4bit": (nf4.quantize_4bit, [WEIGHT, CODEBOOK, 64]),
        "quantize_absmax": (nf4.quantize_absmax, [(absmax - mean)[None], NESTED]),
        "quantize_8bit": (nf4.quantize_8bit, [WEIGHT, BOUNDS, 256]),
        "dequantize_8bit": (nf4.dequantize_8bit, [codes, code_absmax, NESTED, 256]),
        "dequantize_absmax": (nf4.dequantize_absmax, list(double)),
        "dequantize_4bit": (dequantize, [*single_tensors, 64]),
        "dequantize_4bit_double": (dequantize, [*tensors, 64]),
        "dequantize_4bit_": (into, [torch.empty(SHAPE, dtype=torch.bfloat16), *tensors]),
        "linear_4bit": (product, [*tensors, 64]),
    }


if __name__ == "__main__":
    main()
