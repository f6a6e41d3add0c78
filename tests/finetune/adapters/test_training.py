"""The trained update: one autograd function against the formula in plain operators, PEFT's losses, where dropout acts."""

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from graft.finetune.adapters.lora import LoraConfig, LowRank, attach_lora, lora_layers, wrapped
from graft.finetune.adapters.selection import registry_of
from graft.finetune.loading import load_model
from graft.quant import NF4Linear

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def one_layer(kind: str, *, dropout: float = 0.0) -> nn.Module:
    """A model of one adapted linear 12 -> 10 with a B that is not zero."""
    torch.manual_seed(0)
    linear: nn.Module = nn.Linear(12, 10, bias="bias" in kind).requires_grad_(False)
    if "nf4" in kind:
        assert isinstance(linear, nn.Linear)
        linear = NF4Linear.from_linear(linear)
    model = nn.Sequential(linear)
    update = LowRank(torch.randn(3, 12), torch.randn(10, 3), 1.5, dropout=dropout, trained=True)
    wrapped(model, "0").add("default", update)
    registry_of(model).default = "default"
    return model


def gradients(run, x: Tensor, update: LowRank) -> list[Tensor | None]:
    """Output and the gradients of x, A and B of a loss that weighs every output differently."""
    x.grad = update.lora_a.grad = update.lora_b.grad = None
    out = run(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out, x.grad, update.lora_a.grad, update.lora_b.grad]


@pytest.mark.parametrize("kind", ["plain", "bias", "nf4", "nf4 bias"])
@pytest.mark.parametrize("precision", ["float32", "autocast bfloat16", "autocast float16", "bfloat16"])
@pytest.mark.parametrize("needs", [True, False])
def test_the_function_is_the_formula(kind: str, precision: str, needs: bool) -> None:
    """Parity: output and every gradient equal W x + scale B A x by plain operators; in half precision within its rounding."""
    model = one_layer(kind)
    dtype = getattr(torch, precision.rpartition(" ")[2])
    x = torch.randn(2, 5, 12)
    if precision == "bfloat16":
        model, x = model.to(dtype), x.to(dtype)
    x.requires_grad_(needs)
    [(_, layer)] = lora_layers(model)
    update = layer.updates["default"]

    def plain(x: Tensor) -> Tensor:
        return layer.base(x) + F.linear(F.linear(x, update.lora_a), update.lora_b) * update.scale

    with torch.autocast("cpu", dtype, enabled="autocast" in precision):
        found, expected = gradients(model, x, update), gradients(plain, x, update)
    for mine, wanted in zip(found, expected, strict=True):
        if wanted is None:
            assert mine is None
            continue
        assert mine is not None
        assert mine.dtype == wanted.dtype
        tolerance = {"float32": 1e-6, "float16": 4e-3, "bfloat16": 3e-2}[precision.rpartition(" ")[2]]
        torch.testing.assert_close(mine, wanted, atol=tolerance * wanted.abs().max().item(), rtol=0)


def test_gradients_by_finite_differences() -> None:
    """Parity: torch's own finite differences in float64, with and without dropout's second input."""
    model = one_layer("bias").double()
    [(_, layer)] = lora_layers(model)
    update = layer.updates["default"]
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, b: model(x), (x, update.lora_a, update.lora_b))
    update.dropout = 0.4

    def fixed_mask(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(3)
        return model.train()(x)

    assert torch.autograd.gradcheck(fixed_mask, (x, update.lora_a, update.lora_b))


def test_dropout_acts_on_the_adapters_input_alone_and_in_training() -> None:
    """Law: in eval mode there is none; in training the base's part stays whole, and the update's mean over masks is the update."""
    model = one_layer("bias", dropout=0.5)
    [(_, layer)] = lora_layers(model)
    update, x = layer.updates["default"], torch.randn(4, 12)
    whole = layer.base(x) + F.linear(x, update.delta())
    model.eval()
    torch.testing.assert_close(model(x), whole, atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), whole, atol=1e-4, rtol=0)
    model.train()
    torch.manual_seed(0)
    many = torch.stack([model(x) for _ in range(4000)]).detach()
    assert (many.std(0) > 0.1).all(), "dropout acts while training"
    # standard error of the mean over 4,000 masks; five of them
    assert ((many.mean(0) - whole).abs() < 5 * many.std(0) / 4000**0.5 + 1e-4).all()
    update.lora_b.data.zero_()
    torch.testing.assert_close(model(x), layer.base(x), atol=0, rtol=0)
    update.lora_b.data.normal_()
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(model(x), layer.base(x) + F.linear(dropped, update.delta()), atol=1e-4, rtol=0)


def test_losses_are_pefts(base_dir: Path) -> None:
    """Parity: ten AdamW steps of graft and of PEFT on transformers from the same A give the same losses (rounding: 2e-5)."""
    model = load_model(base_dir, dtype=None).train()
    attach_lora(model, LoraConfig(rank=4, alpha=8.0))
    hf = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(
        hf, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    ).train()
    for path, layer in lora_layers(model):
        theirs.base_model.model.get_submodule(path).lora_A["default"].weight.data.copy_(layer.updates["default"].lora_a)
    ids = torch.randint(0, 290, (2, 20), generator=torch.Generator().manual_seed(0))
    losses = []
    for one, of in ((model, lambda: model(ids)), (theirs, lambda: theirs(ids).logits)):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(10):
            loss = F.cross_entropy(of()[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.5, "it learns"
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own way with Functions
def test_compiled_training_is_the_same(base_dir: Path) -> None:
    """Law: one graph, and the same gradients as without torch.compile to rounding."""
    model = load_model(base_dir, dtype=None).train()
    attach_lora(model, LoraConfig(rank=4))
    for _, layer in lora_layers(model):
        layer.updates["default"].lora_b.data.normal_(0, 0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.randint(0, 290, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for run in (model, compiled):
        model.zero_grad()
        run(ids).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=0)
