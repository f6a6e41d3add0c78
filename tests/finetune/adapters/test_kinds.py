"""Every kind of adapter: PEFT's logits from our folders and ours from PEFT's, swaps, mixed batches, decoding, merging."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from graft.base.generate.engine import generate_ids
from graft.base.generate.sampling import Sampling
from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import save_model
from graft.base.model.transformer import Transformer, initialize_
from graft.finetune.adapters.attach import attach_adapter
from graft.finetune.adapters.bank import AdapterBank
from graft.finetune.adapters.config import LoraConfig
from graft.finetune.adapters.files import read_adapter, save_adapter
from graft.finetune.adapters.merge import merge
from graft.finetune.loading import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]
IDS = torch.randint(0, 290, (4, 11), generator=torch.Generator().manual_seed(0))
LORA: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "rank_stabilized": True, "targets": ("q_proj", "up_proj")},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "pissa rslora patterns": {
        "init": "pissa", "rank_stabilized": True, "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3},
        "alpha_pattern": {"v_proj": 5},
    },
    "patterns": {"rank_pattern": {".*_proj": 2, "mlp.up_proj": 6}, "alpha_pattern": {r"0\.self_attn.*": 1.5}},
    "regex": {"targets": (r".*layers\.[13579]\..*\.(q|up)_proj", "down_proj")},
    "layers": {"targets": ("q_proj", "down_proj"), "layers_to_transform": (1,), "layers_pattern": ("layers",)},
    "excluded": {"exclude_modules": ("k_proj", r".*layers\.0\.mlp.*")},
    "norms": {"modules_to_save": ("norm",), "use_dora": True},
    "head and embedding": {"modules_to_save": ("embed_tokens", "lm_head")},
    "tied": {"modules_to_save": ("embed_tokens", "o_proj"), "ensure_weight_tying": True, "exclude_modules": ("o_proj",)},
    "tokens": {"trainable_token_indices": (3, 290, 7)},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "prefix": {"adapter_kind": "prefix", "prefix_tokens": 5},
    "bottleneck": {"adapter_kind": "bottleneck", "bottleneck_size": 8},
}


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a head of its own, biases and QK-norm: what the tied base of the other tests lacks."""
    folder = tmp_path_factory.mktemp("untied") / "base"
    config = ModelConfig(
        300, d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_ff=96, max_seq_len=64, tie_embeddings=False,
        attention_bias=False, qk_norm=True,
    )  # fmt: skip
    model = Transformer(config)
    initialize_(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # also norms and biases, which start at 1 and 0
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator) * parameter.data.std().clamp(min=0.1)
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: pytest.FixtureRequest, base_dir: Path, untied_dir: Path) -> Path:
    return base_dir if request.param == "tied" else untied_dir


def config_of(options: dict[str, Any]) -> LoraConfig:
    return LoraConfig(**options if "adapter_kind" in options else {"rank": 4, "alpha": 8.0} | options)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids)


def near(found: Tensor, expected: Tensor) -> None:
    """Equal to float32's rounding through two layers: 1e-5, of the largest logit where that is above 1."""
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, expected.abs().max().item()), rtol=0)


def trained(base: Path, options: dict[str, Any], *, seed: int = 0) -> tuple[Transformer, LoraConfig]:
    """A model whose adapter has moved away from where it starts."""
    model, config = load_model(base, dtype=None), config_of(options)
    attach_adapter(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), config


def banked(base: Path, folder: Path) -> Transformer:
    model = load_model(base, dtype=None)
    bank = AdapterBank(model)
    bank.load("a", folder)
    bank.use("a")
    return model


def in_peft(base: Path, folder: Path) -> Tensor:
    hf = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(hf, folder).eval()
    with torch.no_grad():
        return theirs(IDS).logits


@pytest.mark.parametrize("kind", [*LORA, *OTHERS])
def test_a_new_adapter_is_the_base_and_only_it_trains(base_dir: Path, kind: str) -> None:
    """Law: before its first step every kind but a prefix gives the base's logits, and nothing of the base has a gradient."""
    model = load_model(base_dir, dtype=None)
    expected = logits(model)
    own = {name for name, _ in model.named_parameters()}
    attach_adapter(model, config_of((LORA | OTHERS)[kind]))
    if kind != "prefix":
        near(logits(model), expected)
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moving
    assert not moving & own
    model(IDS).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("kind", [*LORA, "prefix"])
def test_peft_opens_our_folder(base: Path, tmp_path: Path, kind: str) -> None:
    """Parity: the model in training, our bank and PEFT on transformers give the same logits; so does the merged model."""
    model, config = trained(base, (LORA | OTHERS)[kind])
    expected = logits(model)
    assert (expected - logits(load_model(base, dtype=None))).abs().max() > 0.05 * expected.abs().max()
    save_adapter(model, tmp_path / "a", config, base=str(base))
    near(logits(banked(base, tmp_path / "a")), expected)
    near(in_peft(base, tmp_path / "a"), expected)
    merged = load_model(base, dtype=None)
    if kind == "prefix":
        with pytest.raises(
            ValueError, match=r"is no change of weights \(peft_type=PREFIX_TUNING\) and can't be merged"
        ):
            merge(merged, read_adapter(tmp_path / "a"))
        return
    merge(merged, read_adapter(tmp_path / "a"))
    near(logits(merged), expected)
    save_model(merged, tmp_path / "merged")
    near(logits(load_model(tmp_path / "merged", dtype=None)), expected)


PEFTS: dict[str, Callable[[], Any]] = {
    "dora": lambda: peft.LoraConfig(use_dora=True, use_rslora=True, target_modules=["q_proj", "down_proj"], r=3),
    "dora patterns": lambda: peft.LoraConfig(
        use_dora=True,
        target_modules=r".*layers\.1\..*_proj",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"up_proj": 3.5},
    ),
    "norms": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm", "v_proj"]),
    "embedding": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "both": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "ensured": lambda: peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "ensured head": lambda: peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True
    ),
    "tokens": lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[4, 2]),
    "tokens of two": lambda: peft.LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [4, 2], "lm_head": [9]}
    ),
    "tokens alike": lambda: peft.LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [4, 2], "lm_head": [4, 2]}
    ),
    "tokens of the head": lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [4]}),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3),
    "projected": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
}


@pytest.mark.parametrize("kind", PEFTS)
def test_our_bank_opens_pefts_folder(base: Path, tmp_path: Path, kind: str) -> None:
    """Parity: a folder that PEFT made gives PEFT's logits here, merged too; what it reads wrongly itself is as it loads it."""
    config = PEFTS[kind]()
    config.task_type = "CAUSAL_LM"
    if isinstance(config, peft.LoraConfig):
        config.init_lora_weights = False
    torch.manual_seed(0)
    made = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    made.save_pretrained(tmp_path / "a")
    expected = in_peft(base, tmp_path / "a")
    near(logits(banked(base, tmp_path / "a")), expected)
    if "pref" not in kind and kind != "projected":
        merged = load_model(base, dtype=None)
        merge(merged, read_adapter(tmp_path / "a"))
        near(logits(merged), expected)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An adapter of every kind, and a plain one."""
    root = tmp_path_factory.mktemp("crowd")
    kinds = {"plain": {}, **LORA, **OTHERS, "short": OTHERS["prefix"] | {"prefix_tokens": 2}}
    for seed, (kind, options) in enumerate(kinds.items()):
        model, config = trained(base, options, seed=seed)
        save_adapter(model, root / kind, config, base=str(base))
    return [root / kind for kind in kinds]


@pytest.fixture
def crowd(base: Path, folders: list[Path]) -> AdapterBank:
    """One bank with all of them."""
    bank = AdapterBank(load_model(base, dtype=None))
    for folder in folders:
        bank.load(folder.name, folder)
    return bank


def test_all_kinds_in_one_bank(crowd: AdapterBank) -> None:
    """Law: each acts as it does alone, a batch of all kinds gives each row its own, and unloading all leaves the bare base."""
    bank, model = crowd, crowd.model
    alone: dict[str | None, Tensor] = {}
    for name in [None, *bank.names]:
        bank.use(name)
        alone[name] = logits(model, IDS[:1])[0]
    bank.use(None)
    assert len({tuple(one[0, :3].tolist()) for one in alone.values()}) == len(alone), "every kind changes the logits"
    assert len({bank.content(name) for name in bank.names}) == len(bank.names)
    names = [*bank.names, None, *bank.names[:3]]  # some twice: an adapter's rows need not be neighbors
    with bank.rows(names), torch.no_grad():
        mixed = model(IDS[:1].expand(len(names), -1))
    for row, name in enumerate(names):
        near(mixed[row], alone[name])
    assert not model.fused_decoding
    for name in bank.names:
        bank.unload(name)
    assert model.fused_decoding
    assert torch.equal(logits(model, IDS[:1])[0], alone[None])
    assert not [
        module for module in model.modules() if "Adapted" in type(module).__name__ or "LoRA" in type(module).__name__
    ]


def test_decoding_is_the_full_forward_pass(crowd: AdapterBank) -> None:
    """Law: requests of every kind together, of different lengths and in two waves, get the greedy tokens of recomputing all."""
    bank, model = crowd, crowd.model
    names: list[str | None] = [*bank.names, None]
    prompts = [IDS[i % 4, : 4 + i % 5].tolist() for i in range(len(names))]
    found = generate_ids(model, prompts, Sampling(max_new_tokens=5), adapters=names, max_batch=7)
    for name, prompt, tokens in zip(names, prompts, found, strict=True):
        bank.use(name)
        ids = list(prompt)
        for token in tokens:
            top = logits(model, torch.tensor([ids]))[0, -1].topk(2)
            assert token == top.indices[0] or (top.values[0] - top.values[1]) < 1e-4, name
            ids.append(token)
