"""Learning rates and decay by role, the same in every optimizer."""

import pytest
import torch

from graft.base.model.config import ModelConfig
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.run import ROLES, TrainConfig
from graft.finetune.optimizers import OPTIMIZERS, make_optimizer

TINY = ModelConfig(
    61, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, d_head=8, d_ff=160, max_seq_len=16, tie_embeddings=False
)


def moved(config: TrainConfig) -> dict[str, torch.Tensor]:
    """How far each parameter moves in one update (SOAP: its second), with the same gradients each time."""
    model = Transformer(TINY)
    initialize_(model, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model.named_parameters(), config, OPTIMIZERS, roles=parameter_roles(model))
    for i in range(2 if config.optimizer == "soap" else 1):
        generator = torch.Generator().manual_seed(i)
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            if i and "norm" in name:
                p.grad = None
        optimizer.step(1e-3)
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_each_role_has_its_rate(optimizer: str) -> None:
    """Law: without decay an update is proportional to the rate, so each parameter's is its role's factor times as large."""
    factors = {"embedding_rate": 2.0, "head_rate": 3.0, "hidden_rate": 0.5, "gain_rate": 0.0}
    plain = moved(TrainConfig(optimizer=optimizer, weight_decay=0.0))
    scaled = moved(TrainConfig(optimizer=optimizer, weight_decay=0.0, **factors))
    expected = {"embedding": 2.0, "head": 3.0, "hidden": 0.5, "residual": 0.5, "gain": 0.0}
    roles = parameter_roles(Transformer(TINY))
    assert {roles[name] for name in plain} == set(expected)
    for name, change in plain.items():
        assert change.abs().max() > 0, name
        # float32: a difference of weights near 0.1 or 1
        torch.testing.assert_close(scaled[name], expected[roles[name]] * change, atol=3e-7, rtol=1e-3)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_each_role_decays_or_not(optimizer: str) -> None:
    """Law: what decay adds to an update is -rate * decay * weight for the roles named, nothing for the others."""
    plain = moved(TrainConfig(optimizer=optimizer, weight_decay=0.0))
    decayed = moved(TrainConfig(optimizer=optimizer, weight_decay=10.0, decayed_roles=("gain", "head"), head_rate=1.0))
    model = Transformer(TINY)
    initialize_(model, seed=0)
    roles = parameter_roles(model)
    for name, weight in model.named_parameters():
        shrunk = -1e-3 * 10.0 * weight.detach() if roles[name] in ("gain", "head") else torch.zeros_like(weight)
        torch.testing.assert_close(decayed[name] - plain[name], shrunk, atol=3e-7, rtol=1e-3)


def test_refusals() -> None:
    assert set(TrainConfig().role_rates) == set(ROLES)
    with pytest.raises(ValueError, match="decayed_roles: 'norm' is none of embedding, head, hidden"):
        TrainConfig(decayed_roles=("norm",))
    with pytest.raises(ValueError, match="hidden_rate=-1 must be >= 0 and finite"):
        TrainConfig(hidden_rate=-1)
    with pytest.raises(ValueError, match=r"muon_momentum=1 must lie in \[0, 1\)"):
        TrainConfig(muon_momentum=1)
