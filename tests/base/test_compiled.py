"""compile=true: one graph whatever the lengths, the same losses, weights and names; what it doesn't cover is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graft.base.loss import n_labels, next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer, initialize_
from graft.base.precision import LossScaler
from graft.base.run import TrainConfig
from graft.base.training.compiled import check_compile, compile_layers
from graft.base.training.optimizers import make_optimizer
from graft.base.training.step import one_step
from graft.finetune.adapters.attach import attach_adapter
from graft.finetune.adapters.config import LoraConfig

CONFIG = ModelConfig(83, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_head=8, d_ff=32, max_seq_len=64)
LENGTHS = ((4, 17), (4, 9), (3, 30), (4, 17))


def trained(*, compiled: bool, lora: bool) -> tuple[list[float], Transformer]:
    """Losses of steps of unlike batches and lengths, with an evaluation in between."""
    from torch._dynamo.utils import counters

    model = Transformer(CONFIG)
    initialize_(model, seed=0)
    if lora:
        attach_adapter(model, LoraConfig(rank=2))
    config = TrainConfig(compile=compiled, learning_rate=1e-2, warmup_steps=0, steps=9)
    if compiled:
        torch.compiler.reset()
        counters.clear()
        compile_layers(model, config, backend="eager")
    optimizer = make_optimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad], config)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step, (B, T) in enumerate(LENGTHS):
        ids = torch.randint(0, 83, (B, T), generator=generator)
        batch: dict[str, Tensor] = {"ids": ids[:, :-1], "targets": ids[:, 1:].contiguous()}
        model.train()
        line = one_step(
            *(model, optimizer, [batch], config, LossScaler("float32"), step, next_token_loss, n_labels, "cpu")
        )
        losses.append(line["loss"])
        with torch.no_grad():
            model.eval()(ids[:1])
    return losses, model


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_one_compilation_over_lengths(lora: bool) -> None:
    """Law (test_compile.py has autograd's part): one graph for all batches and lengths, none for evaluation; losses, weights and
    names are those without it."""
    from torch._dynamo.utils import counters

    losses, model = trained(compiled=True, lora=lora)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    expected, eager = trained(compiled=False, lora=lora)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert list(model.state_dict()) == list(eager.state_dict())
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, atol=1e-4, rtol=1e-3)


def test_what_is_not_covered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = Transformer(CONFIG), TrainConfig(compile=True)
    for sizes, message in (
        ({"n_experts": 4}, "not covered for mixtures of experts"),
        ({"linear_layers": (True,)}, "not covered for linear attention"),
        ({"n_predict": 1}, "not covered with n_predict"),
    ):
        with pytest.raises(ValueError, match=message):
            check_compile(Transformer(replace(CONFIG, **sizes)), config)
    with pytest.raises(ValueError, match="not covered with mesh=dp:1,tp:2, zero=0"):
        check_compile(model, replace(config, mesh="dp:1,tp:2"))
    with pytest.raises(ValueError, match="zero=1"):
        check_compile(model, replace(config, zero=1))
    check_compile(model, replace(config, mesh="dp:2"), needs_compiler=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and no-such-compiler is not on the PATH"):
        compile_layers(model, config)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"g\+\+, clang\+\+, c\+\+ is not on the PATH"):
        compile_layers(model, config)
