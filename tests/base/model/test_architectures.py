"""Parity with transformers for the architectures beside Llama's: logits, greedy ids, folders both ways, gradients."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from graft.base.model.config import ModelConfig
from graft.base.model.config_json import config_from_dict, config_to_dict
from graft.base.model.experts import sort_by_expert
from graft.base.model.huggingface import load_config, save_model
from graft.base.model.init import HIDDEN, parameter_roles
from graft.base.model.own_json import own_layout_note
from graft.base.model.rope_scaling import RopeScaling
from graft.base.model.router_losses import RouterLosses
from graft.base.model.transformer import Transformer
from graft.base.optim.muon import orthogonalize
from graft.base.plan import attention_flops_per_token, flops_per_token
from graft.base.run import DECAYED
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.loading import load_model
from graft.finetune.memory.measure import measure_memory
from graft.finetune.memory.predict import with_groups
from graft.finetune.quantize import run_quantize
from graft.finetune.sft_model import experts_left_out

DENSE = ModelConfig(
    97, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_head=8, d_ff=56, max_seq_len=96, qk_norm=False
)
MOE = replace(DENSE, d_ff=24, n_experts=6, n_experts_per_token=2, balance_loss=0.001)
GEMMA = replace(DENSE, offset_norm=True, scale_embeddings=True, activation="gelu_tanh")
MLA = replace(
    DENSE, n_kv_heads=4, d_head=20, d_latent=12, d_query_latent=14, d_rope=8, d_value=16, tie_embeddings=False
)
DEEPSEEK = replace(
    MLA,
    n_experts=8,
    d_expert=24,
    d_shared_expert=48,
    gate_shared_expert=False,
    router="sigmoid",
    router_bias=True,
    n_expert_groups=4,
    n_groups_per_token=2,
    routed_scale=2.5,
    expert_layers=(False, True, True),
    balance_loss=0.001,
)
KINDS = {
    "smollm3": replace(DENSE, rope_layers=(True, False, True), d_head=16),
    "smollm3 windows": replace(
        DENSE, rope_layers=(True, True, False), sliding_window=7, sliding_layers=(False, False, True)
    ),
    "windows on some layers alone": replace(DENSE, sliding_window=7, sliding_layers=(True, False, True)),
    "olmo2": replace(DENSE, qk_norm=True, qk_norm_joint=True, post_norm=True, tie_embeddings=False, d_head=16),
    "yarn": replace(DENSE, rope_scaling=RopeScaling("yarn", 4.0, original_max_seq_len=24, attention_factor=1.2)),
    "yarn, not truncated": replace(
        DENSE, rope_scaling=RopeScaling("yarn", 4.0, original_max_seq_len=24, truncate=False), d_head=16
    ),
    "dynamic": replace(DENSE, rope_scaling=RopeScaling("dynamic", 2.0)),
    "mixtral": replace(MOE, tie_embeddings=False),
    "mixtral window": replace(MOE, sliding_window=5),
    "qwen3 moe": replace(MOE, qk_norm=True, d_head=16, d_ff=40, d_expert=24, n_experts_per_token=3),
    "qwen3 moe, some dense": replace(
        MOE, qk_norm=True, d_expert=12, expert_layers=(False, True, True), normalize_experts=False
    ),
    "qwen2 moe": replace(MOE, attention_bias=True, d_expert=24, d_shared_expert=20, normalize_experts=False),
    "latent attention": MLA,
    "latent attention, halves, queries from the state": replace(
        MLA, d_query_latent=None, rope_interleaved=False, d_value=None, router_bias=False
    ),
    "deepseek v3": DEEPSEEK,
    "deepseek v3, yarn": replace(
        DEEPSEEK,
        normalize_experts=False,
        n_experts_per_token=4,
        expert_layers=None,
        n_layers=2,
        attention_bias=True,
        attention_out_bias=True,
        rope_scaling=RopeScaling("yarn", 4.0, original_max_seq_len=24, mscale=1.0, mscale_all_dim=0.7),
    ),
    "deepseek v2": replace(
        DEEPSEEK,
        router="softmax",
        router_bias=False,
        normalize_experts=False,
        n_expert_groups=1,
        n_groups_per_token=1,
    ),
    "deepseek v2 in groups": replace(DEEPSEEK, router="softmax", router_bias=False, normalize_experts=False),
    "gemma": GEMMA,
    "gemma2": replace(
        GEMMA,
        sandwich_norm=True,
        attention_softcap=3.0,
        logit_softcap=5.0,
        query_pre_attn_scalar=11,
        sliding_window=7,
        sliding_layers=(True, False, True),
        d_head=16,
    ),
    "gemma2 without caps": replace(GEMMA, sandwich_norm=True),
    "gemma3": replace(
        GEMMA,
        sandwich_norm=True,
        qk_norm=True,
        sliding_window=7,
        sliding_layers=(True, False, True),
        rope_theta=5e4,
        rope_local_theta=100.0,
        rope_scaling=RopeScaling("linear", 8.0),
        query_pre_attn_scalar=20,
    ),
    "olmoe": replace(MOE, qk_norm=True, qk_norm_joint=True, normalize_experts=False),
}
IDS = torch.randint(1, 97, (2, 41), generator=torch.Generator().manual_seed(0))


def random_model(config: ModelConfig) -> Transformer:
    """Weights far from the initial ones, so that every norm, router and expert counts."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model.eval()


def opened(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_our_folder(kind: str, tmp_path: Path) -> None:
    """Logits, and the ids of greedy decoding through both caches."""
    model = random_model(KINDS[kind])
    save_model(model, tmp_path)
    theirs = opened(tmp_path)
    with torch.no_grad():
        ours, reference = model(IDS), theirs(IDS).logits
    torch.testing.assert_close(ours, reference, atol=2e-5 * reference.abs().max().item(), rtol=0)
    prompt = IDS[:, :9]
    expected = theirs.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)[:, 9:]
    cache = model.new_cache(2, 32)
    with torch.no_grad():
        new = [model(prompt, cache=cache)[:, -1].argmax(-1)]
        while len(new) < 12:
            new.append(model(new[-1][:, None], cache=cache)[:, -1].argmax(-1))
    assert torch.equal(torch.stack(new, 1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_our_loader_opens_theirs(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(KINDS[kind], dtype=torch.float32)))
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), attn_implementation="eager"
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    model = load_model(tmp_path / "theirs", dtype=None)
    assert replace(model.config, eos_token_id=None, bos_token_id=None, pad_token_id=None) == KINDS[kind]
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_config_round_trip_and_parameter_count(kind: str) -> None:
    """Law: config -> dict -> config is the identity; n_params counts what torch counts."""
    config = KINDS[kind]
    assert config_from_dict(config_to_dict(config, dtype=torch.float32)) == config
    assert config.n_params == sum(p.numel() for p in Transformer(config).parameters())


def test_active_parameters() -> None:
    """Known answer: Mixtral 8x7B has 46.7 billion parameters, of which a token meets 12.9 (arXiv:2401.04088, section 2)."""
    config = ModelConfig(32_000, 4096, 32, 32, 8, 128, 14_336, 32_768, qk_norm=False, tie_embeddings=False, n_experts=8)
    assert (round(config.n_params / 1e9, 1), round(config.n_active_params / 1e9, 1)) == (46.7, 12.9)
    products = flops_per_token(config, 1) - attention_flops_per_token(config, 1)
    assert products == 6 * (
        config.n_active_params - 32_000 * 4096
    )  # the embedding is looked up, and experts unread cost nothing


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen2 moe", "olmo2", "smollm3", "gemma2", "gemma3", "deepseek v3", "deepseek v2"]
)
def test_gradients_equal_transformers(kind: str, tmp_path: Path) -> None:
    """The loss without the router's and its gradients, by the names on disk."""
    config = replace(KINDS[kind], balance_loss=0.0)
    model = random_model(config).train()
    save_model(model, tmp_path)
    theirs = opened(tmp_path).train()
    targets = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], 1)
    loss = model(IDS, targets) / (targets >= 0).sum()
    loss.backward()
    reference = theirs(IDS, labels=IDS).loss
    reference.backward()
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=1e-5)
    ours = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        scale = max(1e-3, float(parameter.grad.abs().max()))
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=3e-5 * scale, rtol=0, msg=name)


def test_router_losses_by_hand() -> None:
    """Known answers: two experts. Evenly used at even odds the balancing loss is k, whatever k; with all tokens on one
    expert whose odds are p it is E p. The z loss is the mean square of log-sum-exp."""
    layer = Transformer(replace(MOE, n_experts=2, n_experts_per_token=1, balance_loss=1.0)).model.layers[0].mlp
    even = layer.router_loss(torch.zeros(4, 2), torch.tensor([[0], [1], [0], [1]]))
    assert even.item() == pytest.approx(1.0)
    logits = torch.tensor([[torch.log(torch.tensor(3.0)), 0.0]]).repeat(4, 1)  # probability 3/4
    assert layer.router_loss(logits, torch.zeros(4, 1, dtype=torch.int64)).item() == pytest.approx(2 * 0.75)
    layer.config = replace(layer.config, balance_loss=0.0, router_z_loss=0.5)
    assert layer.router_loss(logits, torch.zeros(4, 1, dtype=torch.int64)).item() == pytest.approx(
        0.5 * torch.log(torch.tensor(4.0)).item() ** 2
    )


def test_the_router_is_trained_to_balance_and_only_in_training() -> None:
    """Law: the losses are added once a target while the router trains, and never to a validation loss."""
    config = replace(MOE, balance_loss=0.5)
    model, plain = random_model(config), random_model(replace(config, balance_loss=0.0))
    targets = IDS.clone()
    targets[0, :11] = -100
    with torch.no_grad():
        assert torch.equal(model(IDS, targets), plain(IDS, targets))
    extra = model.train()(IDS, targets) - plain.train()(IDS, targets)
    losses = RouterLosses()
    model.hidden_states(IDS, router_losses=losses)
    assert len(losses) == config.n_layers
    assert extra.item() == pytest.approx(71 * losses.mean().item(), rel=1e-3)
    for layer in model.model.layers:
        layer.mlp.gate.weight.requires_grad = False  # as on a frozen base
    assert torch.equal(model(IDS, targets), plain(IDS, targets))


def test_checkpointing_changes_no_gradient() -> None:
    """Law: recomputed experts and routers give the same gradients, the router's losses included."""
    gradients = []
    for checkpointing in (False, True):
        model = random_model(replace(MOE, balance_loss=0.5)).train()
        model.checkpointing = checkpointing
        model(IDS, IDS).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_rows_of_an_expert_keep_their_order() -> None:
    """Law: sorting is stable, the inverse puts every row back, the ends count the experts' rows."""
    experts = torch.tensor([[2, 0], [2, 1], [0, 2]])
    order, inverse, ends = sort_by_expert(experts, 4)
    assert order.tolist() == [1, 4, 3, 0, 2, 5]
    assert torch.equal(order[inverse], torch.arange(6))
    assert ends.tolist() == [2, 3, 6, 6]


def test_experts_lie_on_disk_one_by_one(tmp_path: Path) -> None:
    """Law: the keys are the published ones; a missing expert is named by its layer, an extra or doubled one by its key."""
    save_model(random_model(KINDS["mixtral"]), tmp_path / "mixtral")
    stored = load_file(tmp_path / "mixtral/model.safetensors")
    assert stored["model.layers.2.block_sparse_moe.experts.5.w2.weight"].shape == (32, 24)
    assert "model.layers.0.block_sparse_moe.gate.weight" in stored
    save_model(random_model(KINDS["qwen3 moe"]), tmp_path / "qwen")
    stored = load_file(tmp_path / "qwen/model.safetensors")
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({name: tensor for name, tensor in stored.items() if name != key}, tmp_path / "qwen/model.safetensors")
    with pytest.raises(ValueError, match=r"lacks the weights model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load_model(tmp_path / "qwen")
    save_file(
        stored | {"model.layers.1.mlp.experts.6.up_proj.weight": stored[key].clone()},
        tmp_path / "qwen/model.safetensors",
    )
    with pytest.raises(ValueError, match=r"is of expert 6; config\.json has 6 experts, 0 to 5"):
        load_model(tmp_path / "qwen")
    save_file(stored | {key: stored[key][:5].contiguous()}, tmp_path / "qwen/model.safetensors")
    with pytest.raises(ValueError, match=r"has shape \(5, 32\)"):
        load_model(tmp_path / "qwen")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_experts": 4, "n_experts_per_token": 5}, "n_experts_per_token=5 must lie between 1 and n_experts=4"),
        ({"n_experts": 1}, "n_experts=1 must be a whole number from 2"),
        ({"n_experts": 4, "d_expert": 0}, "d_expert=0 must be a whole number from 1"),
        ({"expert_layers": (True, True, True)}, "expert_layers is given without n_experts"),
        ({"n_experts": 4, "expert_layers": (True,)}, "expert_layers names 1 layers, n_layers=3"),
        ({"rope_layers": (True,)}, "rope_layers names 1 layers, n_layers=3"),
        ({"n_experts": 4, "balance_loss": -1.0}, "balance_loss=-1.0 must be >= 0"),
        ({"qk_norm_joint": True}, "qk_norm_joint says how qk_norm is taken"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DENSE, **sizes)


def test_switches_that_no_architecture_has_together(tmp_path: Path) -> None:
    """Law: graft's own layout holds them, experts included, and a note says that only graft opens it."""
    model = random_model(replace(MOE, post_norm=True))
    assert "no known architecture has qk_norm=False, post_norm=True, n_experts=6 together" in (
        own_layout_note(model.config) or ""
    )
    assert own_layout_note(MOE) is None
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(IDS), model(IDS))


@pytest.mark.parametrize(
    ("kind", "found", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not covered"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not covered"),
        ("qwen2 moe", {"use_sliding_window": True}, "use_sliding_window is not covered for qwen2_moe"),
        ("qwen3 moe", {"decoder_sparse_step": 9}, "no layer has experts"),
        ("smollm3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by kind of layer"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(kind: str, found: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(config_to_dict(KINDS[kind], dtype=torch.float32) | found)


def test_yarn_as_published(tmp_path: Path) -> None:
    """A file that leaves the attention factor to the formula, and DeepSeek's mscale pair, read as transformers reads them."""
    for scaling in (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
        {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 24, "mscale": 1.0, "mscale_all_dim": 0.7},
    ):
        raw = config_to_dict(DENSE, dtype=torch.float32)
        raw["rope_parameters"] = scaling | {"rope_theta": raw["rope_theta"]}
        raw["rope_scaling"] = scaling
        folder = tmp_path / str(scaling["factor"])
        save_model(random_model(replace(DENSE, rope_scaling=config_from_dict(raw).rope_scaling)), folder)
        (folder / "config.json").write_text(json.dumps(raw))
        with torch.no_grad():
            ours, reference = load_model(folder)(IDS), opened(folder)(IDS).logits
        torch.testing.assert_close(ours, reference, atol=2e-5 * reference.abs().max().item(), rtol=0)
        assert load_config(folder).rope_scaling.attention_factor > 1.0


def test_the_optimizers_part_of_the_experts() -> None:
    """Law: Muon orthogonalizes each expert's matrices; the router's scores go to AdamW, with decay."""
    model = Transformer(KINDS["qwen2 moe"])
    roles = parameter_roles(model)
    layer = "model.layers.0.mlp."
    assert {name: roles[layer + name] for name in ("gate.weight", "shared_expert_gate.weight")} == {
        "gate.weight": "router",
        "shared_expert_gate.weight": "router",
    }
    assert roles[layer + "experts.gate_up_proj"] == "hidden"
    assert roles[layer + "experts.down_proj"] == "residual"
    assert "router" in set(DECAYED) - HIDDEN
    update = orthogonalize(torch.randn(6, 12, 32))
    assert (torch.linalg.svdvals(update) > 0.6).all()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_memory_of_experts_is_predicted(method: str) -> None:
    """Parity: within 1% of what PyTorch's allocator counts."""
    config = replace(KINDS["qwen2 moe"], d_model=128, d_head=32, d_expert=128, max_seq_len=256)
    measured = measure_memory(config, method=method, seq_len=256, batch_size=2, dtype="float32", device="cpu")
    assert abs(measured.error) < 0.01
    wide = replace(config, n_layers=12, expert_layers=(False, True, True) * 4)
    assert with_groups(wide, 0, 3, 4, keep=2).expert_layers == (False, True, True) * 2


def test_a_mixture_in_4_bits_keeps_its_experts(tmp_path: Path) -> None:
    """Law: attention and the shared expert are quantized, the experts are not, and both are counted; the folder loads again."""
    config = replace(KINDS["qwen2 moe"], vocab_size=270, d_model=64, d_expert=32, d_shared_expert=64)
    save_model(random_model(config), tmp_path / "base")
    (tmp_path / "text.txt").write_text("some words to learn, some more words " * 9)
    Tokenizer.train([tmp_path / "text.txt"], vocab_size=270).save(tmp_path / "base")
    figures = run_quantize(tmp_path / "base", tmp_path / "nf4")
    assert figures["n_expert_weights_left_as_they_are"] == 3 * 6 * 3 * 32 * 64
    assert figures["n_quantized_layers"] == 3 * 7
    model = load_model(tmp_path / "nf4")
    assert experts_left_out(model, "qlora") == (
        "note: the experts' 110,592 weights get no adapter and are not stored in 4 bits; attention and shared feed-forward "
        "layers do"
    )
    assert experts_left_out(random_model(DENSE), "lora") is None
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float32
    assert model(IDS).isfinite().all()
