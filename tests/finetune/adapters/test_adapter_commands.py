"""`graft adapter` from the command line, and stacks of adapters wherever one is named."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graft import cli
from graft.base.generate.sampling import Sampling
from graft.base.model.huggingface import fingerprint, save_model
from graft.finetune.adapters.attach import attach_adapter
from graft.finetune.adapters.files import read_adapter, save_adapter
from graft.finetune.adapters.lora import LoraConfig, attach_lora, lora_layers
from graft.finetune.adapters.norms import norms_by_layer, update_norm
from graft.finetune.loading import load_model
from graft.finetune.session import Session

Run = Callable[..., tuple[int, str, str]]
NAMES = ("spam", "style")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, standard output, standard error) of `graft ARGUMENTS`."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def folders(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two adapters, with random A and B."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        model, config = load_model(base_dir), LoraConfig(rank=4, alpha=8.0)
        attach_lora(model, config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, layer in lora_layers(model):
                layer.updates["default"].lora_b.normal_(0, 0.05, generator=generator)
        about = {"base_fingerprint": fingerprint(model), "prompt_format": "text"}
        save_adapter(model, root / name, config, base=str(base_dir), graft=about)
    return root


def summed_by_hand(base: Path, folders: Path, weights: dict[str, float]) -> torch.nn.Module:
    """The base with the weighted updates added to its weights."""
    model = load_model(base)
    with torch.no_grad():
        for name, weight in weights.items():
            for path, (a, b, scale) in read_adapter(folders / name).layers.items():
                model.get_submodule(path).weight += weight * scale * (b @ a)
    return model


def test_several_into_one_and_into_the_base(run: Run, base_dir: Path, folders: Path, tmp_path: Path) -> None:
    """Law: two adapters merged into the base are the base with both updates added by hand; as one adapter they are a rank 8."""
    words = ["adapter", "merge", "--base", base_dir, *(f"--adapter={folders / name}" for name in NAMES)]
    (tmp_path / "text.txt").write_text("the cat sat on the mat and looked at the bird")
    code, out, err = run(*words, "--weights", "0.7,0.3", "--out", tmp_path / "one", "--text", tmp_path / "text.txt")
    assert code == 0, err
    assert "cat, rank 8: 0.7 x" in out
    assert "100.0% of greedy tokens equal" in out
    report = json.loads((tmp_path / "one/merge.json").read_text())
    assert report["measured_on"] == str(tmp_path / "text.txt")
    assert report["kl"] < 1e-6
    code, _, err = run(*words, "--weights", "0.7,0.3", "--out", tmp_path / "model", "--into", "base")
    assert code == 0, err
    expected, ids = summed_by_hand(base_dir, folders, {"spam": 0.7, "style": 0.3}), torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "model")(ids), expected(ids), atol=1e-4, rtol=1e-4)
    report = json.loads((tmp_path / "model/merge.json").read_text())
    assert (report["rank"], report["n_layers"]) == (8, len(read_adapter(folders / "spam").layers))
    for wrong, message in (
        (["--weights", "0.7,0.7"], "add up to 1.4; give weights that add up to 1"),
        (["--weights", "a"], "--weights 'a' are no numbers; write for example 0.7,0.3"),
        (["--method", "svd"], "unknown method 'svd'; choose linear, cat, ties, dare"),
        (["--into", "disk"], "unknown into 'disk'; choose adapter, base"),
        (["--density", 0.2], "--density 0.2 is about ties and dare"),
        (["--method", "ties", "--seed", 3], "--seed 3 is about dare"),
        (["--text", tmp_path / "one"], "one"),
    ):
        code, _, err = run(*words, "--out", tmp_path / "bad", *wrong)
        assert (code, message in err) == (1, True), err
        assert not (tmp_path / "bad").exists()


def test_a_method_holds_for_one_adapter_too(run: Run, base_dir: Path, folders: Path, tmp_path: Path) -> None:
    """Law: of one adapter `ties` keeps that share of each matrix's numbers, and an unknown method is refused."""
    words = ["adapter", "merge", "--base", base_dir, "--adapter", folders / "spam", "--out", tmp_path / "out"]
    code, _, err = run(*words, "--method", "svd")
    assert (code, "unknown method 'svd'" in err) == (1, True), err
    code, _, err = run(*words, "--method", "ties", "--density", 0.25, "--into", "adapter", "--allow-drift")
    assert code == 0, err
    for a, b, _ in read_adapter(tmp_path / "out").layers.values():
        assert [int((x != 0).sum()) for x in (a, b)] == [a.numel() // 4, b.numel() // 4]
    code, out, err = run(*words, "--method", "ties", "--density", 0.25, "--force", "--allow-drift")
    assert code == 0, err
    assert "ties, rank 4: 1 x" in out


@pytest.fixture(scope="module")
def kinds(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one adapter of each kind that is more than pairs of A and B."""
    root = tmp_path_factory.mktemp("kinds")
    for name, config in (
        ("both", LoraConfig(rank=4, use_dora=True, modules_to_save=("model.norm",))),
        ("bottleneck", LoraConfig(adapter_kind="bottleneck", bottleneck_size=6)),
        ("prefix", LoraConfig(adapter_kind="prefix", prefix_tokens=5)),
        ("tokens", LoraConfig(rank=4, targets=("q_proj",), trainable_token_indices=(3, 7))),
    ):
        model = load_model(base_dir)
        attach_adapter(model, config)
        save_adapter(model, root / name, config, base="some/base")
    return root


def test_every_kind_is_listed_and_shown_as_what_it_is(run: Run, kinds: Path, tmp_path: Path) -> None:
    """Law: no kind passes for LoRA: what it has beside A and B is said, and what it hasn't, isn't."""
    code, out, err = run("adapter", "list", kinds)
    assert code == 0, err
    rows = {Path(cells[1]).name: cells[2:7] for line in out.splitlines() if len(cells := _cells(line)) == 9}
    sizes = {name: f"{read_adapter(kinds / name).n_bytes:,}" for name in rows}
    assert rows == {
        "both": ["4", "32", "14", "use_dora=true, modules_to_save", sizes["both"]],
        "bottleneck": ["", "", "", "peft_type=BOTTLENECK", sizes["bottleneck"]],
        "prefix": ["", "", "", "peft_type=PREFIX_TUNING", sizes["prefix"]],
        "tokens": ["4", "32", "2", "trainable_token_indices", sizes["tokens"]],
    }
    for name, expected in (
        ("both", ["norm of scale * B A, before DoRA's magnitudes", "magnitudes (DoRA) of 14 linears",
                  "model.norm in its own copy: 64 numbers"]),
        ("bottleneck", ["peft_type: BOTTLENECK", "bottleneck of 6 after model.layers.1.mlp.down_proj"]),
        ("prefix", ["peft_type: PREFIX_TUNING", "prefix of 5 positions, 640 numbers"]),
        ("tokens", ["model.embed_tokens: own rows for 2 tokens"]),
    ):  # fmt: skip
        code, out, err = run("adapter", "show", kinds / name)
        assert code == 0, err
        assert [line for line in expected if line not in out] == []
        assert ("B A" in out) == (name in ("both", "tokens"))
        assert "None" not in out


def test_one_broken_adapter_hides_no_other(run: Run, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders, tmp_path / "all")
    (tmp_path / "all/spam/adapter_config.json").write_text('{"peft_type": "IA3"}')
    code, out, err = run("adapter", "list", tmp_path / "all")
    assert (code, "style" in out, "spam" in out) == (1, True, False)
    assert "1 of 2 adapters can't be read: " in err
    assert "IA3" in err


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")]


def test_extract_from_the_command_line(
    run: Run, base_dir: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: what was merged is found again; a rank too small is refused with the figure unless allowed, and writes nothing."""
    save_model(summed_by_hand(base_dir, folders, {"spam": 8.0}), tmp_path / "tuned")
    words = ["adapter", "extract", "--base", base_dir, "--tuned", tmp_path / "tuned", "--out", tmp_path / "found"]
    code, out, err = run(*words, "--rank", 4)
    assert code == 0, err
    assert "rank 4 keeps 100.0% of the squared difference" in out
    monkeypatch.setattr("graft.finetune.adapters.extract.LARGEST_KL", 1e-5)  # a random base's predictions hardly move
    code, _, err = run(*words, "--rank", 1, "--force")
    assert code == 1
    assert "base + adapter predict otherwise than" in err
    assert "raise the rank, or pass --allow-drift" in err
    assert read_adapter(tmp_path / "found").ranks == [4]
    code, out, err = run(*words, "--rank", 1, "--force", "--allow-drift")
    assert code == 0, err
    assert read_adapter(tmp_path / "found").ranks == [1]


def test_show_is_a_line_for_each_layer(run: Run, folders: Path) -> None:
    code, out, err = run("adapter", "show", folders / "spam")
    assert code == 0, err
    adapter = read_adapter(folders / "spam")
    layers = norms_by_layer(adapter)
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")] == [*layers, "all"]
    for a, b, scale in adapter.layers.values():
        assert update_norm(a, b, scale) == pytest.approx(scale * float((b @ a).norm()), rel=1e-5)
    whole = math.sqrt(sum(norm**2 for one in layers.values() for norm in one.values()))
    assert f"{whole:.3g}" in out
    assert f"{len(adapter.layers)} linears" in out
    code, out, _ = run("adapter", "show", folders / "spam", "--all")
    assert sum(line.startswith("│ model.layers.") for line in out.splitlines()) == len(adapter.layers)


def test_a_stack_where_an_adapter_is_named(run: Run, base_dir: Path, folders: Path, tmp_path: Path) -> None:
    """Law: generate, eval and chat take A:0.7,B:0.3 and answer as the base with both updates added by hand."""
    save_model(summed_by_hand(base_dir, folders, {"spam": 0.7, "style": 0.3}), tmp_path / "summed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (base_dir / name).exists():
            (tmp_path / "summed" / name).write_bytes((base_dir / name).read_bytes())
    stack = f"{folders / 'spam'}:0.7,{folders / 'style'}:0.3"
    words = ["generate", "--prompt", "the cat", "--max-new-tokens", 12, "--device", "cpu"]
    code, expected, err = run(*words, "--base", tmp_path / "summed")
    assert code == 0, err
    code, found, err = run(*words, "--base", base_dir, "--adapter", stack)
    assert code == 0, err
    assert found == expected
    session = Session(base_dir, dtype="float32", device="cpu", chat=False)
    for name in NAMES:
        session.load(name, folders / name)
    session.use("spam:0.7,style:0.3")
    talk = [{"role": "user", "content": "the cat"}]
    assert session.answer(talk, sampling=Sampling(0.0, max_new_tokens=12)) + "\n" == expected
    with pytest.raises(ValueError, match="no adapter 'x' is loaded; loaded are: spam, style"):
        session.use("x:1,spam:1")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "the cat", "completion": " sat"}))
    words = ["eval", "--data", rows, "--json", "--device", "cpu"]
    figures = [
        json.loads(run(*words, *more)[1])
        for more in (["--base", tmp_path / "summed"], ["--base", base_dir, "--adapter", stack])
    ]
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], abs=1e-5)
    code, _, err = run(*words, "--base", base_dir, "--adapter", f"{folders / 'spam'}:x,{folders / 'style'}:1")
    assert (code, "is not NAME:WEIGHT" in err) == (1, True)
