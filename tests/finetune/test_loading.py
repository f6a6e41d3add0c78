"""A base in 4 bits: quantized as it streams in or loaded from a folder, one weight at a time, and what transformers reads."""

import json
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graft
from graft.base.model.huggingface import load_config
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune import loading
from graft.finetune import quantize as quantize_module
from graft.finetune.folders import carry_over
from graft.finetune.loading import check_token_ids, load_model, save_any, weight_bytes
from graft.finetune.quantize import run_quantize, stored_bytes
from graft.quant.linear import NF4Linear, quantize_linears_

STATE = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
IDS = torch.randint(0, 290, (2, 15), generator=torch.Generator().manual_seed(0))


def as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


@pytest.fixture(scope="module")
def nf4_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4") / "nf4"
    run_quantize(base_dir, folder)
    return folder


@pytest.mark.parametrize("double_quant", [True, False])
def test_three_ways_to_four_bits_agree(double_quant: bool, base_dir: Path, tmp_path: Path) -> None:
    """Law: quantized as it streams in, in memory afterwards, and written and read again: the very same logits."""
    streamed = load_model(base_dir, quantize="nf4", double_quant=double_quant)
    in_memory = load_model(base_dir)
    full = logits(in_memory)
    quantize_linears_(in_memory, double_quant=double_quant)
    run_quantize(base_dir, tmp_path / "nf4", double_quant=double_quant)
    from_folder = load_model(tmp_path / "nf4")
    expected = logits(streamed)
    assert torch.equal(logits(in_memory), expected)
    assert torch.equal(logits(from_folder), expected)
    assert not torch.equal(full, expected)
    assert {type(m) for m in from_folder.modules()} >= {NF4Linear}
    kept = [name for name, m in from_folder.named_modules() if type(m) is nn.Linear]
    assert kept == ["lm_head"]


def test_no_full_precision_copy(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: when a weight is read from the file, at most the one before it is still alive in full precision."""
    read: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    original = loading.iterate_weights

    def watched(folder: Path, **options: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in original(folder, **options):
            alive.append(sum(ref() is not None for ref in read))
            if name.endswith("_proj.weight"):
                read.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    monkeypatch.setattr(loading, "iterate_weights", watched)
    model = load_model(base_dir, quantize="nf4")
    assert len(read) == 2 * 7
    assert max(alive) <= 1
    assert sum(ref() is not None for ref in read) == 0
    alive.clear()
    read.clear()
    leaked: list[Tensor] = []
    take = loading.WeightStream.take
    monkeypatch.setattr(loading.WeightStream, "take", lambda self, n, t: leaked.append(t) or take(self, n, t))
    load_model(base_dir, quantize="nf4")
    assert max(alive) > 10, "the test would see a copy that stays"
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    assert max(t.numel() for layer in layers for t in layer.buffers() if t.is_floating_point()) <= 256  # constants


def test_bits_by_hand(base_dir: Path, tmp_path: Path) -> None:
    """Worked by hand: 4 bits, and a scale of 32 bits for 64 weights, are 4.5 bits a weight; with the scales in 8 bits and
    one of 32 bits and a mean a layer for up to 256 of them, 4 + 8/64 + (32 n_groups + 32) / n."""
    single = run_quantize(base_dir, tmp_path / "single", double_quant=False)
    double = run_quantize(base_dir, tmp_path / "double")
    assert single["bits_per_weight"] == 4.5
    sizes = 2 * [64 * 64, 64 * 64, 64 * 32, 64 * 32, 64 * 128, 64 * 128, 64 * 128]
    assert double["n_quantized_weights"] == sum(sizes)
    assert double["n_quantized_layers"] == 14
    extra = sum(8 * n // 64 + 32 * -(-(n // 64) // 256) + 32 for n in sizes)
    assert double["bits_per_weight"] == pytest.approx(4 + extra / sum(sizes))
    assert double["file_bytes"] == (tmp_path / "double/model.safetensors").stat().st_size
    assert double["file_bytes"] < (base_dir / "model.safetensors").stat().st_size / 2
    model = load_model(tmp_path / "double")
    assert sum(stored_bytes(m) for m in model.modules() if isinstance(m, NF4Linear)) * 8 == 4 * sum(sizes) + extra


@pytest.mark.slow
def test_transformers_opens_the_folder(nf4_dir: Path) -> None:
    """Parity: transformers with bitsandbytes reads our folder; in float32 its logits are ours."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(nf4_dir, dtype=torch.float32)
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    for module in theirs.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
    theirs.train()  # in eval mode its CPU path repacks the weights and multiplies in bfloat16
    with torch.no_grad():
        expected = theirs(IDS).logits
    # float32 sums in another order: a few ulps of the largest logit
    torch.testing.assert_close(logits(load_model(nf4_dir)), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


def test_round_trip_of_a_four_bit_model(nf4_dir: Path, tmp_path: Path) -> None:
    """Law: loaded and saved again it is the same file and the same config."""
    stored = json.loads((nf4_dir / "config.json").read_text())["quantization_config"]
    save_any(load_model(nf4_dir, dtype=None), tmp_path, stored=stored)
    one, other = (load_file(folder / "model.safetensors") for folder in (nf4_dir, tmp_path))
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((nf4_dir / "config.json").read_text())


def test_dtype_and_size(base_dir: Path, nf4_dir: Path) -> None:
    """Law: dtype is that of all weights that are not quantized; None keeps the file's; tied weights count once."""
    for folder in (base_dir, nf4_dir):
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32), (None, torch.float32)):
            model = load_model(folder, dtype=name)
            assert {p.dtype for p in model.parameters()} == {dtype}
            assert logits(model).isfinite().all()
            assert not model.training
    assert weight_bytes(load_model(base_dir)) == 4 * load_model(base_dir).config.n_params
    assert weight_bytes(load_model(nf4_dir)) < 0.5 * weight_bytes(load_model(base_dir))
    assert graft.load_model is load_model


def test_folders_that_do_not_load(base_dir: Path, nf4_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown dtype 'int4'; choose float32"):
        load_model(base_dir, dtype="int4")
    with pytest.raises(ValueError, match="unknown device 'tpux'"):
        load_model(base_dir, device="tpux")
    with pytest.raises(ValueError, match="is quantized already"):
        run_quantize(nf4_dir, tmp_path / "again")
    with pytest.raises(FileExistsError, match="is not empty; choose another folder or --force"):
        run_quantize(base_dir, nf4_dir)
    copy = tmp_path / "copy"
    for base, key, message in (
        (base_dir, "model.layers.1.mlp.up_proj.weight", r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"),
        (
            nf4_dir,
            "model.layers.1.mlp.up_proj.weight.absmax",
            r"copy: .* lacks model\.layers\.1\.mlp\.up_proj\.weight\.absmax;",
        ),
        (nf4_dir, "model.norm.weight", r"lacks the weights model\.norm\.weight"),
    ):
        shutil.copytree(base, copy)
        tensors = load_file(copy / "model.safetensors")
        del tensors[key]
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_model(copy)
        shutil.rmtree(copy)
    shutil.copytree(base_dir, copy)
    tensors = load_file(copy / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if "mlp.down" not in k}, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.mlp\.down_proj\.weight"):
        load_model(copy, quantize="nf4")


@pytest.mark.parametrize(
    ("key", "spoil", "message"),
    [
        (
            "model.embed_tokens.weight",
            lambda t: t.index_fill(0, torch.tensor([3]), float("nan")),
            r"^.*bad: model\.embed_tokens\.weight: \d+ of \d+ values are not finite, the first is nan at 192 of the flat",
        ),
        (
            "model.layers.1.mlp.up_proj.weight",
            lambda t: t.to(torch.int32),
            r"model\.layers\.1\.mlp\.up_proj\.weight: cannot quantize a int32 tensor of shape \(128, 64\)",
        ),
    ],
)
def test_quantize_names_the_tensor_that_cannot_be(
    key: str, spoil: Callable[[torch.Tensor], torch.Tensor], message: str, base_dir: Path, tmp_path: Path
) -> None:
    """Also one that stays in full precision; nothing is written."""
    shutil.copytree(base_dir, tmp_path / "bad")
    tensors = load_file(base_dir / "model.safetensors")
    tensors[key] = spoil(tensors[key])
    save_file(tensors, tmp_path / "bad/model.safetensors")
    with pytest.raises(ValueError, match=message):
        run_quantize(tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_config(base: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(base, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_ids_beyond_the_embedding(base_dir: Path, tmp_path: Path) -> None:
    """A token of the tokenizer or an id of config.json without a row is named at load, with the number of rows."""
    tokenizer, config = Tokenizer.load(base_dir), load_config(base_dir)
    check_token_ids(tokenizer, config)
    rows = config.vocab_size
    check_token_ids(tokenizer, replace(config, vocab_size=rows + 64))  # padded rows are fine
    top, index = max(tokenizer.special_tokens.items(), key=lambda item: item[1])
    assert index == rows - 1
    cases = (
        (
            {"vocab_size": rows - 1, "eos_token_id": None},
            rf"token '{re.escape(top)}' has id {index}, but the embedding has {index} rows",
        ),
        ({"pad_token_id": rows}, rf"config.json's pad_token_id has id {rows}, but the embedding has {rows} rows"),
        ({"eos_token_id": (2, -1)}, r"config.json's eos_token_id has id -1"),
        ({"bos_token_id": 10**9}, r"config.json's bos_token_id has id 1000000000"),
    )
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            check_token_ids(tokenizer, replace(config, **{"bos_token_id": None, "pad_token_id": None} | changes))
    wrong = with_config(base_dir, tmp_path / "wrong", eos_token_id=rows)
    with pytest.raises(ValueError, match=rf"wrong: config.json's eos_token_id has id {rows}"):
        run_quantize(wrong, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong"]


def test_generation_settings_survive(base_dir: Path, tmp_path: Path) -> None:
    """Law: the base's sampling defaults and stop ids are those of the 4-bit folder; new stop ids join, none is lost."""
    base = shutil.copytree(base_dir, tmp_path / "base")
    eos = load_config(base_dir).eos_token_id
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [eos, 5], "note": {"kept": 1}}
    (base / "generation_config.json").write_text(json.dumps(settings))
    (base / "LICENSE").write_text("terms")
    run_quantize(base, tmp_path / "nf4")
    written = json.loads((tmp_path / "nf4/generation_config.json").read_text())
    assert {key: written[key] for key in settings} == settings
    assert (tmp_path / "nf4/LICENSE").read_text() == "terms"
    (tmp_path / "nf4/generation_config.json").write_text(json.dumps({"eos_token_id": 7, "pad_token_id": 3}))
    carry_over(base, tmp_path / "nf4")
    written = json.loads((tmp_path / "nf4/generation_config.json").read_text())
    assert written == settings | {"eos_token_id": [eos, 5, 7], "pad_token_id": 3}


def test_a_forced_write_leaves_what_was_written(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: other readers find the new model alone; before the new files are whole, the old ones are; what isn't a model's stays."""
    out = tmp_path / "out"
    out.mkdir()
    stale = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
    ]
    stale += ["model.safetensors.index.json", "chat_template.jinja"]
    for name in [*stale, "notes.md", "model.safetensors", "config.json"]:
        (out / name).write_text("old")

    def fails(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(quantize_module, "carry_over", fails)
        with pytest.raises(OSError, match="disk full"):
            run_quantize(base_dir, out, force=True)
    assert {path.read_text() for path in out.iterdir()} == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FileExistsError, match="is not empty"):
        run_quantize(base_dir, out)
    run_quantize(base_dir, out, force=True)
    run_quantize(base_dir, tmp_path / "fresh")
    names = {path.name for path in (tmp_path / "fresh").iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"notes.md"}
    assert all((out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes() for name in names)
    assert (out / "notes.md").read_text() == "old"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.layers.0.mlp.up_proj.weight.absmax", lambda t: t.long(), r"up_proj\.weight\.absmax: expected uint8, got int64"),
        ("model.layers.0.mlp.up_proj.weight.nested_absmax", lambda t: t * float("nan"), r"nested_absmax: 1 of 1 values are not"),
        (STATE, lambda _: as_bytes("[" * 100_000), r"is not bitsandbytes' JSON: expected at most 65536 uint8, got 100000"),
        (STATE, lambda _: as_bytes("[" * 60_000), r"is not bitsandbytes' JSON \("),
        (STATE, lambda _: as_bytes("[1, 2]"), r"is not bitsandbytes' JSON: expected an object, got list"),
        (STATE, lambda _: torch.zeros(3), r"is not bitsandbytes' JSON: expected at most 65536 uint8, got 3 float32"),
    ],
)  # fmt: skip
def test_a_damaged_4_bit_file(
    key: str, value: Callable[[Tensor], Tensor], message: str, nf4_dir: Path, tmp_path: Path
) -> None:
    """One ValueError that names the folder and the key."""
    copy = shutil.copytree(nf4_dir, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors[key] = value(tensors[key])
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^\S*copy: model\.layers\.0\.mlp\.up_proj\.weight.*{message}"):
        load_model(copy)


@pytest.mark.parametrize(
    "wrong",
    [[1], "nf4", {"load_in_4bit": 1}, {"load_in_4bit": True, "bnb_4bit_compute_dtype": ["x"]},
     {"load_in_4bit": True, "bnb_4bit_quant_type": {}}, {"load_in_4bit": True, "llm_int8_skip_modules": 3}],
)  # fmt: skip
def test_a_damaged_quantization_config(wrong: object, nf4_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: quantization_config: "):
        load_model(with_config(nf4_dir, tmp_path / "copy", quantization_config=wrong))


def test_calibrated_codes(base_dir: Path, nf4_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """Law: the same keys, scales and bytes as plain NF4, other codes, and logits nearer to full precision's on the text."""
    figures = graft.quantize(base=base_dir, out=tmp_path / "ours", calibrate=text_file)
    assert figures["n_calibration_tokens"] > 1000
    ours, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", nf4_dir))
    assert ours.keys() == plain.keys()
    changed = {name for name in ours if not torch.equal(ours[name], plain[name])}
    assert changed == {name for name in ours if name.endswith("_proj.weight")}
    ids = Tokenizer.load(base_dir).encode(text_file.read_text()[-2000:])[:90]
    rows = torch.tensor(ids.tolist())[None]
    with torch.no_grad():
        full, near, far = (load_model(folder)(rows) for folder in (base_dir, tmp_path / "ours", nf4_dir))
    assert (near - full).square().mean() < 0.8 * (far - full).square().mean()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    for module in theirs.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
    theirs.train()  # in eval mode its CPU path repacks the weights and multiplies in bfloat16
    with torch.no_grad():
        torch.testing.assert_close(theirs(rows).logits, near, atol=1e-4 * near.abs().max().item(), rtol=0)


def test_texts_that_cannot_calibrate(base_dir: Path, tmp_path: Path) -> None:
    """Refused before anything is written."""
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "binary.txt").write_bytes(b"text \xff\xfe")
    for name, message in (
        ("short.txt", r"has \d+ tokens; calibration needs at least 192"),
        ("binary.txt", "not UTF-8 at byte 5"),
    ):
        with pytest.raises(ValueError, match=message):
            run_quantize(base_dir, tmp_path / "out", calibrate=tmp_path / name)
    with pytest.raises(FileNotFoundError):
        run_quantize(base_dir, tmp_path / "out", calibrate=tmp_path / "nowhere.txt")
    assert not (tmp_path / "out").exists()
