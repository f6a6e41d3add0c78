"""Latent attention and DeepSeek's experts beyond parity with transformers (test_architectures.py)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.base.generate.engine import Engine
from graft.base.generate.sampling import Sampling
from graft.base.model.config import ModelConfig
from graft.base.model.config_json import config_from_dict, config_to_dict
from graft.base.model.experts import Router
from graft.base.model.families import family_of
from graft.base.model.huggingface import save_model
from graft.base.model.init import parameter_roles
from graft.base.model.kv_cache import StepContext
from graft.base.model.latent_attention import LatentAttention, halves
from graft.base.model.presets import preset
from graft.base.model.rope import angle_tables
from graft.base.model.rope_scaling import RopeScaling
from graft.base.model.sizes import with_sizes
from graft.base.model.transformer import Transformer, initialize_
from graft.base.plan import attention_flops_per_token
from graft.finetune.adapters.attach import attach_adapter
from graft.finetune.adapters.config import LoraConfig
from graft.finetune.loading import load_model
from graft.finetune.memory.measure import measure_memory
from graft.kernels.attention import attention
from graft.quant.linear import quantize_linears_

MLA = ModelConfig(
    97, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, d_head=20, d_ff=56, max_seq_len=96, qk_norm=False,
    tie_embeddings=False, d_latent=12, d_query_latent=14, d_rope=8, d_value=16,
)  # fmt: skip
V3 = replace(
    MLA, n_experts=8, d_expert=24, d_shared_expert=24, gate_shared_expert=False, router="sigmoid", router_bias=True,
    n_expert_groups=4, n_groups_per_token=2, routed_scale=2.5, expert_layers=(False, True), balance_loss=0.0,
)  # fmt: skip
IDS = torch.randint(1, 97, (2, 21), generator=torch.Generator().manual_seed(0))


def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model.eval()


def test_neighbours_become_halves() -> None:
    """Worked by hand: pairs (0, 1), (2, 3), (4, 5) -> firsts, then seconds."""
    assert halves(torch.arange(6)).tolist() == [0, 2, 4, 1, 3, 5]


def test_the_cache_holds_the_latent_alone() -> None:
    """Known answer: R + Dr = 20 float32 values a token and layer, where 4 heads of 20 + 16 would be 144."""
    assert random_model(MLA).new_cache(2, 32).n_bytes == 2 * 32 * 2 * 20 * 4


def test_small_latents_are_normed_as_in_transformers() -> None:
    """Parity: entries of latents near 1e-3, where the norm's epsilon counts, with transformers' layer of the same weights."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    layer = random_model(MLA).model.layers[0].self_attn
    assert isinstance(layer, LatentAttention)
    latent = torch.randn(5, layer.R, generator=torch.Generator().manual_seed(0)) * 1e-3
    theirs = DeepseekV3RMSNorm(layer.R)  # its default epsilon, which their attention takes for both latents
    theirs.weight.data = layer.kv_a_layernorm.weight.data
    torch.testing.assert_close(layer.kv_a_layernorm(latent), theirs(latent), atol=1e-6, rtol=1e-5)


def test_both_forms_over_the_cache_agree() -> None:
    """Law: absorbed and expanded attention are one function; few queries over many entries take the first."""
    layer = random_model(MLA).model.layers[0].self_attn
    assert isinstance(layer, LatentAttention)
    plain, turned, entries = torch.randn(2, 4, 3, 12), torch.randn(2, 4, 3, 8), torch.randn(2, 1, 30, 20)
    mask = torch.zeros(2, 1, 3, 30).masked_fill_(torch.rand(2, 1, 3, 30) < 0.3, -torch.inf)
    assert layer._absorbs(1, 30)
    assert not layer._absorbs(30, 30)
    found = []
    for absorbs in (True, False):
        layer._absorbs = lambda T, S, absorbs=absorbs: absorbs  # pyright: ignore[reportAttributeAccessIssue]
        found.append(layer._attend_cached(plain, turned, entries, mask))
    torch.testing.assert_close(*found, atol=2e-6, rtol=1e-5)


def test_ranks_that_share_rows_attend_their_own_way() -> None:
    """Law: where the context brings its own attention (context parallelism), that one is called, with values as wide as keys."""
    layer = random_model(MLA).model.layers[0].self_attn
    seen = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((k.shape, v.shape))
        return attention(q, k, v, **options)

    x, context = torch.randn(2, 6, 32), StepContext(**angle_tables(MLA, torch.arange(6)[None]))
    torch.testing.assert_close(layer(x, context._replace(attend=attend)), layer(x, context))
    assert seen == [((2, 4, 6, 20), (2, 4, 6, 20))]


@pytest.mark.parametrize(("adapted", "window"), [(False, None), (True, None), (False, 6)])
def test_rows_and_pages_give_the_same_text(adapted: bool, window: int | None) -> None:
    """Law: greedy ids through rows, through pages, with a prompt read in pieces, and without a cache are equal; over an adapted
    kv_b_proj too, which is no matrix to absorb, and with a window."""
    model = random_model(replace(V3, sliding_window=window))
    if adapted:
        attach_adapter(model, LoraConfig(targets=("kv_b_proj",), rank=2))
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.data.normal_(0, 0.3)
    prompts = [IDS[0, :9].tolist(), IDS[1, :21].tolist()]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    for cache_bytes in (None, 10**6):
        engine = Engine(model, max_batch=2, cache_bytes=cache_bytes, prefill_chunk=4)
        produced: dict[int, list[int]] = {}
        for prompt in prompts:
            produced[engine.add(prompt, Sampling(max_new_tokens=12))] = []
            for event in engine.step():  # the second prompt is read while the first one's answer grows
                produced[event.request].append(event.token)
        while engine.n_running or engine.n_waiting:
            for event in engine.step():
                produced[event.request].append(event.token)
        assert list(produced.values()) == expected


def test_pages_are_counted_by_what_they_hold() -> None:
    """Worked by hand: 32 tokens of 20 float32 values in 2 layers are 5,120 bytes a page."""
    assert random_model(MLA).new_pages(3 * 5120 + 1).n_pages == 3
    with pytest.raises(ValueError, match="which takes 5120"):
        random_model(MLA).new_pages(6000)


def test_router_by_hand() -> None:
    """Known answers: groups {0, 1}, {2, 3}; sigmoids 0.5, 0.5, 0.6, 0.1 score them 1.0 and 0.7, so that the best expert is not
    chosen among; a bias of 1 on the others turns that round and weighs nothing."""
    config = replace(V3, n_experts=4, n_experts_per_token=2, n_expert_groups=2, n_groups_per_token=1, d_model=4)
    router = Router(config)
    router.weight.data = torch.eye(4)
    x = torch.tensor([[0.5, 0.5, 0.6, 0.1]]).logit()
    _, weights, experts = router(x)
    assert sorted(experts[0].tolist()) == [0, 1]
    assert weights[0].tolist() == pytest.approx([1.25, 1.25])
    router.e_score_correction_bias.data = torch.tensor([0.0, 0.0, 1.0, 1.0])
    _, weights, experts = router(x)
    assert experts[0].tolist() == [2, 3]
    assert weights[0].tolist() == pytest.approx([2.5 * 6 / 7, 2.5 / 7])


def test_the_bias_is_no_gradients_matter() -> None:
    """Law: the router's bias has a role of its own, no gradient, and is 0 at the beginning."""
    model = Transformer(V3)
    initialize_(model, seed=0)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert parameter_roles(model)[name] == "balance"
    bias = dict(model.named_parameters())[name]
    assert not bias.any()
    model.train()(IDS, IDS).backward()
    assert bias.grad is None


def test_half_precision_keeps_the_bias(tmp_path: Path) -> None:
    model = random_model(V3)
    save_model(model, tmp_path, dtype="bfloat16")
    loaded = load_model(tmp_path, dtype="bfloat16")
    name = "e_score_correction_bias"
    ours, theirs = (getattr(m.model.layers[1].mlp.gate, name) for m in (model, loaded))
    assert theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)
    assert loaded.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16


def test_adapters_and_4_bits() -> None:
    """Law: LoRA trains over 4-bit linears of every name; before its first step it changes nothing."""
    model = random_model(V3)
    n_linears = len(quantize_linears_(model))
    assert n_linears == 2 * 5 + 2 * 3  # q_a, q_b, kv_a, kv_b, o; a dense layer's and a shared expert's three
    with torch.no_grad():
        base = model(IDS)
    attach_adapter(model, LoraConfig(rank=2))
    torch.testing.assert_close(model(IDS), base)
    model.train()(IDS, IDS).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 2 * n_linears
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if "lora_b" in name)
    with pytest.raises(ValueError, match="prefix is not covered for latent attention"):
        attach_adapter(random_model(MLA), LoraConfig(adapter_kind="prefix"))


@pytest.mark.parametrize("method", ["full", "lora", "generate"])
def test_memory_is_predicted(method: str) -> None:
    """Parity: within 1% of what PyTorch's allocator counts."""
    wide = replace(
        V3,
        d_model=128,
        d_query_latent=48,
        d_head=48,
        d_rope=16,
        d_value=32,
        d_latent=64,
        d_ff=256,
        d_expert=64,
        max_seq_len=256,
    )
    measured = measure_memory(wide, method=method, seq_len=256, batch_size=2, dtype="float32", device="cpu")
    assert abs(measured.error) < 0.01


def test_flops_count_the_widths_of_keys_and_values() -> None:
    """Worked by hand: 4 tokens see 2.5 keys on average; 3 passes of 2 FLOPs over 20 + 16 values, 4 heads, 2 layers."""
    assert attention_flops_per_token(MLA, 4) == 3 * 2 * 4 * (20 + 16) * 2.5 * 2


def test_a_latent_on_a_preset() -> None:
    """Law: `--set d_latent=64 --set d_rope=16` on a preset with shared keys and QK-norm gives each head its own, without a norm."""
    config = with_sizes(preset("micro"), d_latent=64, d_rope=16)
    assert (config.n_kv_heads, config.qk_norm) == (config.n_heads, False)
    assert with_sizes(preset("micro"), d_latent=64, d_rope=16, n_heads=4).n_kv_heads == 4


def test_parameters_of_deepseek_v3() -> None:
    """Known answer: 671 billion parameters, of which a token meets 37 (arXiv:2412.19437, abstract)."""
    raw = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129_280}
    sizes = {"hidden_size": 7168, "intermediate_size": 18_432, "num_hidden_layers": 61, "num_attention_heads": 128}
    config = config_from_dict(raw | sizes)
    assert round(config.n_params / 1e9) == 671
    assert round((config.n_active_params - 129_280 * 7168) / 1e9) == 37


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"d_latent": 0}, "d_latent=0 must be a whole number from 1"),
        ({"d_rope": 20}, "d_rope=20 must be even and less than d_head=20"),
        ({"d_rope": 7}, "d_rope=7 must be even"),
        ({"d_value": 21}, "d_value=21 is more than d_head=20"),
        ({"n_kv_heads": 2}, "n_kv_heads=2: with d_latent every head has its own keys"),
        (
            {"qk_norm": True},
            "qk_norm, rope_local_theta, attention_gate, rope_fraction and positions are not covered with d_latent",
        ),
        ({"d_latent": None}, "d_query_latent is given without d_latent"),
        ({"n_expert_groups": 3}, "n_experts=8 is not divisible into n_expert_groups=3"),
        ({"n_groups_per_token": 5}, "n_groups_per_token=5 must lie between 1 and n_expert_groups=4"),
        ({"n_experts_per_token": 5}, "n_experts_per_token=5 is more than the 4 experts of n_groups_per_token=2"),
        ({"n_expert_groups": 8}, "n_expert_groups=8 leaves 1 expert a group"),
        ({"router": "tanh"}, "router='tanh' is not known"),
        ({"router_bias": False, "bias_rate": 0.1}, "bias_rate=0.1 moves the router's bias"),
        ({"routed_scale": -1.0}, "routed_scale=-1.0 must be >= 0"),
        ({"rope_scaling": 1}, "mscale=-1.0 must be >= 0"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(
            V3, **(sizes if "rope_scaling" not in sizes else {"rope_scaling": RopeScaling("yarn", 4.0, mscale=-1.0)})
        )


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not covered for deepseek_v3, only 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method 'greedy' is not covered for deepseek_v3; only noaux_tc"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2 is not covered"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1 must be >= 0"),
        ({"kv_lora_rank": 0}, "d_latent=0 must be"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(found: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(config_to_dict(V3, dtype=torch.float32) | found)


@pytest.mark.parametrize(
    "change",
    [
        {"expert_layers": (True, False)},
        {"d_shared_expert": 30},
        {"gate_shared_expert": True},
        {"qk_norm": False, "d_latent": None, "d_query_latent": None, "d_rope": 0, "d_value": None},
    ],
)
def test_what_no_architecture_has(change: dict[str, object]) -> None:
    """Law: it is no DeepSeek and no other of transformers' models; its folder is in graft's own layout and reads back."""
    config = replace(V3, **change)
    with pytest.raises(ValueError, match="no known architecture has"):
        family_of(config)
    assert config_from_dict(config_to_dict(config, dtype=torch.float32)) == config
