"""4-bit codes chosen by second-order rounding, on text (GPTQ: Frantar et al. 2022, arXiv:2210.17323).

Plain rounding takes the nearest code of each weight. What a layer's output feels is another error: with inputs x and
H = sum x x^T it is tr((Q - W) H (Q - W)^T). GPTQ rounds one input column after the other and lets the columns that are still to
come make up for the error (section 3.1, eq. 2 and 3). Scales and layout stay bitsandbytes' own, so a file has the same bytes a
weight and the same readers; only the codes differ.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.nf4.reference import midpoints_and_order
from .blockwise import QuantState, quantize_4bit
from .linear import NF4Linear

DAMPING = 0.01  # of H's mean diagonal, added to it (the paper's section 3.3, step 3)
LAZY = 128  # columns whose errors are passed on to later ones together (step 2); changes rounding errors alone


def calibrated_4bit(
    weight: Tensor,  # (out, in), float
    hessian: Tensor,  # (in, in) float32: sum of x x^T over the layer's inputs
    quant_type: str = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = True,
    damping: float = DAMPING,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` with its scales, but codes that keep the layer's outputs: packed and state.

    Columns are taken in the order of H's diagonal, largest first. The result's output error is at most plain rounding's: where
    it were not, the plain codes are returned. Raises ValueError as `quantize_4bit` does, for a Hessian of another shape and for
    one that isn't finite.
    """
    n_in = weight.shape[1]
    if hessian.shape != (n_in, n_in) or not hessian.isfinite().all():
        raise ValueError(
            f"hessian: expected finite ({n_in}, {n_in}) values for a weight {tuple(weight.shape)}, got {tuple(hessian.shape)} "
            f"with {int((~hessian.isfinite()).sum())} that are not finite"
        )
    packed, state = quantize_4bit(weight, quant_type, block_size=block_size, double_quant=double_quant)
    scale = state.absmax.repeat_interleave(block_size)[: weight.numel()].view(weight.shape)
    full = weight.detach().float()
    plain = unpack(packed, weight.numel()).view(weight.shape)
    codes = round_columns(full, hessian.float(), scale, state.codebook, damping=damping)
    errors = [output_error(state.codebook[c.int()] * scale - full, hessian) for c in (codes, plain)]
    return (pack(codes), state) if errors[0] <= errors[1] else (packed, state)


def output_error(error: Tensor, hessian: Tensor) -> float:  # (out, in), (in, in)
    """tr(E H E^T): the summed squared change of the layer's outputs on the calibration text."""
    return float(((error @ hessian.float()) * error).sum(dtype=torch.float64))


def round_columns(
    weight: Tensor,  # (out, in) float32
    hessian: Tensor,  # (in, in) float32
    scale: Tensor,  # (out, in) float32: of each weight's block
    codebook: Tensor,  # (16,) float32
    *,
    damping: float,
) -> Tensor:  # (out, in) uint8
    """GPTQ (algorithm 1) with a scale given for each weight."""
    midpoints, code_of = midpoints_and_order(codebook)
    ascending = codebook[code_of]
    order = hessian.diagonal().argsort(descending=True)
    upper = inverse_factor(hessian[order][:, order], damping)
    rest, scales = weight.T[order].clone(), scale.T[order]  # (in, out): a column of the weight is contiguous
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(order), LAZY):
        stop = min(start + LAZY, len(order))
        errors = torch.empty_like(rest[start:stop])
        for i in range(start, stop):
            scaled = torch.where(scales[i] == 0, 0.0, rest[i] / scales[i])  # (out,)
            nearest = torch.bucketize(scaled, midpoints)
            codes[i] = code_of[nearest].to(torch.uint8)
            error = (rest[i] - ascending[nearest] * scales[i]) / upper[i, i]
            rest[i:stop].addr_(upper[i, i:stop], error, alpha=-1)
            errors[i - start] = error
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return unordered.T.contiguous()


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of H's inverse; its row i passes column i's error on to the later ones.

    An input that was never active has no say. Damping is raised tenfold until the factor exists in float32.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal.add_(damping * mean if mean > 0 else 1.0)
    while True:
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
        diagonal.add_(damping * mean)


def pack(codes: Tensor) -> Tensor:
    """Codes -> (ceil(n / 2), 1) uint8, the even one in the high nibble."""
    flat = codes.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_full((1,), 7)])
    return (flat[0::2] << 4 | flat[1::2])[:, None]


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first n codes, uint8."""
    pairs = packed.reshape(-1)
    return torch.stack([pairs >> 4, pairs & 15], 1).view(-1)[:n]


class _Captured(Exception):
    """Ends a forward pass once the first block's input is known."""


@torch.no_grad()
def calibrate_(
    model: nn.Module,  # its linears in 4 bits already; their codes are replaced
    blocks: Sequence[
        tuple[str, nn.Module]
    ],  # paths and modules that run one after the other: hidden states -> hidden states
    batches: Sequence[Tensor],  # what the model is called with
    read_weight: Callable[[str], Tensor],  # a weight's name -> the weight in full precision
    *,
    on_block: Callable[[int], None] = lambda done: None,
) -> int:
    """Choose every block's 4-bit codes again by GPTQ, in place; returns how many layers.

    Block by block, each on the outputs of those before in their final form, and in a block layer by layer in the order in which
    they run. In memory beside the model: the hidden states of all batches, one Hessian (in, in), one weight in full precision.
    A block is called with its hidden states first. Raises ValueError for a layer that the batches never reach.
    """
    calls = [first_call(model, blocks[0][1], batch) for batch in batches]
    n_layers = 0
    for done, (path, block) in enumerate(blocks, 1):
        for names in layers_in_order(path, block, calls[0]):
            layers = [block.get_submodule(name) for name in names]
            hessian = input_hessian(block, layers[0], calls)
            for name, layer in zip(names, layers, strict=True):
                assert isinstance(layer, NF4Linear)
                weight = read_weight(f"{path}.{name}.weight").to(layer.packed.device)
                layer.set_packed_(
                    *calibrated_4bit(
                        weight,
                        hessian,
                        layer.quant_type,
                        block_size=layer.block_size,
                        double_quant=layer.double_quant,
                    )
                )
                n_layers += 1
        for i, (args, kwargs) in enumerate(calls):  # in place: the hidden states are the most that is held
            calls[i] = (hidden_states(block(*args, **kwargs)), *args[1:]), kwargs
        on_block(done)
    return n_layers


Call = tuple[tuple[Any, ...], dict[str, Any]]


def first_call(model: nn.Module, block: nn.Module, batch: Tensor) -> Call:
    """What the model calls its first block with."""
    calls: list[Call] = []

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _Captured

    handle = block.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        model(batch)
    except _Captured:
        return calls[0]
    finally:
        handle.remove()
    raise ValueError("the model ran without its first block; give blocks that its forward pass runs through")


def hidden_states(output: Any) -> Tensor:
    """A block's first output."""
    return output[0] if isinstance(output, tuple) else output


def layers_in_order(path: str, block: nn.Module, call: Call) -> list[list[str]]:
    """The block's 4-bit layers as they run; those that take the same tensor (q, k and v) together."""
    runs: list[tuple[Tensor, str]] = []
    named = [(name, module) for name, module in block.named_modules() if isinstance(module, NF4Linear)]

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: runs.append((args[0], name))

    handles = [module.register_forward_pre_hook(recorder(name)) for name, module in named]
    try:
        block(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[str]] = []
    last = None
    for x, name in runs:
        if x is not last:
            groups.append([])
        groups[-1].append(name)
        last = x
    missed = {name for name, _ in named} - {name for group in groups for name in group}
    if missed:
        raise ValueError(f"{path}.{min(missed)} never ran on the calibration text, so its codes can't be chosen by it")
    return groups


def input_hessian(block: nn.Module, layer: nn.Module, calls: Sequence[Call]) -> Tensor:  # (in, in) float32
    """sum x x^T over all inputs that the layer gets."""
    total: list[Tensor] = []

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        if not total:
            total.append(x.new_zeros(x.shape[-1], x.shape[-1]))
        total[0].addmm_(x.T, x)
        raise _Captured

    handle = layer.register_forward_pre_hook(add)
    try:
        for args, kwargs in calls:
            try:
                block(*args, **kwargs)
            except _Captured:
                continue
    finally:
        handle.remove()
    return total[0]
