"""What fits into a budget, the picture and the commands."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import write_config
from graft.finetune.memory.commands import vram_app
from graft.finetune.memory.fit import find_fits, largest
from graft.finetune.memory.picture import memory_picture
from graft.finetune.memory.plan_command import plan
from graft.finetune.memory.predict import estimate_memory
from graft.finetune.memory.settings import MemorySettings
from graft.finetune.memory.units import parse_bytes, say_bytes

TINY = ModelConfig(100, 32, 1, 2, 1, 16, 64, 64)
app = typer.Typer(pretty_exceptions_enable=False)
app.add_typer(vram_app, name="vram")
app.command()(plan)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import torch

    (tmp_path / "base").mkdir()
    write_config(TINY, tmp_path / "base", dtype=torch.float32)
    return tmp_path / "base"


def run(*words: object) -> str:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).stdout


def test_amounts_of_memory() -> None:
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes(" 0.5 mb ") == 500_000
    assert parse_bytes("512 KiB") == 2**19
    assert say_bytes(24 * 2**30) == "24.00 GiB"
    assert say_bytes(12) == "12 B"
    for wrong in ("24", "GiB", "24 parsecs", "-1GiB"):
        with pytest.raises(ValueError, match=r"is no amount of memory; write a number and one of B, KB"):
            parse_bytes(wrong)
    with pytest.raises(ValueError, match="less than a byte"):
        parse_bytes("0GB")


@pytest.mark.parametrize("budget", [9, 10, 57, 1000, 10**6])
def test_the_search_finds_what_counting_up_finds(budget: int) -> None:
    """Law, on a cost with a step in it: the largest n within the budget, or 0."""
    tried = []

    def cost(n: int) -> int:
        tried.append(n)
        return 7 * n + 3 + (40 if n > 20 else 0)

    wanted = max([n for n in range(1, 501) if 7 * n + 3 + (40 if n > 20 else 0) <= budget], default=0)
    assert largest(cost, budget, most=500) == wanted
    assert len(tried) <= 12


def test_the_search_ends_on_a_cost_that_does_not_grow() -> None:
    assert largest(lambda n: 5, 5, most=64) == 64
    assert largest(lambda n: 5, 4, most=64) == 0


def test_what_fits_fits_and_one_more_does_not() -> None:
    settings = MemorySettings(seq_len=32)
    budget = int(1.2 * estimate_memory(TINY, method="lora", batch_size=6, seq_len=32, device="cpu").peak_bytes)
    seen = []
    found = find_fits(TINY, settings, budget, methods=["lora"], device="cpu", on_try=seen.append)
    assert [fit.checkpointing for fit in found] == [False, True]
    assert found[1].batch_size >= max(6, found[0].batch_size)
    for fit in found:
        options = {"method": "lora", "seq_len": 32, "checkpointing": fit.checkpointing, "device": "cpu"}
        peaks = [
            estimate_memory(TINY, batch_size=n, **options).peak_bytes for n in (fit.batch_size, fit.batch_size + 1)
        ]
        assert peaks[0] == fit.peak_bytes <= budget < peaks[1]
        assert fit.longest_seq_len == 64
    assert len(seen) == len(set(seen))  # no setting is predicted twice


def test_an_impossible_budget_names_the_smallest_that_works() -> None:
    least = estimate_memory(TINY, method="qlora", seq_len=64, device="cpu").peak_bytes
    with pytest.raises(
        ValueError, match=r"nothing fits into 100.00 KiB; the smallest that works is qlora with check"
    ) as e:
        find_fits(TINY, MemorySettings(seq_len=64), 100 * 1024, methods=["lora", "qlora"], device="cpu")
    assert str(e.value).endswith(f"batch 1, sequence 64: {say_bytes(least)}")


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    one = estimate_memory(TINY, method="full", seq_len=16, device="cpu")
    path = memory_picture({"full": one, "again": one}, tmp_path / "new" / "m.png", measured={"full": one.peak_bytes})
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="no estimate to draw"):
        memory_picture({}, tmp_path / "none.png")


def test_estimate_prints_json_and_a_table(folder: Path) -> None:
    found = json.loads(run("vram", "estimate", "--model", folder, "--method", "lora", "--seq", 32, "--json"))
    assert found["peak_bytes"] == sum(found["at_peak"].values())
    assert found["settings"]["seq_len"] == 32
    every = json.loads(run("vram", "estimate", "--model", folder / "config.json", "--seq", 32, "--json"))
    assert [e["method"] for e in every["estimates"]] == ["full", "lora", "qlora", "generate"]
    text = run("vram", "estimate", "--model", folder, "--seq", 32, "--device", "cuda")
    assert "qlora" in text
    assert "kernels of a GPU" in text


def test_fit_prints_json_and_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cost in place of the prediction: 50 kB and 1 kB a token, so 550 kB hold 500 tokens, 15 rows of 32."""

    def cost(config: ModelConfig, settings: MemorySettings, *, device: str, work: object = None) -> SimpleNamespace:
        return SimpleNamespace(peak_bytes=50_000 + 1000 * settings.batch_size * settings.seq_len)

    monkeypatch.setattr("graft.finetune.memory.fit.estimate", cost)
    words = ("vram", "estimate", "--model", folder, "--seq", 32)
    found = json.loads(run(*words, "--fit", "550kB", "--json"))
    assert found["budget_bytes"] == 550_000
    assert [(fit["method"], fit["checkpointing"]) for fit in found["fits"]] == [
        (method, checkpointing) for method in ("full", "lora", "qlora") for checkpointing in (False, True)
    ]
    assert {fit["batch_size"] for fit in found["fits"]} == {15}
    assert {fit["longest_seq_len"] for fit in found["fits"]} == {64}
    assert "the most thorough that fits: full without checkpointing, batch 15" in run(*words, "--fit", "550kB")
    with pytest.raises(ValueError, match="smallest that works is full"):
        run(*words, "--fit", "1KiB")


def test_measure_writes_its_picture(folder: Path, tmp_path: Path) -> None:
    words = ("vram", "measure", "--model", folder, "--seq", 64, "--batch", 8, "--device", "cpu")
    picture = tmp_path / "a.png"
    found = json.loads(run(*words, "--method", "qlora", "--out", picture, "--json"))
    assert abs(found["error"]) < 0.05
    assert found["measured_bytes"] > 0
    assert picture.exists()
    assert "qlora, no DQ" in run(*words, "--out", picture)


def test_a_step_that_does_not_fit_is_not_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.finetune.memory.predict.free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"lora: predicted peak .* GiB free on cpu"):
        run("vram", "measure", "--model", folder, "--method", "lora", "--seq", 16, "--out", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_plan_says_143_days() -> None:
    words = ("plan", "--model", "llama-2-70b", "--tokens", "15e12", "--devices", 1024, "--mfu", 0.5)
    found = json.loads(run(*words, "--json"))
    # 69e9 parameters instead of 70e9, and 3.8% more for attention, which 6 N leaves out: 143.9 * 68.7 / 70 / 0.962 days
    assert found["days"] == pytest.approx(143.9 * (68.98 - 0.26) / 70 / 0.962, rel=1e-3)
    assert "a parameter" in run(*words)
    with pytest.raises(ValueError, match="--tokens 'many' is no number"):
        run("plan", "--model", "nano", "--tokens", "many")
