"""`graft sft --qlora --calibrate`: the base that an adapter trains on is the one that `graft quantize --calibrate` writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.base.runlog import read_metrics


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"the {w}", "completion": " cat"}) for w in "abcdef"))
    return path


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def test_it_trains_on_the_calibrated_base(base_dir: Path, rows: Path, text_file: Path, tmp_path: Path) -> None:
    """Law: --qlora --calibrate on the full base is training on that base quantized by the same text, alone and among jobs."""
    settings: dict[str, Any] = {"steps": 3, "batch_size": 2, "rank": 2, "device": "cpu"}
    graft.quantize(base=base_dir, out=tmp_path / "calibrated", calibrate=text_file)
    graft.sft(base=tmp_path / "calibrated", data=rows, out=tmp_path / "stored", method="lora", **settings)
    calibrate = {"calibrate": str(text_file)}
    graft.sft(base=base_dir, data=rows, out=tmp_path / "ours", method="qlora", **settings, **calibrate)
    graft.sft(base=base_dir, data=rows, out=tmp_path / "plain", method="qlora", **settings)
    ours, stored = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stored"))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in ours.items())
    assert losses(tmp_path / "ours") == losses(tmp_path / "stored") != losses(tmp_path / "plain")
    del settings["device"]
    jobs = [{"data": rows, "out": tmp_path / f"job{i}", "seed": i, **settings, **calibrate} for i in range(2)]
    graft.sft_many(base=base_dir, jobs=jobs, method="qlora", device="cpu")
    assert losses(tmp_path / "job0") == pytest.approx(losses(tmp_path / "ours"), abs=1e-5)
    with pytest.raises(ValueError, match=r"calibrate differs between jobs .*job0 \(.*\) and .*job1 \(None\)"):
        graft.sft_many(base=base_dir, jobs=[jobs[0], {**jobs[1], "calibrate": None}], method="qlora")


def test_where_it_means_nothing(base_dir: Path, rows: Path, text_file: Path, tmp_path: Path) -> None:
    for method, base, message in (
        ("lora", base_dir, "it chooses the codes of QLoRA's base; give a full-precision base with --qlora"),
        ("full", base_dir, "it chooses the codes of QLoRA's base"),
    ):
        with pytest.raises(ValueError, match=message):
            graft.sft(base=base, data=rows, out=tmp_path / "out", method=method, calibrate=str(text_file), steps=1)
    with pytest.raises(FileNotFoundError):
        graft.sft(base=base_dir, data=rows, out=tmp_path / "out", method="qlora", calibrate="nowhere.txt", steps=1)
    assert not (tmp_path / "out").exists()
