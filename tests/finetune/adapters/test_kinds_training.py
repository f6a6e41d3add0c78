"""Training every kind of adapter: `graft sft` with bit-identical resume, PEFT's losses, LoRA+'s rates, bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.optimizers import create_loraplus_optimizer

from graft.base.run import TrainConfig
from graft.base.runlog import read_metrics
from graft.finetune import sft
from graft.finetune.adapters.attach import attach_adapter
from graft.finetune.adapters.bank import AdapterBank
from graft.finetune.adapters.config import LoraConfig
from graft.finetune.adapters.files import read_adapter, save_adapter
from graft.finetune.adapters.lora import adapted_layers
from graft.finetune.data.packing import SFTBatches
from graft.finetune.evaluation.run import run_evaluate
from graft.finetune.loading import load_model
from graft.finetune.memory.measure import measure_memory
from graft.finetune.optimizers import trained_optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "dropout": 0.2, "rank": 4},
    "pissa": {"init": "pissa", "rank": 4, "lora_plus_ratio": 4.0},
    "own": {"rank": 4, "modules_to_save": ["norm", "embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"rank": 4, "trainable_token_indices": [3, 5, 290], "rank_pattern": {"q_proj": 2}},
    "prefix": {"adapter_kind": "prefix", "prefix_tokens": 4},
    "bottleneck": {"adapter_kind": "bottleneck", "bottleneck_size": 8, "dropout": 0.1},
}
METHODS = [*((kind, "lora") for kind in KINDS), ("dora", "qlora"), ("prefix", "qlora")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    answers = {"the cat": "sleeps", "a bird": "sings", "the tree": "stands", "rivers": "run"}
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{a}:", "completion": f" {b}"}) for a, b in answers.items()))
    return path


def train(
    base: Path, rows: Path, out: Path, method: str = "lora", *, resume: bool = False, **settings: Any
) -> dict[str, Any]:
    return sft.sft(
        base=base, data=rows, out=out, method=method, resume=resume, device="cpu",
        **settings if resume else {"batch_size": 4, "steps": 5, "checkpoint_every": 2, "learning_rate": 1e-2} | settings,
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_resume_is_bit_identical(
    kind: str, method: str, base_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: it learns; dying in step 4 and going on from step 2's checkpoint gives the uninterrupted run's file and log; the
    bank gives the loss that training ended with; training goes on from the folder."""
    train(base_dir, rows, tmp_path / "whole", method, **KINDS[kind])
    batch_at = SFTBatches.batch_at

    def dies(self: SFTBatches, step: int) -> object:
        if step == 3:
            raise RuntimeError("the power fails")
        return batch_at(self, step)

    monkeypatch.setattr(SFTBatches, "batch_at", dies)
    with pytest.raises(RuntimeError, match="the power fails"):
        train(base_dir, rows, tmp_path / "cut", method, **KINDS[kind])
    monkeypatch.undo()
    train(base_dir, rows, tmp_path / "cut", method, resume=True)
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    least = 0.02 if kind == "prefix" else 0.1  # a prefix can do little to a base of random weights
    assert losses(tmp_path / "cut")[-1] < losses(tmp_path / "cut")[0] - least
    if method == "lora":
        trained = run_evaluate(base_dir, rows, adapter=tmp_path / "cut", device="cpu")["loss"]
        assert trained < losses(tmp_path / "cut")[0] - least
        train(base_dir, rows, tmp_path / "more", steps=1, adapter=tmp_path / "cut", dropout=0.0)
        assert losses(tmp_path / "more")[0] == pytest.approx(trained, rel=1e-5), "it goes on where the other run ended"
        again = read_adapter(tmp_path / "more")
        assert again.tensors().keys() == read_adapter(tmp_path / "cut").tensors().keys()


PEERS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "dora": ({"use_dora": True}, lambda: peft.LoraConfig(use_dora=True)),
    "own": (
        {"modules_to_save": ("norm", "embed_tokens"), "ensure_weight_tying": True},
        lambda: peft.LoraConfig(modules_to_save=["norm", "embed_tokens"], ensure_weight_tying=True),
    ),
    "tokens": ({"trainable_token_indices": (3, 5)}, lambda: peft.LoraConfig(trainable_token_indices=[3, 5])),
    "pissa": ({"init": "pissa"}, lambda: peft.LoraConfig(init_lora_weights="pissa")),
    "plus": ({"lora_plus_ratio": 8.0}, lambda: peft.LoraConfig()),
}


@pytest.mark.parametrize("kind", PEERS)
def test_losses_are_pefts(base_dir: Path, kind: str) -> None:
    """Parity: eight AdamW steps from the same start give PEFT's losses, with LoRA+ those of PEFT's own optimizer."""
    options, make = PEERS[kind]
    model, config = load_model(base_dir, dtype=None).train(), LoraConfig(**{"rank": 4, "alpha": 8.0} | options)
    attach_adapter(model, config)
    theirs_config = make()
    theirs_config.r, theirs_config.lora_alpha, theirs_config.task_type = 4, 8, "CAUSAL_LM"
    theirs_config.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    hf = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    theirs = peft.get_peft_model(hf, theirs_config).train()
    for path, layer in adapted_layers(model):
        update: Any = layer.updates["default"]
        if hasattr(update, "lora_a") and kind != "pissa":
            theirs.base_model.model.get_submodule(path).lora_A["default"].weight.data.copy_(update.lora_a)
    loop = TrainConfig(learning_rate=2e-3, weight_decay=0.0, beta2=0.999)
    ours = trained_optimizer(model, loop, lora=config)
    if kind == "plus":
        peer = create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8.0, weight_decay=0.0, loraplus_weight_decay=0.0
        )
    else:
        peer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    ids = torch.randint(0, 290, (2, 20), generator=torch.Generator().manual_seed(0))
    found: list[list[float]] = []
    for run, optimizer in ((lambda: model(ids), ours), (lambda: theirs(ids).logits, peer)):
        found.append([])
        for _ in range(8):
            loss = F.cross_entropy(run()[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found[-1].append(loss.item())
    assert found[0][-1] < found[0][0] - 0.2, "it learns"
    assert found[0] == pytest.approx(found[1], abs=5e-5)  # rounding, through eight updates by Adam's quotients


@pytest.mark.parametrize(
    ("kind", "method"),
    [("dora", "qlora"), ("pissa", "lora"), ("own", "lora"), ("prefix", "lora"), ("bottleneck", "lora")],
)
def test_memory_is_predicted(kind: str, method: str) -> None:
    """Parity: the prediction is within 1% of what the allocator gave out in the same step."""
    from graft.base.model.config import ModelConfig

    config = ModelConfig(
        300, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_ff=128, max_seq_len=96, tie_embeddings=True
    )
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in KINDS[kind].items()}
    found = measure_memory(
        config,
        method=method,
        batch_size=2,
        seq_len=48,
        dtype="float32",
        checkpointing=False,
        lora=LoraConfig(**options),
        device="cpu",
    )
    assert abs(found.error) < 0.01
    assert found.predicted.adapters > 0


def test_packed_rows_see_the_prefix_and_themselves(base_dir: Path) -> None:
    """Law: two documents packed in one row give each document's own logits, with and without a mixed batch's padding."""
    model = load_model(base_dir, dtype=None)
    attach_adapter(model, LoraConfig(adapter_kind="prefix", prefix_tokens=3))
    ids = torch.randint(0, 290, (1, 11), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(4), *range(7)]])
    with torch.no_grad():
        packed = model(ids, positions=positions, cu_seqlens=torch.tensor([0, 4, 11], dtype=torch.int32))
        parts = torch.cat([model(ids[:, :4]), model(ids[:, 4:])], 1)
    torch.testing.assert_close(packed, parts, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 500}, r"rank=500 is more than the layer's smaller side 64 \(model.layers.0.self_attn.q_proj is 64 x 64\)"),
        ({"rank_pattern": {"k_proj": 40}}, r"rank=40 is more than the layer's smaller side 32 \(model.layers.0.self_attn.k_proj"),
        ({"rank_pattern": {"x_proj": 4}}, "rank_pattern: 'x_proj' matches none of the adapted linears"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern: 'q_proj' has -1; expected a number above 0"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern: 'q_proj' has 2.5; expected a whole number"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern holds '\(', no regular expression"),
        ({"targets": ["(q"]}, r"targets holds '\(q', no regular expression"),
        ({"targets": [".*x_proj"]}, r"lora targets {'.\*x_proj'} match no linear; this model has q_proj, k_proj"),
        ({"exclude_modules": ["x"]}, r"exclude_modules {'x'} match no linear"),
        ({"targets": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules leaves no linear to adapt"),
        ({"layers_to_transform": [7]}, "layers_to_transform names layer 7; the targets' layers are 0 to 1"),
        ({"layers_pattern": ["layers"]}, "layers_pattern needs layers_to_transform"),
        ({"targets": [".*q_proj"], "layers_to_transform": [1]}, "layers_to_transform can't be used with the regular expression"),
        ({"modules_to_save": ["x"]}, "modules_to_save names 'x', which this model hasn't; it has embed_tokens, input_l"),
        ({"modules_to_save": ["mlp"]}, "modules_to_save names mlp, no embedding, linear or norm"),
        ({"modules_to_save": ["lm_head"]}, "the base ties lm_head to embed_tokens, and modules_to_save names one of them"),
        ({"modules_to_save": ["embed_tokens"]}, "set ensure_weight_tying=true, or name both"),
        ({"modules_to_save": ["q_proj"]}, "q_proj would be adapted in two ways"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=true is about modules_to_save"),
        ({"trainable_token_indices": [300]}, "trainable_token_indices holds 300; the model's ids are 0 to 299"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices holds -1; ids start at 0"),
        ({"trainable_token_indices": [1, 1]}, "names an id twice"),
        ({"trainable_token_indices": [1], "targets": ["lm_head", "q_proj"]}, "lm_head would be adapted in two ways"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens", "lm_head"]}, "rows of it; choose one of them"),
        ({"init": "pizza"}, "unknown init 'pizza'; choose default, gaussian, pissa"),
        ({"adapter_kind": "ia3"}, "unknown adapter_kind 'ia3'; choose lora, prefix, bottleneck"),
        ({"adapter_kind": "prefix", "rank": 4}, "rank=4 is about LoRA; adapter_kind=prefix has none"),
        ({"adapter_kind": "prefix", "dropout": 0.1}, "dropout=0.1 is not defined for adapter_kind=prefix"),
        ({"init": "pissa", "use_dora": True}, "init=pissa with use_dora=true"),
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio=0.0 must be > 0"),
        ({"bottleneck_size": 0}, "bottleneck_size=0 must be >= 1; start from 64"),
        ({"use_rslora": True}, "unknown config key 'use_rslora'; did you mean rank_stabilized?"),
    ],
)  # fmt: skip
def test_bad_settings(base_dir: Path, rows: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Law: refused by name before anything is written."""
    with pytest.raises(ValueError, match=message):
        train(base_dir, rows, tmp_path / "out", **{"steps": 1} | changes)
    assert not (tmp_path / "out/run.json").exists()


def test_what_is_held_in_4_bits_does_not_train_in_full(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"modules_to_save names model\.layers\.0\.mlp\.up_proj, which is held in 4 bits"
    ):
        train(base_dir, rows, tmp_path / "out", "qlora", modules_to_save=["up_proj"], targets=["q_proj"])


def test_what_takes_plain_lora_alone_says_so(base_dir: Path, tmp_path: Path) -> None:
    """Law: combining, many at once and alignment from an adapter refuse by the option's name what they would drop."""
    from graft.finetune.adapters.combine import combine
    from graft.finetune.align.setup import adapter_settings
    from graft.finetune.many.run import sft_many

    model = load_model(base_dir, dtype=None)
    config = LoraConfig(rank=2, use_dora=True)
    attach_adapter(model, config)
    save_adapter(model, tmp_path / "dora", config, base=str(base_dir))
    adapter = read_adapter(tmp_path / "dora")
    with pytest.raises(
        ValueError, match=r"has use_dora=true and can't be combined with others; that is for plain LoRA alone"
    ):
        combine([adapter, adapter], [0.5, 0.5], "cat")
    with pytest.raises(ValueError, match="has use_dora=true and can't be the start of such a run"):
        adapter_settings(adapter, {}, "lora")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(
        ValueError, match="use_dora=True is not covered for jobs that train together, which are plain LoRA"
    ):
        sft_many(
            base=base_dir, jobs=[{"data": rows, "out": tmp_path / "o", "use_dora": True, "steps": 1}], device="cpu"
        )


def test_a_prefix_needs_layers_that_see_everything(base_dir: Path, tmp_path: Path) -> None:
    """Law: with a sliding window a prefix would slide out of sight: refused when attached and when loaded."""
    from dataclasses import replace

    from graft.base.model.transformer import Transformer

    model = load_model(base_dir, dtype=None)
    config = LoraConfig(adapter_kind="prefix", prefix_tokens=2)
    attach_adapter(model, config)
    save_adapter(model, tmp_path / "a", config, base=str(base_dir))
    slides = Transformer(replace(model.config, sliding_window=8, sliding_layers=(True, True)))
    with pytest.raises(ValueError, match="adapter_kind=prefix is not covered for layers with a sliding window"):
        attach_adapter(slides, config)
    slides.fingerprint = None
    with pytest.raises(ValueError, match="is a prefix, which is not covered for layers with a sliding window"):
        AdapterBank(slides).load("a", tmp_path / "a")
