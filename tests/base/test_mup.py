"""muP: table 8 of arXiv:2203.03466 with the logits' multiplier in the final norm, and what it is for."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from graft.base.loss import next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.optim.mup import check_width, rate_factor
from graft.base.pretrain import resolve, width_ratio
from graft.base.pretrain_config import PretrainConfig
from graft.base.run import TrainConfig
from graft.base.training.optimizers import make_optimizer

CONFIG = ModelConfig(41, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=64, max_seq_len=16)


def built(config: ModelConfig, ratio: float) -> Transformer:
    model = Transformer(config)
    initialize_(model, seed=0, width_ratio=ratio)
    return model


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 41, (4, 17), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids[:, :-1], "targets": ids[:, 1:]}


@pytest.mark.parametrize("tied", [True, False])
def test_is_table_8(tied: bool) -> None:
    """Parity: six steps of torch.optim.AdamW in the table's own form, with logits multiplied by 1/r and rates and initial values
    by table 8, on a twin. eps is nothing, so that Adam doesn't see the scale of a gradient; r = 4 is exact in binary."""
    ratio, rate, decay = 4.0, 1e-2, 0.1
    config = replace(CONFIG, tie_embeddings=tied)
    ours, twin = built(config, ratio), built(config, 1.0)
    roles = parameter_roles(twin)
    groups = []
    with torch.no_grad():
        for name, p in twin.named_parameters():
            hidden = roles[name] in ("hidden", "residual")
            if hidden:
                p.mul_(ratio**-0.5)
            shrinks = {"hidden": decay * ratio, "residual": decay * ratio, "gain": 0.0}.get(roles[name], decay)
            groups.append({"params": [p], "lr": rate / ratio if hidden else rate, "weight_decay": shrinks})
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-30)
    train = TrainConfig(eps=1e-30, weight_decay=decay)
    optimizer = make_optimizer(ours.named_parameters(), train, roles=parameter_roles(ours), width_ratio=ratio)
    for i in range(6):
        one = next_token_loss(ours, batch(i)) / 64
        logits = twin.lm_head(twin.hidden_states(batch(i)["ids"])) / ratio
        other = F.cross_entropy(logits.flatten(0, 1), batch(i)["targets"].flatten())
        assert one.item() == pytest.approx(other.item(), abs=2e-5)  # float32
        one.backward()
        other.backward()
        optimizer.step(rate)
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    theirs = dict(twin.named_parameters())
    for name, p in ours.named_parameters():
        expected = theirs[name] / ratio if name == "model.norm.weight" else theirs[name]
        # a gradient near zero may have another sign after rounding: then Adam moves that weight the other way
        assert ((p - expected).abs() < 1e-4).float().mean() > 0.98, name


def logit_change(width: int, ratio: float, optimizer: str) -> float:
    """Root mean square of what four steps do to the logits of other tokens."""
    config = replace(CONFIG, d_model=width, n_heads=width // 8, n_kv_heads=width // 8, d_ff=2 * width)
    model = built(config, ratio)
    train = TrainConfig(optimizer=optimizer, weight_decay=0.0)
    made = make_optimizer(model.named_parameters(), train, roles=parameter_roles(model), width_ratio=ratio)
    held_out = batch(9)["ids"]
    before = model(held_out).detach()
    for _ in range(4):
        (next_token_loss(model, batch()) / 64).backward()
        made.step(1e-2)
        made.zero_grad()
    return float((model(held_out).detach() - before).square().mean().sqrt())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_does_as_much_at_every_width(optimizer: str) -> None:
    """Law (the paper's coordinate check, section D.1): from width 32 to 256 the logits' change stays within a factor of 1.6 with
    muP and grows by more than 2.5 without."""
    narrow = logit_change(32, 1.0, optimizer)
    with_mup, without = logit_change(256, 8.0, optimizer) / narrow, logit_change(256, 1.0, optimizer) / narrow
    assert 1 / 1.6 < with_mup < 1.6
    assert without > 2.5


def test_the_base_width_changes_nothing() -> None:
    """Law: at r = 1 weights and rates are those without muP, to the bit."""
    for one, other in zip(built(CONFIG, 1.0).parameters(), Transformer(CONFIG).parameters(), strict=True):
        assert one.shape == other.shape
    model = Transformer(CONFIG)
    initialize_(model, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), built(CONFIG, 1.0).parameters(), strict=True))
    roles = parameter_roles(model)
    assert {rate_factor(name, roles[name], ratio=1.0, optimizer="muon") for name in roles} == {1.0}


def test_offset_norms() -> None:
    """Worked by hand: a norm that multiplies by 1 + w starts at w = 1/4 - 1 = -0.75 in the place of a gain of 1/4."""
    model = built(replace(CONFIG, offset_norm=True), 4.0)
    assert set(model.model.norm.weight.tolist()) == {-0.75}
    assert set(model.model.layers[0].input_layernorm.weight.tolist()) == {0.0}
    assert set(built(CONFIG, 4.0).model.norm.weight.tolist()) == {0.25}


def test_settings_and_refusals() -> None:
    found = resolve({"mup_base_width": 16, "d_model": 32}, preset_name="nano", vocab_size=41)
    assert found.pretrain == PretrainConfig(mup_base_width=16)
    assert width_ratio(found.pretrain, Transformer(CONFIG)) == 2.0
    assert width_ratio(PretrainConfig(), Transformer(CONFIG)) == 1.0
    with pytest.raises(ValueError, match="mup_base_width=0 must be >= 1"):
        resolve({"mup_base_width": 0}, preset_name="nano", vocab_size=41)
    with pytest.raises(ValueError, match="mup_base_width needs a final norm"):
        check_width(16, 32, {"model.embed_tokens.weight"}, scales_embeddings=False)
    with pytest.raises(ValueError, match="mup_base_width with scale_embeddings=true"):
        check_width(16, 32, {"model.norm.weight"}, scales_embeddings=True)
