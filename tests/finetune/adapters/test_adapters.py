"""LoRA and the bank: laws of low-rank updates, PEFT's own files and logits, swapping, rows, merging."""

import json
import math
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

from graft.base.checkpoint import load_tensors, save_tensors
from graft.base.model.transformer import Transformer
from graft.finetune.adapters.bank import AdapterBank
from graft.finetune.adapters.drift import drift_of
from graft.finetune.adapters.files import read_adapter, save_adapter
from graft.finetune.adapters.lora import LoraConfig, attach_lora, lora_layers, remove_adapter
from graft.finetune.adapters.merge import merge, run_merge
from graft.finetune.loading import load_model
from graft.finetune.quantize import run_quantize

# PEFT 0.21 reads a name that transformers 5.23 calls deprecated: theirs to settle between them.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.randint(0, 290, (2, 15), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


def make_adapter(base: Path, folder: Path, *, seed: int, **changes: object) -> Path:
    """An adapter with a B that is not zero, so that it changes the logits."""
    model = load_model(base, dtype=None)
    config = LoraConfig(**{"rank": 4, "alpha": 8.0} | changes)
    attach_lora(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        layer.updates["default"].lora_b.data.normal_(0, 0.1, generator=generator)
    save_adapter(model, folder, config, base=str(base), graft={"prompt_format": "text"})
    return folder


@pytest.fixture
def two_adapters(base_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    one = make_adapter(base_dir, tmp_path / "one", seed=1)
    two = make_adapter(base_dir, tmp_path / "two", seed=2, rank=3, targets=("q_proj", "down_proj"))
    return one, two


def test_a_fresh_adapter_is_the_base_and_only_it_trains(base_dir: Path) -> None:
    """Law: B = 0 changes nothing; every gradient but the adapter's is off; detaching gives the base back."""
    model = load_model(base_dir, dtype=None)
    before = logits(model)
    paths = attach_lora(model, LoraConfig(rank=4))
    assert len(paths) == 2 * 7
    assert torch.equal(logits(model), before)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    remove_adapter(model, "default")
    assert torch.equal(logits(model), before)


def test_update_by_hand() -> None:
    """Worked by hand: W = I, A = [1, 0], B = [0, 2]^T, alpha / rank = 3: (x1, x2) -> (x1, x2 + 6 x1)."""
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.eye(2)
    model = nn.Sequential(linear)
    attach_lora(model, LoraConfig(rank=1, alpha=3.0))
    [(path, layer)] = lora_layers(model)
    layer = layer.updates["default"]
    layer.lora_a.data, layer.lora_b.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [2.0]])
    assert path == "0"
    assert model(torch.tensor([[5.0, 7.0]])).tolist() == [[5.0, 37.0]]
    assert layer.delta().tolist() == [[0.0, 0.0], [6.0, 0.0]]


def test_gradients_flow_with_checkpointing(base_dir: Path) -> None:
    """Law: with recomputed activations on a frozen base the adapter's gradients are the same, and not missing."""
    gradients = []
    for checkpointing in (False, True):
        model = load_model(base_dir, dtype=None).train()
        attach_lora(model, LoraConfig(rank=4), seed=0)
        model.checkpointing = checkpointing
        model(IDS).square().mean().backward()
        gradients.append([layer.updates["default"].lora_b.grad for _, layer in lora_layers(model)])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert plain.abs().max() > 0
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(
    "changes",
    [{}, {"targets": ("q_proj", "v_proj")}, {"rank_stabilized": True}, {"targets": ("model.layers.1.mlp.up_proj",)}],
)
def test_peft_opens_our_folder(base_dir: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    """Parity: transformers + PEFT give our logits from our two folders."""
    folder = make_adapter(base_dir, tmp_path / "a", seed=5, **changes)
    model = load_model(base_dir, dtype=None)
    bank = AdapterBank(model)
    bank.load("a", folder)
    bank.use("a")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), folder
    ).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
    torch.testing.assert_close(logits(model), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


def test_our_bank_opens_pefts_folder(base_dir: Path, tmp_path: Path) -> None:
    """Parity: an adapter that PEFT made, with a rank pattern and a named sub-folder, gives PEFT's logits here."""
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM",
        rank_pattern={"up_proj": 5}, alpha_pattern={r"layers\.0\.self_attn\.q_.*": 11},
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config, adapter_name="mine").eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(base_dir, dtype=None)
    bank = AdapterBank(model)
    bank.load("mine", tmp_path / "mine")
    bank.use("mine")
    with torch.no_grad():
        expected = theirs(IDS).logits
    torch.testing.assert_close(logits(model), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


def test_swapping_is_exact(base_dir: Path, two_adapters: tuple[Path, Path]) -> None:
    """Law: one -> two -> base -> one gives each time what it gave alone; the base's weights never change."""
    alone = []
    for folder in two_adapters:
        model = load_model(base_dir, dtype=None)
        bank = AdapterBank(model)
        bank.load("x", folder)
        bank.use("x")
        alone.append(logits(model))
    model = load_model(base_dir, dtype=None)
    base = logits(model)
    bank = AdapterBank(model)
    bank.load("one", two_adapters[0])
    bank.load("two", two_adapters[1])
    assert torch.equal(logits(model), base)
    for name, expected in (("one", alone[0]), ("two", alone[1]), (None, base), ("one", alone[0])):
        bank.use(name)
        assert torch.equal(logits(model), expected)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    bank.load("one", two_adapters[0])
    assert bank.active == "one", "reloading the adapter in use keeps it in use"
    bank.unload("one")
    assert bank.active is None
    assert torch.equal(logits(model), base)
    bank.unload("two")
    assert not any("LoRALinear" in type(m).__name__ for m in model.modules())


def test_a_mixed_batch_is_each_row_alone(base_dir: Path, two_adapters: tuple[Path, Path]) -> None:
    """Law: row i with adapter i gives what the whole batch with adapter i gives in row i."""
    model = load_model(base_dir, dtype=None)
    bank = AdapterBank(model)
    bank.load("one", two_adapters[0])
    bank.load("two", two_adapters[1])
    ids = IDS[:1].expand(4, -1)
    names = ["two", None, "one", "two"]
    with torch.no_grad(), bank.rows(names):
        mixed = model(ids)
    for row, name in enumerate(names):
        bank.use(name)
        with torch.no_grad():
            expected = model(ids)[row]
        torch.testing.assert_close(mixed[row], expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    with pytest.raises(ValueError, match="the batch has 2 rows, adapters were chosen for 4"), bank.rows(names):
        logits(model)


def test_merged_is_unmerged(base_dir: Path, two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    """Law: merging changes no logit beyond rounding, in memory and by way of the folder, which transformers opens."""
    model = load_model(base_dir, dtype=None)
    bank = AdapterBank(model)
    bank.load("one", two_adapters[0])
    bank.use("one")
    expected = logits(model)
    merged = load_model(base_dir, dtype=None)
    assert merge(merged, read_adapter(two_adapters[0])).relative_error == 0
    run_merge(base_dir, two_adapters[0], tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        folder = theirs(IDS).logits
    for found in (logits(merged), folder):
        torch.testing.assert_close(found, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    for taken in (base_dir, two_adapters[0]):
        with pytest.raises(ValueError, match="is the base or the adapter itself"):
            run_merge(base_dir, two_adapters[0], taken, force=True)
    with pytest.raises(ValueError, match="is the base itself"):
        run_quantize(base_dir, base_dir, force=True)
    with pytest.raises(FileExistsError, match="is not empty"):
        run_merge(base_dir, two_adapters[0], tmp_path / "merged")


def test_drift_by_hand() -> None:
    """Two positions, two tokens: p = (3/4, 1/4) against q = (1/2, 1/2), and p = q = (1/2, 1/2).

    KL = 3/4 log(3/2) + 1/4 log(1/2) at the first, 0 at the second; the first token of equal ones is taken, so both agree.
    """
    p, q = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(), torch.full((2, 2), 0.5).log()
    drift = drift_of([p[:1], p[1:]], [q[:1], q[1:]])
    assert drift.kl == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2, rel=1e-6)
    assert (drift.equal_tokens, drift.n_tokens) == (1.0, 2)
    assert drift_of([p.flip(-1)], [p]).equal_tokens == 0.5


def test_a_merge_says_how_far_it_is_from_what_was_merged(
    base_dir: Path, two_adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: the figures are in merge.json; too much drift is refused unless allowed, and leaves the old folder as it was."""
    _, drift = run_merge(base_dir, two_adapters[0], tmp_path / "merged")
    assert 0 <= drift.kl < 1e-6
    assert drift.equal_tokens == 1
    written = json.loads((tmp_path / "merged/merge.json").read_text())
    assert written["kl"] == drift.kl
    assert written["n_tokens"] == drift.n_tokens > 20
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    monkeypatch.setattr("graft.finetune.adapters.merge.LARGEST_KL", -1.0)
    with pytest.raises(ValueError, match="the merged model's predictions differ from those of base and adapter by"):
        run_merge(base_dir, two_adapters[1], tmp_path / "merged", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == before
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "merged/adapter_config.json").write_text("{}")
    run_merge(base_dir, two_adapters[1], tmp_path / "merged", force=True, allow_drift=True)
    assert {path.name for path in (tmp_path / "merged").iterdir()} == set(before)
    assert (tmp_path / "merged/model.safetensors").read_bytes() != before["model.safetensors"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_base_that_is_not_finite_is_not_merged(
    value: float, base_dir: Path, two_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(base_dir, tmp_path / "base")
    tensors = load_tensors(base_dir / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_tensors(tmp_path / "base/model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"base: model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        run_merge(tmp_path / "base", two_adapters[0], tmp_path / "merged", allow_drift=True)
    assert not (tmp_path / "merged").exists()


def test_merging_into_a_tied_head_unties_it(base_dir: Path, tmp_path: Path) -> None:
    """Law (PEFT issues 2018, 2777): an adapter on a tied lm_head must not change the input embedding when merged."""
    folder = make_adapter(base_dir, tmp_path / "head", seed=3, targets=("lm_head",))
    model = load_model(base_dir, dtype=None)
    bank = AdapterBank(model)
    bank.load("head", folder)
    bank.use("head")
    expected = logits(model)
    run_merge(base_dir, folder, tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype=None)
    assert not merged.config.tie_embeddings
    torch.testing.assert_close(logits(merged), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


def test_merging_into_four_bits_reports_its_error(
    base_dir: Path, two_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    """Law: the 4-bit base stays 4-bit, the loss of requantizing is measured and not zero, the folder loads again."""
    run_quantize(base_dir, tmp_path / "nf4")
    report, _ = run_merge(tmp_path / "nf4", two_adapters[0], tmp_path / "merged")
    assert 0 < report.relative_error < 10
    merged = load_model(tmp_path / "merged")
    assert logits(merged).isfinite().all()
    with pytest.raises(ValueError, match="is quantized already"):
        run_quantize(tmp_path / "nf4", tmp_path / "again")


def test_an_adapter_for_another_base_is_refused(
    base_dir: Path, two_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    model = load_model(base_dir, dtype=None)
    bank = AdapterBank(model)
    for change, message in (
        ({"d_ff": 64}, r"is for another base: model\.layers\.0\.mlp\.\w+_proj is"),
        ({"n_layers": 1}, r"is for another base: this one has no model\.layers\.1"),
    ):
        other = Transformer(type(model.config)(**model.config.__dict__ | change))
        with pytest.raises(ValueError, match=message):
            AdapterBank(other).load("one", two_adapters[0])
    (two_adapters[0] / "graft.json").write_text(json.dumps({"base_fingerprint": "0" * 16}))
    with pytest.raises(ValueError, match="trained on another base of the same shape"):
        bank.load("one", two_adapters[0])
    with pytest.raises(ValueError, match="no adapter 'three' is loaded; loaded are: none"):
        bank.use("three")
    with pytest.raises(ValueError, match="needs a name"):
        bank.load("", two_adapters[1])
    with pytest.raises(ValueError, match="has an adapter bank already"):
        AdapterBank(model)


def test_broken_adapter_folders(two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    one = two_adapters[0]
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_adapter(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path / "empty")
    config = json.loads((one / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not covered"),
        ({"use_dora": True}, "has not both A, B and lora_magnitude_vector"),
        ({"bias": "all"}, "bias='all' is not covered"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not covered"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not covered"),
        ({"lora_bias": True}, "lora_bias=True is not covered"),
    ):
        (one / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            read_adapter(one)
    (one / "adapter_config.json").write_text(json.dumps(config))
    weights = (one / "adapter_model.safetensors").read_bytes()
    (one / "adapter_model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        read_adapter(one)
    os.unlink(one / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors does not exist"):
        read_adapter(one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank=0 must be >= 1"),
        ({"alpha": 0.0}, "alpha=0.0 must be > 0"),
        ({"dropout": 1.0}, r"dropout=1\.0 must lie in \[0, 1\)"),
        ({"targets": ("q_proj2",)}, r"lora targets {'q_proj2'} match no linear; this model has q_proj, k_proj"),
        ({"rank": 500}, "rank=500 is more than the layer's smaller side"),
    ],
)
def test_bad_configs(base_dir: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_lora(load_model(base_dir, dtype=None), LoraConfig(**changes))
