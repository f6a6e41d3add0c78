"""Rules for shapes, strides and dtypes of our own, against the operators on real tensors."""

import random

import pytest
import torch
from torch import Tensor

from graft.finetune.memory.shapes import ShapeTensor, run_on_shapes

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def any_tensor(draw: random.Random, shape: list[int]) -> Tensor:
    """Of this shape, its dimensions in any order in memory."""
    order = list(range(len(shape)))
    draw.shuffle(order)
    tensor = torch.ones([shape[dim] for dim in order], dtype=draw.choice(DTYPES))
    return tensor.permute([order.index(dim) for dim in range(len(shape))])


def same(real: Tensor, found: Tensor) -> bool:
    """Equal shapes, dtypes and strides (those of dimensions of size 1 have no meaning)."""
    strides = [[stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (real, found)]
    return (real.shape, real.dtype, strides[0]) == (found.shape, found.dtype, strides[1])


@pytest.mark.parametrize("func", [aten.mul.Tensor, aten.div.Tensor, aten.gt.Tensor, aten.exp.default, aten.where.self])
def test_elementwise_operators(func: torch._ops.OpOverload) -> None:
    """Parity with PyTorch's CPU operators over random shapes, broadcasts, memory orders and dtypes."""
    draw = random.Random(0)
    n = sum(argument.type.kind() == "TensorType" for argument in func._schema.arguments)
    for _ in range(300):
        shape = [draw.choice([2, 3, 4]) for _ in range(draw.randint(0, 4))]
        tensors = [any_tensor(draw, [size if draw.random() < 0.8 else 1 for size in shape]) for _ in range(n)]
        if func is aten.where.self:
            tensors[0] = tensors[0] > 0
        assert same(func(*tensors), run_on_shapes(func, tensors, {})), [(t.shape, t.stride(), t.dtype) for t in tensors]


@pytest.mark.parametrize(
    ("func", "args", "options"),
    [
        (aten.cat.default, ([torch.ones(2, 3), torch.ones(2, 5)], -1), {}),
        (aten.cat.default, ([torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)],), {}),
        (aten.stack.default, ([torch.ones(2, 3)] * 4,), {}),
        (aten.mean.dim, (torch.ones(2, 3, 4), [-1], True), {}),
        (aten.mean.dim, (torch.ones(2, 3, 4), [0, 2]), {"dtype": torch.float64}),
        (aten.mean.default, (torch.ones(2, 3),), {}),
        (aten.all.default, (torch.ones(2, 3),), {}),
        (aten.amax.default, (torch.ones(2, 3), [1]), {}),
        (aten.linalg_vector_norm.default, (torch.ones(2, 3),), {}),
        (aten.mm.default, (torch.ones(2, 3), torch.ones(3, 4)), {}),
        (aten.mv.default, (torch.ones(2, 3), torch.ones(3)), {}),
        (aten.embedding.default, (torch.ones(9, 4), torch.ones(2, 3, dtype=torch.int64)), {}),
        (aten.zeros_like.default, (torch.ones(2, 3, 4).transpose(0, 2),), {"dtype": torch.float16}),
        (aten.empty_like.default, (torch.ones(2, 3).t(),), {"memory_format": torch.contiguous_format}),
        (aten.arange.default, (7,), {}),
        (aten.arange.start_step, (1, 8, 3), {}),
        (aten.arange.start, (0.0, 2.5), {}),
    ],
)
def test_other_rules(func: torch._ops.OpOverload, args: tuple[object, ...], options: dict[str, object]) -> None:
    """Parity with the operator on real tensors."""
    assert same(func(*args, **options), run_on_shapes(func, args, options))


def test_in_place_operators_return_their_argument() -> None:
    x = run_on_shapes(aten.empty.memory_format, ([2, 3],), {})
    assert isinstance(x, ShapeTensor)
    assert run_on_shapes(aten.mul_.Tensor, (x, 2.0), {}) is x
    assert x.device.type == "cpu"
