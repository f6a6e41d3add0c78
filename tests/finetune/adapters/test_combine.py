"""Several adapters into one beside PEFT's, what it does to predictions, an adapter out of two bases, adapters on demand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import graft
from graft.base.model.huggingface import fingerprint, save_model
from graft.base.model.transformer import Transformer, initialize_
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.adapters import combine
from graft.finetune.adapters.bank import AdapterBank
from graft.finetune.adapters.combine import parse_stack
from graft.finetune.adapters.extract import low_rank, run_extract
from graft.finetune.adapters.files import Adapter, read_adapter, save_adapter
from graft.finetune.adapters.lora import LoraConfig, attach_lora, linears, lora_layers
from graft.finetune.adapters.merge import run_merge
from graft.finetune.adapters.shelf import AdapterShelf, resident_bytes
from graft.finetune.loading import load_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(40).reshape(2, 20)


def make_adapter(base: Path, folder: Path, seed: int, size: float = 0.05, **config: Any) -> Path:
    """An adapter with random A and B."""
    model = load_model(base)
    lora = LoraConfig(**{"rank": 4, "alpha": 8.0, **config})
    attach_lora(model, lora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.updates["default"].lora_b.normal_(0, size, generator=generator)
    about = {"base_fingerprint": fingerprint(model), "prompt_format": "text"}
    save_adapter(model, folder, lora, base=str(base), graft=about)
    return folder


@pytest.fixture(scope="module")
def folders(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(base_dir, folder / name, seed) for seed, name in enumerate(("spam", "style"), 1)]


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model = load_model(base)
    bank = AdapterBank(model)
    bank.load("one", adapter)
    bank.use("one")
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize(
    ("method", "weights"), [("linear", [0.7, 0.3]), ("cat", [0.7, 0.3]), ("ties", [0.7, 0.3]), ("linear", [1.5, -0.5])]
)
def test_merging_gives_what_peft_gives(
    method: str, weights: list[float], base_dir: Path, folders: list[Path], tmp_path: Path
) -> None:
    """Parity: add_weighted_adapter on the same adapters, every update, and logits through the folder that is written."""
    report = graft.merge(
        base=base_dir, adapters=folders, weights=weights, method=method, out=tmp_path / "out", allow_drift=True
    )
    hf = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(hf, folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], weights, "mix", combination_type=method, density=0.5)
    model.set_adapter("mix")
    ours = read_adapter(tmp_path / "out")
    inner = model.base_model.model
    for path, (a, b, scale) in ours.layers.items():
        theirs = inner.get_submodule(path).get_delta_weight("mix")
        torch.testing.assert_close(scale * (b @ a), theirs, atol=1e-6, rtol=1e-4)  # float32 products in another order
    with torch.no_grad():
        torch.testing.assert_close(logits(base_dir, tmp_path / "out"), model(IDS).logits, atol=1e-4, rtol=1e-4)
    assert report["rank"] == (8 if method == "cat" else 4)
    assert json.loads((tmp_path / "out/merge.json").read_text()) == report
    if method == "cat":
        assert report["kl"] == pytest.approx(0, abs=1e-6)
        assert report["equal_tokens"] == 1
    else:
        assert report["kl"] > 1e-6


def test_the_figures_are_those_of_the_weighted_sum(base_dir: Path, folders: list[Path], tmp_path: Path) -> None:
    """Worked out apart: KL and equal tokens between the written folder and the two updates merged into the base by hand."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat and looked at the bird while the tree stood")
    report = graft.merge(
        base=base_dir,
        adapters=folders,
        method="linear",
        out=tmp_path / "out",
        text=tmp_path / "text.txt",
        allow_drift=True,
    )
    model = load_model(base_dir)
    with torch.no_grad():
        for folder in folders:
            for path, (a, b, scale) in read_adapter(folder).layers.items():
                model.get_submodule(path).weight += 0.5 * scale * (b @ a)
        ids = torch.tensor(Tokenizer.load(base_dir).encode((tmp_path / "text.txt").read_text()).tolist())[None]
        q = model(ids)[0].double().log_softmax(-1)
        merged = load_model(base_dir)
        bank = AdapterBank(merged)
        bank.load("out", tmp_path / "out")
        bank.use("out")
        p = merged(ids)[0].double().log_softmax(-1)
    assert report["n_tokens"] == ids.shape[1]
    assert report["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert report["equal_tokens"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_dare_keeps_the_mean(base_dir: Path, folders: list[Path], tmp_path: Path) -> None:
    """Law: numbers are dropped at random by the seed, the rest is scaled up by 1 / density; density 1 is linear."""

    def merged(name: str, method: str, **options: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
        graft.merge(base=base_dir, adapters=folders, method=method, out=tmp_path / name, allow_drift=True, **options)
        return read_adapter(tmp_path / name).layers

    linear, whole = merged("linear", "linear"), merged("whole", "dare", density=1.0)
    one, same, other = (merged(name, "dare", seed=seed) for name, seed in (("one", 1), ("same", 1), ("other", 2)))
    for path, (a, *_) in linear.items():
        assert torch.equal(whole[path][0], a)
        assert torch.equal(one[path][0], same[path][0])
        assert not torch.equal(one[path][0], other[path][0])
    zeros = torch.cat([(a == 0).flatten() for a, _, _ in one.values()]).double().mean()
    assert zeros == pytest.approx(0.25, abs=0.03)  # both adapters' numbers dropped: a half of a half


def test_bad_merges(base_dir: Path, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    narrow = make_adapter(base_dir, tmp_path / "narrow", 3, targets=("q_proj",))
    wide = make_adapter(base_dir, tmp_path / "wide", 4, rank=8)
    foreign = make_adapter(base_dir, tmp_path / "foreign", 6)
    about = json.loads((foreign / "graft.json").read_text())
    (foreign / "graft.json").write_text(json.dumps(about | {"base_fingerprint": "0" * 16}))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"adapters": []}, "no adapter to merge"),
        ({"weights": [0.7]}, "1 weights for 2 adapters"),
        ({"weights": [0.7, 0.7]}, r"weights \[0\.7, 0\.7\] add up to 1\.4; give weights that add up to 1"),
        ({"weights": [float("nan"), 1.0]}, "weight nan is not finite"),
        ({"method": "svd"}, "unknown method 'svd'; choose linear, cat, ties, dare"),
        ({"density": 0.0, "method": "ties"}, r"density=0\.0 must lie in"),
        ({"adapters": [folders[0], narrow]}, r"have different targets: only one of them has model\.layers\.0\.mlp"),
        ({"adapters": [folders[0], wide]}, r"has ranks \[4, 8\]; linear needs equal ranks, use method cat"),
        ({"adapters": [folders[0], foreign]}, "was trained on another base"),
        ({"out": folders[0], "force": True}, "is the base or one of the adapters"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            graft.merge(**({"base": base_dir, "adapters": folders, "out": out} | options))
        assert not out.exists()
    monkeypatch.setattr(combine, "LARGEST_KL", 1e-9)
    with pytest.raises(
        ValueError,
        match=r"differ from the weighted sum of the updates by .*: use method cat, which is exact, or",
    ):
        graft.merge(base=base_dir, adapters=folders, out=out)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        graft.merge(base=base_dir, adapters=folders, out=out)


# --- extract -------------------------------------------------------------------------------------------------------


def test_extract_finds_a_merged_adapter_again(base_dir: Path, folders: list[Path], tmp_path: Path) -> None:
    """Law: what an adapter of rank 4 added to a base is found again at rank 4, whole; at rank 2 the best part of it."""
    run_merge(base_dir, folders[0], tmp_path / "tuned")
    report = run_extract(base=base_dir, tuned=tmp_path / "tuned", out=tmp_path / "found", rank=4)
    assert report["kept"] == pytest.approx(1, abs=1e-4)
    assert report["kl"] == pytest.approx(0, abs=1e-5)
    assert report["equal_tokens"] == 1
    assert report["left_out"] == []
    found = read_adapter(tmp_path / "found").layers
    for path, (a, b, scale) in read_adapter(folders[0]).layers.items():
        torch.testing.assert_close(found[path][1] @ found[path][0], scale * (b @ a), atol=1e-5, rtol=1e-3)
    half = run_extract(base=base_dir, tuned=tmp_path / "tuned", out=tmp_path / "half", rank=2, allow_drift=True)
    assert 0.3 < half["kept"] < 0.99
    assert half["kl"] > report["kl"]


def test_low_rank_by_hand() -> None:
    """Worked by hand: diag(3, 4) at rank 1 is diag(0, 4) and keeps 16 / 25 of the squared norm."""
    a, b, share = low_rank(torch.diag(torch.tensor([3.0, 4.0])), 1)
    torch.testing.assert_close(b @ a, torch.diag(torch.tensor([0.0, 4.0])))
    assert share == pytest.approx(16 / 25)


def test_bad_extracts(base_dir: Path, tmp_path: Path) -> None:
    model = load_model(base_dir)
    with torch.no_grad():
        model.model.norm.weight += 1
    save_model(model, tmp_path / "normed")
    report = run_extract(base=base_dir, tuned=tmp_path / "normed", out=tmp_path / "a", rank=1, allow_drift=True)
    assert report["left_out"] == ["model.norm.weight"]
    for options, message in (
        ({"rank": 0}, "rank=0 must be >= 1"),
        ({"rank": 999}, "rank=999 is more than the smaller side"),
    ):
        with pytest.raises(ValueError, match=message):
            run_extract(base=base_dir, tuned=base_dir, out=tmp_path / "b", **options)
    other = Transformer(replace(model.config, d_ff=model.config.d_ff * 2))
    initialize_(other, seed=0)
    save_model(other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"is no fine-tuned .*mlp\.\w+\.weight is .* in the base and .* there"):
        run_extract(base=base_dir, tuned=tmp_path / "other", out=tmp_path / "b")


# --- on demand -----------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf_of(base_dir: Path, tmp_path: Path) -> Callable[..., AdapterShelf]:
    """A shelf over four adapters a, b, c, d with room for so many."""
    for i, name in enumerate("abcd"):
        make_adapter(base_dir, tmp_path / "all" / name, i)

    def make(n: float) -> AdapterShelf:
        bank = AdapterBank(load_model(base_dir))
        size = resident_bytes(read_adapter(tmp_path / "all/a"), bank.model)
        return AdapterShelf(bank, tmp_path / "all", budget_bytes=int(n * size))

    return make


def test_the_least_recent_adapter_leaves(shelf_of: Callable[..., AdapterShelf]) -> None:
    """Worked by hand, with room for two: a, b, a again, then c sends b away; a pinned one and one in use stay."""
    shelf = shelf_of(2)
    bank = shelf.bank
    assert shelf.names == ["a", "b", "c", "d"]
    for name in "abac":
        shelf.take(name)
    assert bank.names == ["a", "c"]
    shelf.pin("a")
    shelf.take("d")
    assert bank.names == ["a", "d"]
    with bank.rows(["d"]), pytest.raises(ValueError, match=r"adapter 'b' takes .*pinned or in use; raise budget_bytes"):
        shelf.take("b")
    assert bank.names == ["a", "d"]  # a refused one sends nobody away
    shelf.unpin("a")
    shelf.take("b")
    assert bank.names == ["d", "b"]
    assert shelf.n_bytes <= shelf.budget_bytes
    with pytest.raises(ValueError, match=r"no adapter 'x' below .*; there are: a, b, c, d"):
        shelf.take("x")
    with pytest.raises(ValueError, match=r"no adapter '\.\./all/a'"):
        shelf.take("../all/a")
    with pytest.raises(ValueError, match="more than the whole budget of"):
        shelf_of(0.5).take("a")


def test_every_part_of_an_adapter_counts_in_the_budget(base_dir: Path) -> None:
    """Worked by hand: as read in float32, and once more in the base's float32, whatever the kind."""
    layers = {"q": (torch.ones(2, 8), torch.ones(4, 2), 1.0)}
    rows = {"model.embed_tokens": ([1, 2], torch.ones(2, 8))}
    adapter = Adapter(layers, {}, modules={"model.norm": {"weight": torch.ones(8)}}, token_rows=rows)
    assert resident_bytes(adapter, load_model(base_dir)) == 2 * 4 * (16 + 8 + 8 + 16)


def test_a_stack_is_the_weighted_sum(shelf_of: Callable[..., AdapterShelf], base_dir: Path, tmp_path: Path) -> None:
    """Law: a:0.7,b:-0.2 adds both updates with their weights, as merged into the base by hand."""
    shelf = shelf_of(8)
    shelf.bank.use(shelf.take("a:0.7,b:-0.2"))
    expected = load_model(base_dir)
    with torch.no_grad():
        for name, weight in (("a", 0.7), ("b", -0.2)):
            for path, (a, b, scale) in read_adapter(tmp_path / "all" / name).layers.items():
                dict(linears(expected))[path].weight += weight * scale * (b @ a)
        torch.testing.assert_close(shelf.bank.model(IDS), expected(IDS), atol=1e-4, rtol=1e-4)
    assert parse_stack("a:0.7, b:0.3") == {"a": 0.7, "b": 0.3}
    for spec, message in (
        ("a:x", "'a:x' is not NAME:WEIGHT"),
        ("a:1,a:2", "names a twice"),
        (":1", "is not NAME:WEIGHT"),
    ):
        with pytest.raises(ValueError, match=message):
            shelf.take(spec)
