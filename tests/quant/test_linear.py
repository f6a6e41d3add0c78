"""NF4Linear is the linear layer of its dequantized weight, in every mode in which a model is trained."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from graft.quant import NF4Linear, quantize_linears_


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 41, bias=False))
    return nn.ModuleDict({"body": body, "lm_head": nn.Linear(41, 10)})


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model["lm_head"](model["body"](x))


def quantized_pair() -> tuple[nn.Module, nn.Module]:
    """A 4-bit model and the ordinary model with its dequantized weights."""
    model = small_model()
    plain = copy.deepcopy(model)
    quantize_linears_(model)
    for i in (0, 2):
        plain["body"][i].weight.data = model["body"][i].dequantize()
    return model, plain


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_and_input_gradient(dtype: torch.dtype, double_quant: bool) -> None:
    """Parity: output and gradients of the input and of an unfrozen bias equal nn.Linear's with the same weight."""
    torch.manual_seed(0)
    linear = nn.Linear(100, 33)
    layer = NF4Linear.from_linear(linear, double_quant=double_quant)
    assert not any(p.requires_grad for p in layer.parameters())
    layer.bias = nn.Parameter(linear.bias.detach().clone())
    plain = nn.Linear(100, 33).to(dtype)
    plain.weight.data = layer.dequantize(dtype)
    plain.bias.data = linear.bias.detach().to(dtype)
    x = torch.randn(2, 5, 100, dtype=dtype, requires_grad=True)
    y = torch.randn(2, 5, 33, dtype=dtype)
    (layer(x) * y).sum().backward()
    ours, x.grad = x.grad, None
    (plain(x) * y).sum().backward()
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(ours, x.grad)
    assert torch.allclose(layer.bias.grad, plain.bias.grad.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_gradcheck() -> None:
    """Law: the input's gradient is the derivative of the forward pass (float64 finite differences)."""
    layer = NF4Linear.from_linear(nn.Linear(12, 7))
    assert torch.autograd.gradcheck(layer, torch.randn(3, 12, dtype=torch.float64, requires_grad=True))


def test_autograd_keeps_neither_weight_nor_input() -> None:
    """Law: what is saved for the backward pass is the layer's own buffers, nothing of the weight's or input's size."""
    layer = NF4Linear.from_linear(nn.Linear(128, 128))
    own = {buffer.data_ptr() for buffer in layer.buffers()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(16, 128, requires_grad=True))
    assert saved
    assert {tensor.data_ptr() for tensor in saved} <= own


def test_compute_dtype() -> None:
    """Law: the product runs in compute_dtype and returns in the input's, under autocast in autocast's."""
    linear = nn.Linear(64, 32)
    layer = NF4Linear.from_linear(linear, compute_dtype=torch.bfloat16)
    x = torch.randn(4, 64)
    expected = nn.functional.linear(x.bfloat16(), layer.dequantize(torch.bfloat16), linear.bias.bfloat16())
    assert torch.equal(layer(x), expected.float())
    default = NF4Linear.from_linear(linear)
    assert default(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(default(x), expected)
        in_float32 = NF4Linear.from_linear(linear, compute_dtype=torch.float32)(x)
    assert torch.equal(in_float32, default(x).bfloat16())


def test_activation_checkpointing_and_deepcopy() -> None:
    """Law: recomputing activations changes no gradient, and a copy is the same model."""
    model, plain = quantized_pair()
    x = torch.randn(3, 64, requires_grad=True)
    run(copy.deepcopy(model), x).square().sum().backward()
    direct, x.grad = x.grad, None
    checkpoint(run, model, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(direct, x.grad)
    x.grad = None
    run(plain, x).square().sum().backward()
    assert torch.equal(direct, x.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, in torch 2.13
def test_compiles_in_one_graph() -> None:
    """Law: torch.compile sees the layer whole (no graph break) and computes the same."""
    model, _ = quantized_pair()
    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    y = compiled(model, x)
    y.sum().backward()
    ours, x.grad = x.grad, None
    run(model, x).sum().backward()
    assert torch.equal(y, run(model, x))
    assert torch.equal(ours, x.grad)


def test_fake_and_meta_tensors() -> None:
    """Law: a model on fake or meta tensors is quantized and stepped without its numbers, with the real shapes."""
    real = small_model()
    quantize_linears_(real)
    shapes = {name: (buffer.shape, buffer.dtype) for name, buffer in real.named_buffers()}
    with FakeTensorMode():
        fake = small_model()
        assert quantize_linears_(fake) == ["body.0", "body.2"]
        x = torch.randn(2, 64, requires_grad=True)
        run(fake, x).sum().backward()
        assert x.grad is not None
    with torch.device("meta"):
        meta = small_model()
        quantize_linears_(meta)
        assert run(meta, torch.randn(2, 64)).shape == (2, 10)
    for model in (fake, meta):
        assert {name: (buffer.shape, buffer.dtype) for name, buffer in model.named_buffers()} == shapes


def test_casting_a_model_keeps_the_weight() -> None:
    """Law: .to(dtype) casts the bias and leaves codes and scales, so the weight is the same."""
    model, _ = quantized_pair()
    before = model["body"][0].dequantize()
    model.to(torch.bfloat16)
    layer = model["body"][0]
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(torch.float32), before)


def test_names_what_changed_and_keeps_the_rest() -> None:
    """Law: the kept modules are the ones named, in full or by the last part; a shared module stays shared."""
    model = small_model()
    model["again"] = model["body"][0]
    head = model["lm_head"]
    assert sorted(quantize_linears_(model, keep=("lm_head", "body.2"))) == ["again", "body.0"]
    assert model["lm_head"] is head
    assert model["again"] is model["body"][0]
    assert isinstance(model["again"], NF4Linear)
    assert isinstance(model["body"][2], nn.Linear)


def test_refuses_an_already_quantized_model() -> None:
    model = small_model()
    quantize_linears_(model)
    with pytest.raises(ValueError, match=r"already quantized \(body.0 and 1 more\)"):
        quantize_linears_(model)


def test_a_layer_that_appears_twice_stays_shared() -> None:
    """Under two names of one module, and of two; both names are told."""
    model = nn.Module()
    model.a, model.inner = nn.Linear(64, 64), nn.Sequential(nn.ReLU())
    model.tied, model.inner.again = model.a, model.a
    assert sorted(quantize_linears_(model)) == ["a", "inner.again", "tied"]
    assert isinstance(model.a, NF4Linear)
    assert model.a is model.tied is model.inner.again


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("lm_head", r"^keep='lm_head' is one string; give a sequence of names, such as \('lm_head',\)$"),
        (("lmhead",), "^keep names 'lmhead', but no module has that name; linear layers: 0, 1$"),
    ],
)
def test_slips_in_keep(keep: Sequence[str], message: str) -> None:
    """What was meant to be kept is not quantized in silence."""
    with pytest.raises(ValueError, match=message):
        quantize_linears_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), keep=keep)


def test_a_weight_that_cannot_be_quantized_leaves_the_model_as_it_was() -> None:
    """The last layer's NaN is found before the first is changed."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    model[2].weight.data[3, 5] = float("nan")
    with pytest.raises(
        ValueError, match=r"^2\.weight: 1 of 4096 values are not finite, the first is nan at 197 of the"
    ):
        quantize_linears_(model)
    assert all(type(layer) is nn.Linear for layer in model)


def test_refuses_a_model_without_linears() -> None:
    with pytest.raises(ValueError, match="no linear layer to quantize in ModuleDict beside those kept: body, lm_head"):
        quantize_linears_(small_model(), keep=("body", "lm_head"))


def test_refuses_a_bare_linear() -> None:
    with pytest.raises(ValueError, match="itself a linear layer"):
        quantize_linears_(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda w: w.data.view(-1)[5].fill_(float("nan")),
            r"body.2.weight: 1 of 3936 values are not finite.* nan at 5",
        ),
        (
            lambda w: w.data.view(-1)[5].fill_(float("inf")),
            r"body.2.weight: 1 of 3936 values are not finite.* inf at 5",
        ),
    ],
)
def test_names_the_weight_that_is_not_finite(spoil: object, message: str) -> None:
    model = small_model()
    spoil(model["body"][2].weight)
    with pytest.raises(ValueError, match=message):
        quantize_linears_(model)


def test_names_the_weight_that_is_not_a_float() -> None:
    model = small_model()
    model["body"][0].weight = nn.Parameter(torch.zeros(96, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"body.0.weight: cannot quantize a int8 tensor of shape \(96, 64\)"):
        quantize_linears_(model)


def test_refuses_a_weight_of_another_shape() -> None:
    layer = NF4Linear(64, 32)
    with pytest.raises(ValueError, match=r"weight is \(64, 32\), this layer takes \(32, 64\)"):
        layer.set_weight_(torch.zeros(64, 32))
