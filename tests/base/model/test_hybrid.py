"""Hybrids of attention and Gated DeltaNet (Qwen3-Next): parity with transformers, caches, folders, adapters, memory."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers

from graft.base.data.shards import prepare
from graft.base.generate.beam import beam_search
from graft.base.generate.engine import Engine, generate_ids
from graft.base.generate.prefix_cache import PrefixCache
from graft.base.generate.sampling import Sampling
from graft.base.generate.speculative import ModelDraft, NgramDraft
from graft.base.model.config import ModelConfig
from graft.base.model.config_json import config_from_dict, config_to_dict
from graft.base.model.huggingface import save_model
from graft.base.model.init import HIDDEN, parameter_roles
from graft.base.model.rope_scaling import RopeScaling
from graft.base.model.sizes import with_sizes
from graft.base.model.transformer import Transformer, initialize_
from graft.base.plan import attention_flops_per_token
from graft.base.pretrain import run_pretrain
from graft.base.run import DECAYED
from graft.base.settings import parse_assignments
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.adapters.attach import attach_adapter
from graft.finetune.adapters.config import LoraConfig
from graft.finetune.evaluation.likelihood import Row, score_groups
from graft.finetune.loading import load_model
from graft.finetune.memory.measure import measure_memory
from graft.finetune.memory.predict import estimate
from graft.finetune.memory.settings import MemorySettings
from graft.finetune.sft_model import linear_layers_left_out
from graft.quant.linear import quantize_linears_

HYBRID = ModelConfig(
    97, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, d_head=8, d_ff=56, max_seq_len=160,
    linear_layers=(True, True, False, True), n_linear_k_heads=2, n_linear_v_heads=4, d_linear_k=8, d_linear_v=6,
    linear_conv=4, attention_gate=True, offset_norm=True, rope_fraction=0.5,
)  # fmt: skip
EXPERTS = {"n_experts": 6, "n_experts_per_token": 2, "d_expert": 24, "d_shared_expert": 20, "balance_loss": 0.001}
KINDS = {
    "dense": HYBRID,
    "experts": replace(HYBRID, **EXPERTS, tie_embeddings=False),
    "some dense, biases": replace(
        HYBRID, **EXPERTS, expert_layers=(True, False, True, True), attention_bias=True, attention_out_bias=True
    ),
    "attention alone, yarn": replace(
        HYBRID,
        linear_layers=(False,) * 4,
        rope_scaling=RopeScaling("yarn", 4.0, original_max_seq_len=24, attention_factor=1.2),
    ),
}
IDS = torch.randint(1, 97, (2, 75), generator=torch.Generator().manual_seed(0))


def random_model(config: ModelConfig) -> Transformer:
    """Weights far from the initial ones, so that every gate counts."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
            if name.endswith(("A_log", "dt_bias")):
                parameter.sub_(1.0)  # a state that lasts some tokens
    return model.eval()


def opened(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_our_folder(kind: str, tmp_path: Path) -> None:
    """Logits over more than a chunk of tokens, and the ids of greedy decoding through both caches; the folder loads again."""
    model = random_model(KINDS[kind])
    save_model(model, tmp_path)
    theirs = opened(tmp_path)
    with torch.no_grad():
        ours, reference = model(IDS), theirs(IDS).logits
    torch.testing.assert_close(ours, reference, atol=2e-5 * reference.abs().max().item(), rtol=0)
    assert torch.equal(load_model(tmp_path)(IDS), model(IDS))
    prompt = IDS[:, :9]
    expected = theirs.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)[:, 9:]
    assert generate_ids(model, prompt.tolist(), Sampling(max_new_tokens=12, temperature=0)) == expected.tolist()


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


def test_gradients_equal_transformers(tmp_path: Path) -> None:
    """The loss without the router's and its gradients, by the names on disk, with recomputed layers too."""
    config = replace(KINDS["experts"], balance_loss=0.0)
    model = random_model(config).train()
    save_model(model, tmp_path)
    theirs = opened(tmp_path).train()
    targets = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], 1)
    reference = theirs(IDS, labels=IDS).loss
    reference.backward()
    for model.checkpointing in (False, True):
        model.zero_grad()
        loss = model(IDS, targets) / (targets >= 0).sum()
        loss.backward()
        torch.testing.assert_close(loss, reference, atol=1e-5, rtol=1e-5)
        ours = dict(model.named_parameters())
        for name, parameter in theirs.named_parameters():
            scale = max(1e-3, float(parameter.grad.abs().max()))
            torch.testing.assert_close(ours[name].grad, parameter.grad, atol=5e-5 * scale, rtol=0, msg=name)


def alone(model: Transformer, prompt: list[int], n: int) -> list[int]:
    """Greedy ids by whole passes, without any cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prefill_chunk", [512, 7])
def test_requests_of_unlike_lengths_share_a_batch(prefill_chunk: int) -> None:
    """Law: prompts padded in one batch, read in chunks, joining and leaving, give each one's own ids: padding enters no state."""
    model = random_model(HYBRID)
    prompts = [IDS[0, :n].tolist() for n in (5, 23, 1, 23)] + [IDS[1, :n].tolist() for n in (40, 3)]
    engine = Engine(model, max_batch=4, prefill_chunk=prefill_chunk)
    produced: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        engine.add(prompt, Sampling(max_new_tokens=3 + 2 * i, temperature=0))
    while engine.n_running or engine.n_waiting:
        for event in engine.step():
            produced.setdefault(event.request, []).append(event.token)
    assert produced == {i: alone(model, prompt, 3 + 2 * i) for i, prompt in enumerate(prompts)}
    engine.add(prompts[1], Sampling(max_new_tokens=4, temperature=0))  # in rows that others have left
    last = []
    while engine.n_running or engine.n_waiting:
        last += [event.token for event in engine.step()]
    assert last == produced[1][:4]


def test_beams_carry_their_states() -> None:
    """Law: one beam is greedy decoding; with more, the best one's probability is that of its whole text."""
    model, prompt = random_model(HYBRID), IDS[0, :6].tolist()
    settings = Sampling(max_new_tokens=6, temperature=0)
    assert beam_search(model, prompt, settings, n_beams=1)[0].ids == alone(model, prompt, 6)
    best = beam_search(model, prompt, settings, n_beams=3)[0]
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + best.ids]))[0, 5:-1].log_softmax(-1)
    assert best.score == pytest.approx(float(log_p[range(6), best.ids].mean()), abs=1e-5)


def test_likelihoods_from_shared_beginnings() -> None:
    """Law: rows that begin alike are read once, in groups of unlike lengths; each sum is that of the row alone."""
    model = random_model(HYBRID)
    groups = [
        [Row((*IDS[i, :a].tolist(), *IDS[1 - i, b : 3 * b].tolist()), a) for b in (3, 8)] for i, a in enumerate((20, 9))
    ]
    with torch.no_grad():
        for group, scored in zip(groups, score_groups(model, groups), strict=True):
            for row, found in zip(group, scored, strict=True):
                log_p = model(torch.tensor([row.ids]))[0, row.n_given - 1 : -1].log_softmax(-1)
                expected = float(log_p[range(len(row.ids) - row.n_given), list(row.ids[row.n_given :])].sum())
                assert found.log_p == pytest.approx(expected, abs=1e-4)


def test_packed_documents_are_read_apart() -> None:
    """Law: hidden states of documents packed in one row are those of each alone, over more than a chunk."""
    model = random_model(HYBRID)
    bounds = [0, 2, 70, 75]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])[None]
    with torch.no_grad():
        packed = model(IDS[:1], positions=positions, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        apart = torch.cat([model(IDS[:1, a:b]) for a, b in pairwise(bounds)], 1)
    torch.testing.assert_close(packed, apart, atol=2e-5, rtol=1e-4)


def test_what_needs_a_way_back_is_refused() -> None:
    model = random_model(HYBRID)
    with pytest.raises(ValueError, match="prefix_cache is not covered for this model"):
        Engine(model, prefix_cache=PrefixCache(2**20))
    with pytest.raises(ValueError, match="drafter is not covered for this model"):
        Engine(model, drafter=NgramDraft())
    with pytest.raises(ValueError, match="can't be kept in pages"):
        Engine(model, cache_bytes=2**20)
    with pytest.raises(ValueError, match="draft model has linear attention layers"):
        ModelDraft(model, vocab_size=97)
    cache = model.new_cache(2, 16)
    model(IDS[:, :8], cache=cache)
    other = model.new_cache(1, 16)
    other.clear(0)
    with pytest.raises(ValueError, match="5 of the 8 tokens of row 1 are wanted"):
        cache.truncate([8, 5])
    with pytest.raises(ValueError, match="5 of the 8 tokens of row 0 are wanted"):
        cache.align([5, 8])
    with pytest.raises(ValueError, match="5 of the 8 tokens of row 1 are wanted"):
        other.append_rows(cache, [5], rows=[1])
    with pytest.raises(ValueError, match="adapter_kind=prefix is not covered for linear attention"):
        attach_adapter(model, LoraConfig(adapter_kind="prefix"))
    with pytest.raises(ValueError, match="adapter_kind=bottleneck is not covered for linear attention"):
        attach_adapter(model, LoraConfig(adapter_kind="bottleneck"))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"linear_layers": (True,)}, "linear_layers names 1 layers, n_layers=4"),
        ({"n_linear_v_heads": 3}, "n_linear_v_heads=3 is not divisible by n_linear_k_heads=2"),
        ({"linear_conv": 1}, "linear_conv=1 must be a whole number from 2"),
        ({"d_linear_v": 0}, "d_linear_v=0 must be a whole number from 1"),
        ({"rope_fraction": 0.4}, "rope_fraction=0.4 of d_head=8 turns 3 dimensions"),
        ({"rope_fraction": 1.5}, "rope_fraction=1.5 of d_head=8"),
        ({"post_norm": True}, "linear_layers is not covered with post_norm"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(HYBRID, **sizes)


def test_patterns_repeat_and_kinds_are_known() -> None:
    """Law: a shorter pattern repeats where it divides the layers; a file's other kinds of layers are refused by name."""
    config = with_sizes(replace(HYBRID, linear_layers=None), n_layers=8, linear_layers=(True, True, True, False))
    assert config.linear_layers == (True, True, True, False) * 2
    with pytest.raises(ValueError, match="linear_layers is a pattern of 3 layers, which does not divide n_layers=8"):
        with_sizes(replace(HYBRID, linear_layers=None), n_layers=8, linear_layers=(True, True, False))
    raw = config_to_dict(HYBRID, dtype=torch.float32)
    with pytest.raises(ValueError, match="layer_types has 'sliding_attention'"):
        config_from_dict(raw | {"layer_types": ["sliding_attention"] * 4})
    with pytest.raises(ValueError, match=r"partial_rotary_factor 0\.5 is not covered"):
        config_from_dict(raw | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]})
    silent = {key: value for key, value in raw.items() if key != "layer_types"}
    assert config_from_dict(silent).linear_layers == (True, True, True, False)


def test_flops_of_the_recurrence() -> None:
    """By hand: 3 layers of 6 * 4 heads * 8 * 6, one of attention over (T + 1) / 2 keys of 4 heads of 8; thrice for training."""
    assert attention_flops_per_token(HYBRID, 9) == 3 * (3 * 6 * 4 * 8 * 6 + 2 * 2 * 4 * 8 * 5)


def test_initial_weights_and_roles() -> None:
    """Law: decays lie within Mamba-2's ranges, depend on the seed alone, and no decay of weights acts on them; Muon gets the
    projections of hidden states, not the gates'."""
    model = Transformer(HYBRID)
    initialize_(model, seed=0)
    layer, roles = model.model.layers[0].linear_attn, parameter_roles(model)
    assert ((layer.A_log.exp() >= 1) & (layer.A_log.exp() <= 16)).all()
    step = torch.nn.functional.softplus(layer.dt_bias)
    assert ((step > 0.00099) & (step < 0.101)).all()
    assert layer.conv1d.weight.abs().max() <= 0.5
    head = "model.layers.0.linear_attn."
    assert {roles[head + name] for name in ("A_log", "dt_bias")}.isdisjoint(DECAYED)
    assert roles[head + "in_proj_qkvz.weight"] in HIDDEN
    assert roles[head + "in_proj_ba.weight"] in {*DECAYED} - HIDDEN


@pytest.mark.parametrize("method", ["full", "lora", "generate"])
def test_memory_is_predicted(method: str) -> None:
    """Parity: within 1% of what PyTorch's allocator counts; and repeated groups stand for all layers."""
    config = replace(HYBRID, d_model=128, d_head=32, d_linear_k=32, d_linear_v=32, d_ff=256)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    measured = measure_memory(config, method=method, rank=8, seq_len=160, batch_size=2, dtype="float32", device="cpu")
    torch.set_num_threads(threads)
    assert abs(measured.error) < 0.01
    if method == "full":
        wide = with_sizes(replace(config, linear_layers=None), n_layers=10, linear_layers=(True, False))
        settings = MemorySettings(method, seq_len=48, rank=8)
        assert estimate(wide, settings, device="cpu") == estimate(wide, settings, device="cpu", whole=True)


def test_lora_and_4_bits() -> None:
    """Law: every linear of the linear layers takes an adapter and 4 bits; without an adapter there a note says so."""
    model = random_model(replace(HYBRID, d_linear_v=8))
    attach_adapter(model, LoraConfig(targets=("q_proj", "v_proj"), rank=4))
    assert "3 linear attention layers' projections get no adapter" in (linear_layers_left_out(model) or "")
    model = random_model(replace(HYBRID, d_linear_v=8))
    names = quantize_linears_(model)
    assert {name.rpartition(".")[2] for name in names if "linear_attn" in name} == {
        "in_proj_qkvz",
        "in_proj_ba",
        "out_proj",
    }
    attach_adapter(model, LoraConfig(targets=("in_proj_qkvz", "out_proj"), rank=4))
    assert linear_layers_left_out(model) is None
    model.train()(IDS, IDS).backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert len(trained) == 6  # lora_b of two linears in three layers: lora_a has none while b is 0


def test_pretraining_from_settings(tmp_path: Path) -> None:
    """Learning: `--set` of a pattern trains a hybrid, the folder opens in transformers with its vocabulary's logits."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. the dog sat on the log. " * 80)
    Tokenizer.train([text], vocab_size=270).save(tmp_path / "tok")
    prepare([text], Tokenizer.load(tmp_path / "tok"), tmp_path / "data", val_fraction=0.1)
    settings = parse_assignments(
        [
            "linear_layers=true,false", "attention_gate=true", "offset_norm=true", "rope_fraction=0.5", "n_layers=4",
            "d_model=32", "n_heads=4", "max_seq_len=32", "steps=30", "batch_size=4", "micro_batch=4", "warmup_steps=2",
            "learning_rate=1e-2",
        ]
    )  # fmt: skip
    summary = run_pretrain(
        data=tmp_path / "data", tokenizer=tmp_path / "tok", out=tmp_path / "run", settings=settings, device="cpu",
        progress=False,
    )  # fmt: skip
    assert summary["train_loss"] < 2.5  # from log 270 = 5.6
    model = load_model(tmp_path / "run")
    assert model.config.linear_layers == (True, False, True, False)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), opened(tmp_path / "run")(IDS).logits, atol=1e-4, rtol=1e-4)
