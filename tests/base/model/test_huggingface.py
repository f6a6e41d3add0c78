"""Parity: a folder written here opens in transformers with the same logits, and one written there opens here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from graft.base.model.config import ModelConfig
from graft.base.model.config_json import config_from_dict, config_to_dict
from graft.base.model.huggingface import fingerprint, load_config, save_model
from graft.base.model.presets import PRESETS, preset
from graft.base.model.rope_scaling import RopeScaling
from graft.base.model.sizes import with_sizes
from graft.base.model.transformer import Transformer, initialize_
from graft.finetune.loading import load_model

TINY = ModelConfig(97, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_ff=56, max_seq_len=64)
KINDS = {
    "qwen3 tied": TINY,
    "qwen3 untied": replace(TINY, tie_embeddings=False),
    "llama": replace(TINY, qk_norm=False, tie_embeddings=False, d_head=8),
    "llama tied": replace(TINY, qk_norm=False),
    "llama biases": replace(TINY, qk_norm=False, attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "llama3 rope": replace(
        TINY, qk_norm=False, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_seq_len=32)
    ),
    # Wavelengths are 6.3 and 167 tokens: the second lies between original / high = 64 and original / low = 256, where the two
    # frequencies are blended.
    "llama3 rope, blended": replace(
        TINY, qk_norm=False, d_head=4, rope_theta=7e2, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 256)
    ),
    "qwen3 some windows": replace(TINY, sliding_window=5, sliding_layers=(True, False)),
    "qwen2 last window": replace(
        TINY, qk_norm=False, attention_bias=True, d_head=8, sliding_window=5, sliding_layers=(False, True)
    ),
    "linear rope": replace(TINY, qk_norm=False, rope_scaling=RopeScaling("linear", 2.0)),
    "qwen2": replace(TINY, qk_norm=False, attention_bias=True, d_head=8),
    "mistral window": replace(TINY, qk_norm=False, sliding_window=7, tie_embeddings=False),
}


def random_model(config: ModelConfig) -> Transformer:
    """Weights far from the initial ones, so that every norm, bias and head counts."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_our_folder(kind: str, tmp_path: Path) -> None:
    model = random_model(KINDS[kind])
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.randint(0, 97, (2, 41), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, reference = model(ids), theirs(ids).logits
    # float32 sums in another order: a few ulps of the largest logit
    torch.testing.assert_close(ours, reference, atol=2e-5 * reference.abs().max().item(), rtol=0)


@pytest.mark.parametrize("kind", ["qwen3 tied", "llama", "qwen2", "llama3 rope"])
def test_our_loader_opens_theirs(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(KINDS[kind], dtype=torch.float32)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    model = load_model(tmp_path / "theirs", dtype=None)
    assert model.config == load_config(tmp_path / "theirs")
    ids = torch.randint(0, 97, (2, 23))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=1e-4)


def test_state_dict_is_the_file(tmp_path: Path) -> None:
    """Law: the keys on disk are the module paths; a tied head is not stored twice."""
    model = random_model(TINY)
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(model.state_dict()) - {"lm_head.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_config_round_trip_and_parameter_count(kind: str) -> None:
    """Law: config -> dict -> config is the identity; n_params counts what torch counts."""
    config = KINDS[kind]
    assert config_from_dict(config_to_dict(config, dtype=torch.float32)) == config
    assert config.n_params == sum(p.numel() for p in Transformer(config).parameters())


def test_published_sizes() -> None:
    """Known answers: parameter counts of published models (model cards), in billions."""
    known = {"llama-7b": 6.738, "llama-65b": 65.286, "llama-2-70b": 68.977, "llama-3-8b": 8.030, "qwen3-8b": 8.191}
    for name, billions in known.items():
        assert preset(name).n_params / 1e9 == pytest.approx(billions, abs=0.001)
    assert PRESETS["qwen3-0.6b"].n_params / 1e6 == pytest.approx(596.05, abs=0.01)


def test_init_depends_on_the_seed_only() -> None:
    """Law: same seed, same weights, whatever the global generator did; residual projections are narrower."""
    one, two, other = Transformer(TINY), Transformer(TINY), Transformer(TINY)
    initialize_(one, seed=1)
    torch.rand(5)
    initialize_(two, seed=1)
    initialize_(other, seed=2)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    layer = one.model.layers[0]
    assert layer.mlp.down_proj.weight.std() < 0.7 * layer.mlp.up_proj.weight.std()
    assert fingerprint(one) == fingerprint(two) != fingerprint(other)


def test_causality() -> None:
    """Law: changing token t changes no logit before t."""
    model = random_model(TINY)
    ids = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(5))
    changed = ids.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 97
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.allclose(before[:, 11:], after[:, 11:])


def test_packed_documents_do_not_see_each_other() -> None:
    """Law: two documents packed in one row give what each gives alone."""
    model = random_model(TINY)
    ids = torch.randint(0, 97, (1, 30), generator=torch.Generator().manual_seed(6))
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    with torch.no_grad():
        packed = model(ids, positions=positions, cu_seqlens=torch.tensor([0, 12, 30], dtype=torch.int32))
        alone = torch.cat([model(ids[:, :12]), model(ids[:, 12:])], 1)
    torch.testing.assert_close(packed, alone, atol=2e-5 * alone.abs().max().item(), rtol=0)


def test_checkpointing_changes_no_gradient() -> None:
    """Law: recomputed activations give the same gradients."""
    gradients = []
    for checkpointing in (False, True):
        model = random_model(TINY).train()
        model.checkpointing = checkpointing
        model(torch.arange(20)[None]).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_fingerprint_is_of_the_file_in_every_dtype(tmp_path: Path) -> None:
    """Law: loading in float16 or bfloat16 doesn't make another base of it; another file is another base."""
    save_model(random_model(TINY), tmp_path / "a")
    found = {fingerprint(load_model(tmp_path / "a", dtype=d)) for d in ("float32", "float16", "bfloat16")}
    assert len(found) == 1
    other = random_model(TINY)
    initialize_(other, seed=1)
    save_model(other, tmp_path / "b")
    assert fingerprint(load_model(tmp_path / "b", dtype=None)) not in found


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("flags", range(8))
def test_biases_are_stored_exactly_or_refused(qk_norm: bool, flags: int) -> None:
    """Law: whatever switches are on, the config comes back the same from the file, or can't be written."""
    names = ("attention_bias", "attention_out_bias", "mlp_bias")
    config = replace(TINY, qk_norm=qk_norm, **{name: bool(flags >> i & 1) for i, name in enumerate(names)})
    try:
        stored = config_to_dict(config, dtype=torch.float32)
    except ValueError:
        assert flags, "no bias at all is always writable"
        return
    assert config_from_dict(stored) == config


def test_a_smaller_model_replaces_a_sharded_one(tmp_path: Path) -> None:
    """Law: an index left by a former model is not read in place of the new file."""
    save_model(random_model(TINY), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    save_model(random_model(TINY), tmp_path)
    assert load_model(tmp_path, dtype=None).config == TINY


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not covered"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has sliding_attention, but use_sliding",
        ),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "graft covers full_attention and sliding_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(found: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(config_to_dict(TINY, dtype=torch.float32) | found)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"d_model": 100, "n_heads": 12}, "d_model=100 is not divisible by n_heads=12; use d_model 96 or 108"),
        ({"n_heads": 8, "n_kv_heads": 3}, "n_heads=8 is not divisible by n_kv_heads=3"),
        ({"d_head": 7}, "d_head=7 is odd"),
        ({"n_layers": 0}, "n_layers=0 must be a whole number >= 1"),
        ({"init_std": -1.0}, "init_std=-1.0 must be > 0"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be > 0"),
        ({"sliding_window": 0}, "sliding_window=0 must be a whole number >= 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_sizes(TINY, **sizes)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown preset 'llama-8t'"):
        preset("llama-8t")
    with pytest.raises(ValueError, match="architecture 'GPTNeoForCausalLM' is not known; graft reads LlamaForCausalLM"):
        config_from_dict({"architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo"})
    with pytest.raises(ValueError, match="lacks intermediate_size"):
        config_from_dict(
            {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        )
    with pytest.raises(ValueError, match="rope_type 'longrope' is not supported"):
        config_from_dict(config_to_dict(TINY, dtype=torch.float32) | {"rope_parameters": {"rope_type": "longrope"}})
    with pytest.raises(ValueError, match="hidden_act 'gelu' is not covered"):
        config_from_dict(config_to_dict(TINY, dtype=torch.float32) | {"hidden_act": "gelu"})


def test_broken_folders(tmp_path: Path) -> None:
    """Each broken model folder is one clear error, never a half-loaded model."""
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere", dtype=None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        load_model(tmp_path / "file", dtype=None)
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_model(folder, dtype=None)
    save_model(random_model(TINY), folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        load_model(folder, dtype=None)
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        load_model(folder, dtype=None)
    (folder / "model.safetensors").write_bytes(whole)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks the weights model\.norm\.weight"):
        load_model(folder, dtype=None)
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"weight model\.norm\.weight has shape \(3,\)"):
        load_model(folder, dtype=None)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json line 1: not JSON"):
        load_model(folder, dtype=None)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    save_model(random_model(TINY), tmp_path / "other")
    (folder / "config.json").write_text((tmp_path / "other/config.json").read_text())
    with pytest.raises(FileNotFoundError, match="graft never loads pickle"):
        load_model(folder, dtype=None)


@pytest.mark.parametrize(
    ("own", "listed", "expected"),
    [(2, [2, 7], (2, 7)), ((3, 2), 7, (3, 2, 7)), (None, 7, 7), (2, 2, 2), (2, None, 2), (None, None, None)],
)
def test_what_ends_a_text_is_listed_in_two_files(own: object, listed: object, expected: object, tmp_path: Path) -> None:
    """Chat models name the end of a turn in generation_config.json alone."""
    model = random_model(replace(TINY, eos_token_id=own))
    save_model(model, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert load_config(tmp_path).eos_token_id == expected
    (tmp_path / "generation_config.json").unlink()
    assert load_config(tmp_path).eos_token_id == own


@pytest.mark.parametrize("listed", ["</s>", True, [[1]], [2, 1.5]])
def test_what_ends_a_text_must_be_ids(listed: object, tmp_path: Path) -> None:
    save_model(random_model(TINY), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    with pytest.raises(ValueError, match=r"generation_config\.json: .*eos_token_id is .*; expected a whole number"):
        load_config(tmp_path)
