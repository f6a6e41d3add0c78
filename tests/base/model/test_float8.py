"""A model with float8 linears: names as before, it learns, and what can't be is refused."""

from dataclasses import replace

import pytest
import torch

from graft.base.model.config import ModelConfig
from graft.base.model.float8 import Float8Linear, use_float8_
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.optim.adamw import AdamW
from graft.base.precision import autocast
from graft.base.pretrain import resolve, start_float8

CONFIG = ModelConfig(61, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_head=16, d_ff=64, max_seq_len=16)


def built() -> Transformer:
    model = Transformer(CONFIG)
    initialize_(model, seed=0)
    return model


def test_names_and_roles_stay() -> None:
    """Law: the 7 linears of each layer are replaced, the head isn't; names, weights and roles are those before."""
    model, plain = built(), built()
    assert use_float8_(model) == 14
    assert list(model.state_dict()) == list(plain.state_dict())
    assert parameter_roles(model) == parameter_roles(plain)
    assert type(model.lm_head) is torch.nn.Linear
    assert isinstance(model.model.layers[0].mlp.down_proj, Float8Linear)


def test_near_bfloat16_and_learns_one_batch() -> None:
    """Law: the loss is bfloat16's to 2%. Learning: 60 steps bring the loss on one batch from log 61 = 4.1 under 0.5."""
    model, plain = built(), built()
    use_float8_(model)
    ids = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(0))
    optimizer = AdamW(model.named_parameters(), learning_rate=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        with autocast("bfloat16", "cpu"):
            loss = model(ids[:, :-1], ids[:, 1:]) / 64
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with autocast("bfloat16", "cpu"):
        assert losses[0] == pytest.approx(plain(ids[:, :-1], ids[:, 1:]).item() / 64, rel=0.02)
    assert losses[-1] < 0.5
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_fallback_and_refusals() -> None:
    model = built()
    assert start_float8(model, "cpu") == (
        "float8=true: float8 products need a GPU from Hopper on, this is cpu; products are in bfloat16"
    )
    assert not any(isinstance(module, Float8Linear) for module in model.modules())
    with pytest.raises(ValueError, match="float8=true goes with dtype=bfloat16, got float32"):
        resolve({"float8": True}, preset_name="nano", vocab_size=61)
    assert resolve({"float8": True, "dtype": "bfloat16"}, preset_name="nano", vocab_size=61).pretrain.float8
    odd = replace(CONFIG, d_model=24)
    with pytest.raises(ValueError, match="float8=true: no linear has sides that are multiples of 16"):
        use_float8_(Transformer(odd))
