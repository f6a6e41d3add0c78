"""Roles: declared by the modules, complete, and what initialization and optimizers make of them."""

import pytest
import torch
from torch import nn

from graft.base.model.config import ModelConfig
from graft.base.model.init import HIDDEN, initialize_, parameter_roles
from graft.base.model.transformer import Transformer
from graft.base.optim.adamw import AdamW
from graft.base.run import DECAYED, TrainConfig
from graft.base.training.optimizers import make_optimizer
from graft.finetune.adapters.lora import LoraConfig, attach_lora

CONFIG = ModelConfig(
    97, d_model=256, n_layers=2, n_heads=4, n_kv_heads=2, d_head=64, d_ff=512, tie_embeddings=False, qk_norm=True,
    attention_bias=True, attention_out_bias=True, mlp_bias=True,
)  # fmt: skip


def test_every_parameter_has_the_role_of_its_place() -> None:
    """Worked by hand: what writes to the residual stream is o_proj and down_proj; all one-dimensional ones are gains or biases."""
    model = Transformer(CONFIG)
    attach_lora(model, LoraConfig(rank=2, targets=("q_proj",)))
    roles = parameter_roles(model)
    assert roles.keys() == dict(model.named_parameters()).keys()
    residual = {name.split(".")[-2] for name, role in roles.items() if role == "residual"}
    assert residual == {"o_proj", "down_proj"}
    assert roles["model.layers.0.self_attn.q_proj.base.weight"] == "hidden"
    assert roles["model.layers.0.self_attn.q_proj.adapters.default.lora_b"] == "adapter"
    assert (roles["lm_head.weight"], roles["model.embed_tokens.weight"]) == ("head", "embedding")
    for name, parameter in model.named_parameters():
        assert (roles[name] in {"gain", "bias"}) == (parameter.ndim == 1), name
        assert (roles[name] in HIDDEN) <= (roles[name] in DECAYED)


def test_initial_values_follow_the_table() -> None:
    """Law: standard deviations of a few ten thousand values, within 3%; gains are 1, biases 0."""
    model = Transformer(CONFIG)
    initialize_(model, seed=0, std=0.1, n_layers=8)
    expected = {"embedding": 0.1, "head": 0.1, "hidden": 0.1, "residual": 0.1 / 4, "gain": 0.0, "bias": 0.0}
    for name, role in parameter_roles(model).items():
        parameter = model.get_parameter(name)
        assert parameter.std().item() == pytest.approx(expected[role], rel=0.03), name
        if role in {"gain", "bias"}:
            assert (parameter == (1.0 if role == "gain" else 0.0)).all()


def test_a_parameter_without_a_role_is_named() -> None:
    model = Transformer(CONFIG)
    model.extra = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"parameter extra\.weight has no role; declare it in its module's ROLES"):
        parameter_roles(model)


def test_decay_is_by_role_and_not_by_shape() -> None:
    """Law: a matrix with the role of a gain is not decayed, though it has two dimensions."""
    weights = [("a", nn.Parameter(torch.ones(2, 2))), ("b", nn.Parameter(torch.ones(2, 2)))]
    optimizer = make_optimizer(weights, TrainConfig(weight_decay=0.5), roles={"a": "gain", "b": "hidden"})
    assert isinstance(optimizer, AdamW)
    for _, weight in weights:
        weight.grad = torch.zeros(2, 2)
    optimizer.step(0.1)
    assert weights[0][1].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert weights[1][1][0, 0].item() == pytest.approx(1 - 0.1 * 0.5)
