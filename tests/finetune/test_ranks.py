"""graft sft and dpo on two ranks: the run of one process, one folder, whole adapters, dropout by position."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from graft.base.parallel.mesh import MeshShape
from graft.base.parallel.ranks import Ranks
from graft.base.run import TrainConfig
from graft.base.runlog import read_metrics
from graft.finetune.adapters.config import LoraConfig
from graft.finetune.align.run_dpo import dpo
from graft.finetune.optimizers import check_finetuning_mesh, finetuning_mesh
from graft.finetune.sft import run_sft

from ..base.parallel.processes import on_ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
ANSWERS = {
    "the cat": "sleeps",
    "a bird": "sings loudly",
    "the tree": "stands",
    "rivers": "run",
    "he": "is",
    "it": "was",
}
LOOP = {"steps": 4, "batch_size": 5, "micro_batch": 1, "learning_rate": 1e-2, "checkpoint_every": 2, "warmup_steps": 0}
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4, "dropout": 0.3, "optimizer": "adamw"},
    "qlora": {"method": "qlora", "rank": 4, "dropout": 0.3, "optimizer": "adamw", "zero": 1, "eval_every": 2},
    "full": {"method": "full", "optimizer": "adamw", "zero": 1},
}


def train_all(base: Path, folder: Path, out: Path) -> None:
    for name, settings in RUNS.items():
        method = settings["method"]
        more = {key: value for key, value in settings.items() if key != "method"}
        held_out = folder / "rows.jsonl" if "eval_every" in settings else None
        run_sft(
            base=base, data=folder / "rows.jsonl", out=out / name, method=method, settings=LOOP | more, device="cpu",
            eval_data=held_out, progress=False,
        )  # fmt: skip
    loop = {**LOOP, "batch_size": 3, "dropout": 0.2, "rank": 2}
    dpo(base=base, data=folder / "pairs.jsonl", out=out / "dpo", method="lora", device="cpu", **loop)


def one_rank(rank: int, base: str, folder: str) -> dict[str, Any]:
    train_all(Path(base), Path(folder), Path(folder) / "two")
    try:
        run_sft(
            base=Path(base), data=Path(folder) / "rows.jsonl", out=Path(folder) / "streamed", device="cpu", progress=False,
            settings=LOOP | {"streaming": True},
        )  # fmt: skip
    except ValueError as error:
        return {"refused": str(error)}
    return {"refused": ""}


def test_two_ranks_fine_tune_as_one(base_dir: Path, tmp_path: Path) -> None:
    """Law: losses, norms and figures of every step and the results are one process's (float32, 1e-5), with dropout too."""
    rows = [{"prompt": f"{who}:", "completion": f" {does}"} for who, does in ANSWERS.items()]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [{"prompt": f"{who}:", "chosen": f" {does}", "rejected": " flies"} for who, does in ANSWERS.items()]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    train_all(base_dir, tmp_path, tmp_path / "one")
    found = on_ranks(2, one_rank, tmp_path / "ranks", str(base_dir), str(tmp_path), joined=False)
    assert "streaming=true keeps rows in --out, which 2 ranks can't share" in found[0]["refused"]
    for name in (*RUNS, "dpo"):
        one, two = (read_metrics(tmp_path / folder / name / "metrics.jsonl") for folder in ("one", "two"))
        for alone, together in zip(one, two, strict=True):
            assert alone.keys() == together.keys()
            for key in alone.keys() - {"step_s", "tokens_per_s"}:
                assert together[key] == pytest.approx(alone[key], abs=2e-5, rel=1e-5), (name, key, alone["step"])
        file = "model.safetensors" if name == "full" else "adapter_model.safetensors"
        weights = [load_file(tmp_path / folder / name / file) for folder in ("one", "two")]
        for key, tensor in weights[0].items():
            torch.testing.assert_close(weights[1][key], tensor, atol=2e-5, rtol=0)
        assert json.loads((tmp_path / "two" / name / "summary.json").read_text())["n_ranks"] == 2
    assert (tmp_path / "two/lora/checkpoints/step-00000004/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("shape", "settings", "lora", "message"),
    [
        (
            MeshShape(tp=2),
            {},
            None,
            r"mesh=tp:2, zero=0: fine-tuning keeps the whole model .* set mesh=dp with zero 0 or 1",
        ),
        (MeshShape(fsdp=2), {}, None, "mesh=fsdp:2, zero=0: fine-tuning keeps the whole model"),
        (MeshShape(dp=2), {"zero": 2}, None, "mesh=dp:2, zero=2: fine-tuning keeps the whole model"),
        (MeshShape(dp=2), {"zero": 1, "optimizer": "adamw8bit"}, None, "zero=1 divides plain AdamW's state alone"),
        (MeshShape(dp=2), {"zero": 1, "ema_decay": 0.9}, None, "zero=1 divides plain AdamW's state alone"),
        (
            MeshShape(dp=2),
            {"zero": 1},
            LoraConfig(rank=2, lora_plus_ratio=4.0),
            "zero=1 divides plain AdamW's state alone",
        ),
    ],
)
def test_what_fine_tuning_does_not_divide(
    shape: MeshShape, settings: dict[str, Any], lora: LoraConfig | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_finetuning_mesh(shape, TrainConfig(**settings), lora)


def test_one_process_has_nothing_to_divide() -> None:
    assert finetuning_mesh(TrainConfig(zero=3), Ranks(), "cpu", lora=None).axes == ()
    with pytest.raises(ValueError, match=r"mesh='tp:2' needs 2 processes"):
        finetuning_mesh(TrainConfig(mesh="tp:2"), Ranks(), "cpu", lora=None)
