"""Law: what a forced write leaves is what a write into a new folder leaves, and nothing that some reader would load besides."""

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest

import graft
from graft.base.runlog import LOADED
from graft.finetune.adapters.extract import run_extract
from graft.finetune.adapters.merge import run_merge
from graft.finetune.many.sweep import run_sweep

OLDER = ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
         "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "config.json", "graft.json",
         "chat_template.jinja", "vocab.json")  # fmt: skip
STEPS = {"steps": 1, "batch_size": 1, "device": "cpu"}
Write = Callable[[Path, Path, Path, Path, bool], object]  # base, adapter, rows, out, force
WRITERS: dict[str, Write] = {
    "quantize": lambda base, adapter, rows, out, force: graft.quantize(base=base, out=out, force=force),
    "merge": lambda base, adapter, rows, out, force: run_merge(base, adapter, out, force=force),
    "combine": lambda base, adapter, rows, out, force: graft.merge(
        base=base, adapters=[adapter, adapter], out=out, force=force
    ),
    "combine into the base": lambda base, adapter, rows, out, force: graft.merge(
        base=base, adapters=[adapter, adapter], out=out, into="base", force=force
    ),
    "extract": lambda base, adapter, rows, out, force: run_extract(base=base, tuned=base, out=out, rank=1, force=force),
    "sft": lambda base, adapter, rows, out, force: graft.sft(base=base, data=rows, out=out, force=force, **STEPS),
    "sft --lora": lambda base, adapter, rows, out, force: graft.sft(
        base=base, data=rows, out=out, method="lora", rank=1, force=force, **STEPS
    ),
    "sft --jobs": lambda base, adapter, rows, out, force: graft.sft_many(
        base=base, jobs=[{"data": rows, "out": out, "rank": 1, "steps": 1}], force=force, device="cpu"
    ),
    "sft --sweep": lambda base, adapter, rows, out, force: run_sweep(
        base=base, data=rows, eval_data=rows, out=out, grid={"rank": [1]}, settings={"steps": 1}, force=force, device="cpu",
        progress=False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "the cat", "completion": " sat"}))
    return path


@pytest.fixture(scope="module")
def adapter(base_dir: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "one"
    graft.sft(base=base_dir, data=rows, out=out, method="lora", rank=2, **STEPS)
    return out


def loaded_by_name(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in LOADED)}


@pytest.mark.parametrize("name", WRITERS)
def test_a_forced_write_is_a_new_one(name: str, base_dir: Path, adapter: Path, rows: Path, tmp_path: Path) -> None:
    WRITERS[name](base_dir, adapter, rows, tmp_path / "new", False)
    (tmp_path / "old").mkdir()
    for file in (*OLDER, "notes.txt"):
        (tmp_path / "old" / file).write_text("{}")
    WRITERS[name](base_dir, adapter, rows, tmp_path / "old", True)
    assert loaded_by_name(tmp_path / "old") == loaded_by_name(tmp_path / "new") != set()
    assert (tmp_path / "old/notes.txt").exists()
