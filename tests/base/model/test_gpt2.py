"""GPT-2's folders, and the model of 2017, which has none: parity with transformers and torch's own layers, caches, own layout."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from graft.base.generate.engine import Engine, generate_ids
from graft.base.generate.sampling import Sampling
from graft.base.model.config import ModelConfig
from graft.base.model.config_json import config_from_dict, config_to_dict
from graft.base.model.huggingface import save_model
from graft.base.model.init import parameter_roles
from graft.base.model.own_json import own_layout_note
from graft.base.model.presets import PRESETS
from graft.base.model.sizes import with_sizes
from graft.base.model.transformer import Transformer, initialize_
from graft.finetune.adapters.attach import attach_adapter
from graft.finetune.adapters.config import LoraConfig
from graft.finetune.loading import load_model, save_any
from graft.finetune.memory.measure import measure_memory
from graft.quant.files import quantization_config
from graft.quant.linear import KEEP, quantize_linears_

SIZES = {"vocab_size": 97, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 41}
GPT2 = with_sizes(PRESETS["gpt2"], **SIZES)
VASWANI = with_sizes(PRESETS["transformer-2017"], **SIZES)
IDS = torch.randint(1, 97, (2, 41), generator=torch.Generator().manual_seed(0))


def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.2, generator=generator))
    return model.eval()


def opened(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def test_transformers_opens_our_gpt2(tmp_path: Path) -> None:
    """Logits, greedy ids through both caches, and gradients of the tied embedding and the joined projection."""
    model = random_model(GPT2)
    save_model(model, tmp_path)
    theirs = opened(tmp_path)
    with torch.no_grad():
        ours, reference = model(IDS), theirs(IDS).logits
    torch.testing.assert_close(ours, reference, atol=2e-5 * reference.abs().max().item(), rtol=0)
    assert torch.equal(load_model(tmp_path)(IDS), model(IDS))
    prompt = IDS[:, :9]
    expected = theirs.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)[:, 9:]
    assert generate_ids(model, prompt.tolist(), Sampling(max_new_tokens=12, temperature=0)) == expected.tolist()
    loss = model.train()(IDS[:, :-1], IDS[:, 1:].contiguous()) / 80
    loss.backward()
    theirs.train()(IDS, labels=IDS).loss.backward()
    layer, peer = model.model.layers[1].self_attn, theirs.transformer.h[1].attn.c_attn
    joined = torch.cat([p.weight.grad for p in (layer.q_proj, layer.k_proj, layer.v_proj)])
    torch.testing.assert_close(joined, peer.weight.grad.t(), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(
        model.model.embed_positions.weight.grad[:40], theirs.transformer.wpe.weight.grad[:40], atol=1e-6, rtol=1e-3
    )


def test_our_loader_opens_their_gpt2(tmp_path: Path) -> None:
    """Sharded, and the oldest layout: no prefix, masks among the weights."""
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20kB")
    model = load_model(tmp_path, dtype=None)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-4)
    old = tmp_path / "old"
    theirs.save_pretrained(old)
    stored = {name.removeprefix("transformer."): t for name, t in load_file(old / "model.safetensors").items()}
    save_file(stored | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, old / "model.safetensors")
    assert torch.equal(load_model(old)(IDS), model(IDS))
    raw = json.loads((old / "config.json").read_text())
    with pytest.raises(ValueError, match="activation_function 'relu' is not covered for gpt2"):
        config_from_dict(raw | {"activation_function": "relu"})
    with pytest.raises(ValueError, match="n_embd=33 is not divisible by n_head=4"):
        config_from_dict(raw | {"n_embd": 33})


def test_the_layers_of_2017_are_torchs(tmp_path: Path) -> None:
    """Parity with nn.TransformerEncoderLayer (post-norm, relu) under a causal mask, embeddings and positions by hand."""
    model = random_model(VASWANI)
    x = model.model.embed_tokens(IDS) * 32**0.5
    t, i = torch.arange(41)[:, None], torch.arange(0, 32, 2)
    angles = t / 10_000 ** (i / 32)
    x = x + torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    for layer in model.model.layers:
        peer = nn.TransformerEncoderLayer(32, 4, layer.mlp.up_proj.out_features, 0.0, batch_first=True).eval()
        mixer = layer.self_attn
        with torch.no_grad():
            peer.self_attn.in_proj_weight.copy_(
                torch.cat([p.weight for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)])
            )
            peer.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]))
        pairs = (
            (peer.self_attn.out_proj, mixer.o_proj), (peer.linear1, layer.mlp.up_proj), (peer.linear2, layer.mlp.down_proj),
            (peer.norm1, layer.post_attention_layernorm), (peer.norm2, layer.post_feedforward_layernorm),
        )  # fmt: skip
        for theirs, ours in pairs:
            theirs.load_state_dict(ours.state_dict())
        mask = nn.Transformer.generate_square_subsequent_mask(41)
        x = peer(x, src_mask=mask, is_causal=True)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), x @ model.lm_head.weight.t(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [GPT2, VASWANI, replace(VASWANI, add_norm=False, positions="learned")])
def test_caches_folders_and_counts(config: ModelConfig, tmp_path: Path) -> None:
    """Law: rows of unlike lengths, in rows or in pages, give each one's own ids; config and folder come back as they were."""
    model = random_model(config)
    prompts = [IDS[0, :n].tolist() for n in (5, 23, 1)]
    for options in ({}, {"cache_bytes": 2**20}):
        engine, produced = Engine(model, max_batch=2, **options), {}
        for prompt in prompts:
            engine.add(prompt, Sampling(max_new_tokens=9, temperature=0))
        while engine.n_running or engine.n_waiting:
            for event in engine.step():
                produced.setdefault(event.request, []).append(event.token)
        for i, prompt in enumerate(prompts):
            ids = list(prompt)
            with torch.no_grad():
                while len(ids) < len(prompt) + 9:
                    ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            assert produced[i] == ids[len(prompt) :]
    assert config_from_dict(config_to_dict(config, dtype=torch.float32)) == config
    assert config.n_params == sum(p.numel() for p in model.parameters())
    assert (own_layout_note(config) is None) == (config is GPT2)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(IDS), model(IDS))


def test_it_trains_with_adapters_and_in_4_bits(tmp_path: Path) -> None:
    """Learning: ten steps of SGD from fresh weights lower the loss; LoRA on 4 bits has gradients; memory within 1%."""
    for config in (GPT2, VASWANI):
        model = Transformer(config)
        initialize_(model, seed=0)
        assert set(parameter_roles(model).values()) <= {"embedding", "hidden", "residual", "gain", "bias"}
        losses = []
        for _ in range(10):
            loss = model(IDS, IDS) / IDS.numel()
            model.zero_grad()
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.3 * parameter.grad
        assert losses[-1] < losses[0] - 0.3
    names = quantize_linears_(model)
    assert len(names) == 3 * 6
    attach_adapter(model, LoraConfig(rank=4))
    model.zero_grad()
    model.train()(IDS, IDS).backward()
    assert sum(p.grad is not None for p in model.parameters()) == 2 * 18
    quantized = random_model(GPT2)
    quantize_linears_(quantized)
    with pytest.raises(ValueError, match="quantized GPT-2 models can't be saved"):
        save_model(quantized, tmp_path)
    stored = quantization_config(double_quant=True, compute_dtype=torch.bfloat16, keep=KEEP)
    quantized = random_model(VASWANI)
    quantize_linears_(quantized)
    save_any(quantized, tmp_path / "nf4", stored=stored)
    torch.testing.assert_close(load_model(tmp_path / "nf4")(IDS), quantized(IDS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wide = with_sizes(GPT2, d_model=128)
    measured = measure_memory(wide, method="full", seq_len=41, batch_size=4, dtype="float32", device="cpu")
    torch.set_num_threads(threads)
    assert abs(measured.error) < 0.01


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"positions": "alibi"}, "positions='alibi' is not known; choose rope, sinusoidal, learned"),
        ({"gated": True, "activation": "relu"}, "activation=relu is of feed-forward layers without a gate"),
        ({"n_experts": 4}, "gated=false is not covered for experts"),
        ({"offset_norm": True}, "layer_norm and offset_norm are two kinds"),
        ({"add_norm": True, "post_norm": True}, "places of the norms; choose one"),
    ],
)
def test_switches_that_do_not_fit(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GPT2, **sizes)
    with pytest.raises(ValueError, match="42 tokens are more than the 41 positions"):
        random_model(GPT2)(torch.ones(1, 42, dtype=torch.int64))


def test_own_layout_names_what_it_does_not_know() -> None:
    raw = config_to_dict(VASWANI, dtype=torch.float32)
    raw["model"]["add_normm"] = True
    with pytest.raises(ValueError, match=r"config\.json: unknown config key 'add_normm'; did you mean add_norm"):
        config_from_dict(raw)


def test_packed_documents_may_fill_more_than_the_learned_positions() -> None:
    """Law: documents packed in one row of 50 tokens, none over the 41 positions, score as each alone; a text of 42 is refused."""
    model, ends = random_model(GPT2), [0, 41, 50]
    row = torch.randint(1, 97, (1, 50), generator=torch.Generator().manual_seed(1))
    parts = list(pairwise(ends))
    positions = torch.cat([torch.arange(end - start) for start, end in parts])[None]
    packed = model(row, positions=positions, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    alone = torch.cat([model(row[:, start:end]) for start, end in parts], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="42 tokens are more than the 41 positions that the model has learned"):
        model(row[:, :42])
