"""torch.compile: the model trains as one graph with the same losses, and a decoding step is one graph."""

import pytest
import torch

from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer, initialize_
from graft.base.optim.adamw import AdamW

# torch.compile itself instantiates autograd functions, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
CONFIG = ModelConfig(83, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=64, max_seq_len=64)


def five_losses(compiled: bool) -> list[float]:
    model = Transformer(CONFIG)
    initialize_(model, seed=0)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    optimizer = AdamW(model.named_parameters(), learning_rate=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(5):
        ids = torch.randint(0, 83, (3, 17), generator=generator)
        loss = call(ids[:, :-1], ids[:, 1:].contiguous()) / 48
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_training_compiles_to_one_graph() -> None:
    """Law: fullgraph=True refuses a break; float32 in another order of operations moves a loss by less than 1e-5."""
    assert five_losses(compiled=True) == pytest.approx(five_losses(compiled=False), abs=1e-5)


def test_decoding_compiles_to_one_graph() -> None:
    """Law: fullgraph=True over ten decoding steps of growing length, at most two compilations (static, then dynamic)."""
    model = Transformer(CONFIG).eval()
    initialize_(model, seed=0)
    ids = torch.randint(0, 83, (2, 16), generator=torch.Generator().manual_seed(1))
    compilations = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> object:
        compilations.append(graph)
        return graph.forward

    call = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        expected = model(ids)
        cache = model.new_cache(2, 16)
        model(ids[:, :6], cache=cache)
        for t in range(6, 16):
            found = call(ids[:, t : t + 1], cache=cache)
            torch.testing.assert_close(found[:, 0], expected[:, t], atol=1e-5, rtol=1e-5)
    assert len(compilations) <= 3
