"""Multi-token prediction: worked by hand, written out, the same however it is run, and what a folder keeps of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import left_out, save_model
from graft.base.model.init import parameter_roles
from graft.base.model.kv_cache import StepContext
from graft.base.model.multi_token import later
from graft.base.model.rope import angle_tables
from graft.base.model.transformer import Transformer, initialize_
from graft.base.plan import flops_per_token
from graft.finetune.loading import load_model
from graft.finetune.memory.measure import measure_memory

DENSE = ModelConfig(
    53,
    d_model=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    d_head=8,
    d_ff=24,
    max_seq_len=64,
    n_predict=2,
    predict_loss=0.3,
)
V3 = replace(
    DENSE, qk_norm=False, d_head=12, d_latent=10, d_rope=4, n_experts=4, d_expert=8, d_shared_expert=8,
    gate_shared_expert=False, router="sigmoid", router_bias=True, expert_layers=(False, True), balance_loss=0.0,
)  # fmt: skip
IDS = torch.randint(1, 53, (2, 11), generator=torch.Generator().manual_seed(0))
TARGETS = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], 1)


def fresh(config: ModelConfig) -> Transformer:
    model = Transformer(config).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model


def test_later_by_hand() -> None:
    """Worked by hand: two places later; documents of 3 and 2 tokens are not looked past, nor is the row; a token that belongs to
    no document sees none."""
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert later(tokens, 2, fill=-100).tolist() == [[3, 4, 5, 6, -100, -100]]
    ends = torch.tensor([0, 3, 5], dtype=torch.int32)
    assert later(tokens, 1, fill=0, cu_seqlens=ends).tolist() == [[2, 3, 0, 5, 0, 0]]


@pytest.mark.parametrize("config", [DENSE, V3])
def test_the_loss_written_out(config: ModelConfig) -> None:
    """Parity with equations 21 to 25 on shortened rows: each depth drops the tokens that have no later one."""
    model = fresh(config)
    T = IDS.shape[1]
    x = model.embed(IDS)
    for layer in model.model.layers:
        x = layer(x, StepContext(**angle_tables(config, torch.arange(T)[None])))
    expected = F.cross_entropy(
        model.lm_head(model.model.norm(x))[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum"
    )
    for k, part in enumerate(model.mtp, 1):
        pair = torch.cat([part.enorm(model.embed(IDS[:, k:])), part.hnorm(x[:, : T - k])], -1)
        x = part.layer(part.eh_proj(pair), StepContext(**angle_tables(config, torch.arange(T - k)[None])))
        logits = model.lm_head(part.norm(x))[:, :-1]  # the last one's next token is unknown
        further = F.cross_entropy(logits.flatten(0, 1), IDS[:, k + 1 :].flatten(), reduction="sum")
        expected = expected + config.predict_loss / config.n_predict * further
    torch.testing.assert_close(model(IDS, TARGETS), expected, rtol=1e-5, atol=1e-4)


def test_packed_documents_are_rows() -> None:
    """Law: two documents in one row have the loss that they have as two rows."""
    model = fresh(DENSE)
    packed = IDS.reshape(1, -1), TARGETS.reshape(1, -1)
    ends = torch.tensor([0, 11, 22], dtype=torch.int32)
    loss = model(*packed, positions=torch.arange(11).repeat(2)[None], cu_seqlens=ends)
    torch.testing.assert_close(loss, model(IDS, TARGETS), rtol=1e-5, atol=1e-4)


def test_only_training_predicts_further() -> None:
    """Law: a validation loss and the logits are those of the model without predictors; every weight of them has a gradient, a
    role and a place in n_params, with checkpointing the same one."""
    model, plain = fresh(DENSE), fresh(replace(DENSE, n_predict=0))
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS, TARGETS), plain.eval()(IDS, TARGETS))
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.checkpointing = checkpointing
        model.train()(IDS, TARGETS).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if name.startswith("mtp.")})
    assert all(torch.equal(found[0][name], grad) and grad.any() for name, grad in found[1].items())
    assert parameter_roles(model)["mtp.1.eh_proj.weight"] == "hidden"
    assert DENSE.n_params == sum(p.numel() for p in model.parameters())
    more = flops_per_token(DENSE, 64) - flops_per_token(replace(DENSE, n_predict=0), 64)
    in_depth = DENSE.n_params - replace(DENSE, n_predict=0).n_params + 2 * 53 * 16
    assert more == 6 * in_depth + 2 * 3 * 2 * 2 * (8 + 8) * 32.5  # 2 heads, 32.5 keys on average


def test_it_learns_further_tokens() -> None:
    """Learning: on rows that count upwards the further losses fall with the first one."""
    model = Transformer(replace(DENSE, predict_loss=1.0)).train()
    initialize_(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = (torch.arange(16)[None] + torch.arange(8)[:, None]) % 53
    losses = []
    for _ in range(40):
        loss = model(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 7
    assert losses[-1] < 0.5


def test_what_a_folder_keeps(tmp_path: Path) -> None:
    """Law: DeepSeek-V3's layout has names for them, others are left out by a count; graft and transformers open both without."""
    for config, key in ((DENSE, "n_predictor_weights_left_out"), (V3, "n_predictor_weights_saved")):
        model, folder = fresh(config).eval(), tmp_path / key
        save_model(model, folder)
        n = config.n_params - replace(config, n_predict=0).n_params
        assert left_out(model) == {key: n}
        stored = load_file(folder / "model.safetensors")
        assert not any(name.startswith("mtp.") for name in stored)
        further = {name for name in stored if name.startswith(("model.layers.2.", "model.layers.3."))}
        assert bool(further) == (config is V3)
        if config is V3:
            assert sum(stored[name].numel() for name in further) == n
            names = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "mlp.gate.weight")
            assert {f"model.layers.3.{name}" for name in names} < further
            assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 2
        loaded = load_model(folder)
        assert loaded.config.n_predict == 0
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            assert torch.equal(loaded.eval()(IDS), model(IDS))
            torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=1e-4, rtol=1e-4)
    own = fresh(replace(DENSE, logit_softcap=5.0))
    save_model(own, tmp_path / "own")
    assert load_model(tmp_path / "own").config.n_predict == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_predicted(checkpointing: bool) -> None:
    """Parity: within 1% of what PyTorch's allocator counts."""
    wide = replace(DENSE, d_model=128, d_head=32, n_heads=4, n_kv_heads=4, d_ff=256, max_seq_len=256, vocab_size=500)
    measured = measure_memory(
        wide, method="full", seq_len=256, batch_size=2, dtype="float32", device="cpu", checkpointing=checkpointing
    )
    assert abs(measured.error) < 0.01


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_predict": -1}, "n_predict=-1 must be a whole number from 0"),
        ({"n_predict": 63}, "n_predict=63 must be a whole number from 0, and below max_seq_len - 1"),
        ({"predict_loss": -0.1}, "predict_loss=-0.1 must be >= 0"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DENSE, **sizes)
