"""Gemma's layers beyond parity with transformers (test_architectures.py): caches, capped losses, older files, adapters, 4 bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from graft.base.generate.engine import Engine
from graft.base.generate.sampling import Sampling
from graft.base.model import head
from graft.base.model.config import ModelConfig
from graft.base.model.config_json import config_from_dict, config_to_dict
from graft.base.model.huggingface import load_config, save_model
from graft.base.model.init import parameter_roles
from graft.base.model.norm import OffsetRMSNorm
from graft.base.model.own_json import own_layout_note
from graft.base.model.rope_scaling import RopeScaling
from graft.base.model.transformer import Transformer, initialize_
from graft.base.plan import attention_flops_per_token
from graft.base.run import DECAYED
from graft.finetune.adapters.attach import attach_adapter
from graft.finetune.adapters.config import LoraConfig
from graft.finetune.align.logprobs import response_logprobs
from graft.finetune.memory.measure import measure_memory
from graft.quant.linear import quantize_linears_

GEMMA = ModelConfig(
    97, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_head=16, d_ff=56, max_seq_len=96, qk_norm=False,
    offset_norm=True, scale_embeddings=True, activation="gelu_tanh", sandwich_norm=True, sliding_window=7,
    sliding_layers=(True, True, False),
)  # fmt: skip
GEMMA2 = replace(GEMMA, attention_softcap=3.0, logit_softcap=5.0, query_pre_attn_scalar=11)
GEMMA3 = replace(GEMMA, qk_norm=True, rope_theta=5e4, rope_local_theta=100.0, rope_scaling=RopeScaling("linear", 8.0))
IDS = torch.randint(1, 97, (2, 21), generator=torch.Generator().manual_seed(0))


def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model.eval()


def test_norm_and_caps_by_hand() -> None:
    """Known answers: of (3, 4) the root mean square is sqrt(12.5), and a weight of 0.5 multiplies by 1.5; 2 tanh(1/2) where a
    head that doubles meets 0.5."""
    norm = OffsetRMSNorm(2, 0.0)
    norm.weight.data.fill_(0.5)
    assert norm(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([4.5 / 12.5**0.5, 6 / 12.5**0.5])
    capped = head.CappedHead(torch.nn.Linear(1, 1, bias=False), 2.0)
    capped.head.weight.data.fill_(2.0)
    assert capped(torch.tensor([0.5])).item() == pytest.approx(2 * 0.46211716)
    half = OffsetRMSNorm(1, 0.0)
    half.weight.data = torch.tensor([2**-10], dtype=torch.bfloat16)  # 1 + 2^-10 is no bfloat16
    assert half.gain.item() == 1 + 2**-10


def test_embeddings_are_scaled_in_the_weights_dtype() -> None:
    """Law: sqrt(32) = 5.6569 is 5.65625 in bfloat16, with which Gemma was trained."""
    model = Transformer(GEMMA).to(torch.bfloat16)
    model.model.embed_tokens.weight.data.fill_(1.0)
    assert model.embed(IDS)[0, 0, 0].item() == 5.65625


def test_fresh_weights() -> None:
    """Law: a fresh norm changes nothing (weight 0) and has no weight decay."""
    model = Transformer(GEMMA3)
    initialize_(model, seed=0)
    layer = model.model.layers[0]
    assert not layer.input_layernorm.weight.any()
    assert not layer.self_attn.q_norm.weight.any()
    assert parameter_roles(model)["model.norm.weight"] not in DECAYED


@pytest.mark.parametrize("config", [GEMMA2, GEMMA3])
def test_rows_and_pages_give_the_same_text(config: ModelConfig) -> None:
    """Law: greedy ids through rows, through pages and without a cache are equal, past the window and for rows of different
    lengths."""
    model = random_model(config)
    prompts = [IDS[0, :9].tolist(), IDS[1, :14].tolist()]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    for cache_bytes in (None, 10**6):
        engine = Engine(model, max_batch=2, cache_bytes=cache_bytes)
        produced = {engine.add(prompt, Sampling(max_new_tokens=12)): [] for prompt in prompts}
        while engine.n_running or engine.n_waiting:
            for event in engine.step():
                produced[event.request].append(event.token)
        assert list(produced.values()) == expected


def test_the_capped_loss_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity with the cross entropy of the logits held whole: the sum, its gradients, and pieces that don't divide."""
    monkeypatch.setattr(head, "ROWS", 5)
    model = random_model(GEMMA2)
    targets = IDS.clone()
    targets[0, :4] = -100
    found = []
    for whole in (True, False):
        model.zero_grad()
        loss = (
            F.cross_entropy(model(IDS).flatten(0, 1), targets.flatten(), reduction="sum")
            if whole
            else model(IDS, targets)
        )
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_log_probabilities_see_the_cap() -> None:
    """Law: alignment's log-probabilities are those of the model's own logits."""
    model = random_model(GEMMA2)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[:, 0] = False
    with torch.no_grad():
        logp = model(IDS).log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
        torch.testing.assert_close(response_logprobs(model, IDS, mask)[:, 1:], logp)


@pytest.mark.parametrize("config", [GEMMA2, GEMMA3])
def test_adapters_and_4_bits(config: ModelConfig) -> None:
    """Law: LoRA trains over 4-bit linears, on the head inside its cap too; before its first step it changes nothing."""
    model = random_model(config)
    quantize_linears_(model)
    with torch.no_grad():
        base = model(IDS)
    attach_adapter(model, LoraConfig(targets=("all-linear", "lm_head"), rank=2))
    torch.testing.assert_close(model(IDS), base)
    model.train()(IDS, IDS).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 2 * (7 * config.n_layers + 1)
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if "lora_b" in name)
    if config.logit_softcap:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.startswith("lm_head") and p.requires_grad:
                    p.fill_(9.0)
            assert model(IDS).abs().max() <= config.logit_softcap


@pytest.mark.parametrize("config", [GEMMA2, GEMMA3])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_memory_is_predicted(config: ModelConfig, method: str) -> None:
    """Parity: within 1% of what PyTorch's allocator counts."""
    wide = replace(config, d_model=128, d_head=32, d_ff=256, max_seq_len=256, sliding_window=64)
    measured = measure_memory(wide, method=method, seq_len=256, batch_size=2, dtype="float32", device="cpu")
    assert abs(measured.error) < 0.01


def test_flops_count_each_layers_window() -> None:
    """Worked by hand: 4 tokens see 2.5 keys on average, with a window of 2 (1 + 2 + 2 + 2) / 4 = 1.75; two layers of three."""
    config = replace(GEMMA, sliding_window=2)
    per_key = 12 * config.n_heads * config.d_head
    assert attention_flops_per_token(config, 4) == pytest.approx(per_key * (1.75 + 1.75 + 2.5))


def test_files_as_published() -> None:
    """Gemma 3's older keys, Gemma 2's defaults, and the pattern by which layers without a list are chosen."""
    raw = config_to_dict(GEMMA3, dtype=torch.float32)
    older = {key: value for key, value in raw.items() if key not in ("rope_parameters", "layer_types")}
    older |= {"sliding_window_pattern": 3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert config_from_dict(older) == GEMMA3
    silent = {key: value for key, value in older.items() if not key.startswith("rope_")}
    read = config_from_dict(silent | {"rope_scaling": None})
    assert (read.rope_theta, read.rope_local_theta) == (1e6, 1e4)
    raw = config_to_dict(GEMMA2, dtype=torch.float32)
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "layer_types", "query_pre_attn_scalar"):
        del raw[key]
    read = config_from_dict(raw)
    assert (read.attention_softcap, read.logit_softcap, read.query_pre_attn_scalar) == (50.0, 30.0, 256)
    assert read.sliding_layers == (True, False, True)
    assert config_from_dict(raw | {"attn_logit_softcapping": None}).attention_softcap is None


@pytest.mark.parametrize(
    ("config", "found", "message"),
    [
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not covered for gemma2"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention is not covered"),
        (GEMMA3, {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern=0 must be >= 1"),
        (
            GEMMA3,
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "rope_type 'yarn' of sliding_attention is not covered",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(config: ModelConfig, found: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(config_to_dict(config, dtype=torch.float32) | found)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"attention_softcap": 0.0}, "attention_softcap=0.0 must be > 0 and finite, or none"),
        ({"logit_softcap": float("inf")}, "logit_softcap=inf must be > 0"),
        ({"activation": "swish"}, "activation='swish' is not known; choose silu or gelu_tanh"),
        ({"n_experts": 4}, "activation=gelu_tanh is not covered for experts"),
        ({"post_norm": True}, "sandwich_norm, post_norm and add_norm are places of the norms"),
        (
            {"sliding_window": None, "sliding_layers": None, "rope_local_theta": 9.0},
            "rope_local_theta is of layers with",
        ),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GEMMA, **sizes)


def test_a_mixed_switch_fits_no_architecture(tmp_path: Path) -> None:
    """Law: what no architecture says is stored in graft's own layout, and a note names it."""
    model = Transformer(replace(GEMMA2, sandwich_norm=False)).eval()
    initialize_(model, seed=0)
    assert "logit_softcap=5.0" in (own_layout_note(model.config) or "")
    save_model(model, tmp_path / "out")
    assert load_config(tmp_path / "out") == model.config
