"""What reaches fine-tuning: data streamed from disk, Hugging Face ids, checkpoints that open in PEFT, callbacks, scores."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import graft
from graft.base.runlog import read_metrics
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.data.chat import ChatTemplate, Encoded
from graft.finetune.data.dataset import DatasetOptions, encode_dataset, encode_to_disk
from graft.finetune.data.packing import SFTBatches
from graft.finetune.data.records import iterate_all, read_all
from graft.finetune.data.row_store import RowStore, row_lengths
from graft.finetune.session import Session
from graft.finetune.sft_config import resolve
from graft.finetune.sft_data import _check_streams

# PEFT 0.21 reads a name that transformers 5.23 calls deprecated: theirs to settle between them.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Eleven records, one of which is longer than the base, so that an epoch's last batch is smaller than the others."""
    lines = [{"prompt": f"the cat {i}:", "completion": " sat" * (1 + i % 3)} for i in range(10)]
    return write(tmp_path / "rows.jsonl", *lines, {"prompt": "a bird", "completion": " sang" * 90})


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def go(base: Path | str, data: Any, out: Path, **options: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"method": "lora", "device": "cpu", "rank": 2, "alpha": 4.0, "batch_size": 4, "epochs": 1}
    return graft.sft(base=base, data=data, out=out, **common | options)


# --- streaming -----------------------------------------------------------------------------------------------------


def test_rows_on_disk_are_the_rows_in_memory(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: ids, masks, counts and batches are the same, with weights and windows too."""
    tokenizer = Tokenizer.load(base_dir)
    text = write(tmp_path / "text.jsonl", {"text": "the tree stood by the river " * 30})
    specs = [f"{rows}=0.5", f"{text}=0.5"]
    template, options = ChatTemplate.of(tokenizer), DatasetOptions()
    memory, report = encode_dataset(read_all(specs), tokenizer, template, 60, options)
    disk, same = encode_to_disk(iterate_all(specs), tokenizer, template, 60, options, folder=tmp_path)
    assert report.figures() == same.figures()
    assert report.n_split == 11  # the one text, repeated to as many records as the other file has
    for i in (len(memory) - 1, 0, 5):
        assert (memory[i].ids == disk[i].ids).all()
        assert (memory[i].loss_mask == disk[i].loss_mask).all()
    assert (row_lengths(memory) == row_lengths(disk)).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rows.jsonl",
        "text.jsonl",
    ]  # the rows' file has no name
    batches = SFTBatches(disk, batch_size=4, max_tokens=240)
    seen = [i for step in range(batches.steps_per_epoch) for i in batches.records_at(step)]
    assert sorted(seen) == list(range(len(disk)))
    disk.close()


def test_streaming_is_bit_identical_and_resumes(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: a streamed run leaves the file of one in memory, also when it was stopped in the middle and resumed."""

    class Stops:
        def on_step(self, line: dict) -> None:
            if line["step"] == 2:
                raise RuntimeError("the power fails")

    go(base_dir, rows, tmp_path / "memory", epochs=2, checkpoint_every=1)
    with pytest.raises(RuntimeError, match="the power fails"):
        go(base_dir, rows, tmp_path / "disk", epochs=2, checkpoint_every=1, streaming=True, callbacks=[Stops()])
    go(base_dir, rows, tmp_path / "disk", epochs=2, resume=True)
    memory, disk = (tmp_path / name / "adapter_model.safetensors" for name in ("memory", "disk"))
    assert memory.read_bytes() == disk.read_bytes()
    losses = [[line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("memory", "disk")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6  # 11 records in batches of 4 are 3 steps an epoch


def test_bad_rows_of_a_stream_are_told_together(base_dir: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"x": 1}, {"text": "b"})
    with pytest.raises(
        ValueError, match=r"2 rows can't be used: bad.jsonl line 3: .*line 4: its format is text where .*line 1"
    ):
        go(base_dir, bad, tmp_path / "out", streaming=True)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be written says so once, with the folder; closing then raises nothing of its own."""

    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = close = lambda self: self.write(b"")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: Full())
    store = RowStore(tmp_path)
    row = Encoded(np.arange(3, dtype=np.int32), np.ones(3, np.bool_))
    for act in (lambda: store.append(row), store.finish):
        with pytest.raises(
            OSError, match=rf"No space left on device after 0 bytes of encoded rows.*{tmp_path}"
        ) as told:
            act()
        assert told.value.errno == errno.ENOSPC
    store.close()


def test_a_large_json_list_does_not_stream(tmp_path: Path) -> None:
    """The file has holes, so that it takes no room on the disk."""
    with (tmp_path / "list.json").open("wb") as file:
        file.write(b"[ ")
        file.truncate(65 << 20)
    with pytest.raises(ValueError, match=r"list.json is one JSON list of 68,157,440 bytes.*jq -c '.\[\]' list.json"):
        _check_streams([str(tmp_path / "list.json")])


# --- by name -------------------------------------------------------------------------------------------------------


def test_a_base_by_name(base_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a cached id trains the adapter that its folder trains, and the adapter names the id as its base; so does PEFT."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "hub/models--org--tiny"
    shutil.copytree(base_dir, root / "snapshots" / ("a" * 40))
    (root / "refs").mkdir()
    (root / "refs/main").write_text("a" * 40)
    monkeypatch.chdir(tmp_path)
    go("org/tiny", rows, tmp_path / "named")
    go(base_dir, rows, tmp_path / "local")
    named, local = (tmp_path / name / "adapter_model.safetensors" for name in ("named", "local"))
    assert named.read_bytes() == local.read_bytes()
    assert json.loads((tmp_path / "named/adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    held_out = write(tmp_path / "eval.jsonl", {"prompt": "the cat 0:", "completion": " sat"})
    assert graft.evaluate("org/tiny", held_out, adapter=tmp_path / "named", device="cpu")["n_records"] == 1
    pairs = write(tmp_path / "pairs.jsonl", {"prompt": "the cat:", "chosen": " sat", "rejected": " sang"})
    graft.dpo(base="org/tiny", data=pairs, out=tmp_path / "dpo", steps=1, rank=2, device="cpu")
    assert json.loads((tmp_path / "dpo/adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    session = Session("org/tiny", dtype="float32", device="cpu", chat=None)
    session.load("named", tmp_path / "named")
    assert graft.estimate_memory("org/tiny", method="lora", seq_len=32).n_params == session.model.config.n_params
    graft.quantize("org/tiny", tmp_path / "nf4")
    assert (tmp_path / "nf4/model.safetensors").exists()


# --- while it trains -----------------------------------------------------------------------------------------------


def test_kept_checkpoints_open_in_peft(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: keep=every=N leaves folders that PEFT opens, and the last one has the weights of the result."""
    go(base_dir, rows, tmp_path / "out", steps=4, keep="every=2,last")
    names = [f"checkpoints/step-0000000{step}" for step in (2, 4)]
    for name in names:
        base = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / name)
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    files = [load_file(tmp_path / "out" / name / "adapter_model.safetensors") for name in (*names, ".")]
    assert all(torch.equal(files[1][key], files[2][key]) for key in files[2])
    assert any(not torch.equal(files[0][key], files[2][key]) for key in files[2])


def test_the_best_by_right_answers(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """The figure is the one of graft eval on the same rows, and it is what keep=best reports."""
    held_out = write(tmp_path / "eval.jsonl", *({"prompt": f"the cat {i}:", "completion": " sat"} for i in (0, 3)))
    ended: list[Any] = []
    found = go(
        base_dir, rows, tmp_path / "out", eval_data=held_out, steps=2, keep="best,last", best_by="val_accuracy",
        callbacks=[type("Watch", (), {"on_end": lambda self, summary: ended.append(summary)})()],
    )  # fmt: skip
    assert (
        found["best_val_accuracy"]
        == graft.evaluate(base_dir, held_out, adapter=tmp_path / "out", device="cpu")["accuracy"]
    )
    assert ended == [found]
    assert found["eval_n_in_training"] == 2


def test_warm_up_as_a_share() -> None:
    """Worked by hand: 0.25 of 8 steps are 2; so is 2."""
    shares = [resolve({"warmup": given, "steps": 8}, method="lora", n_rows=1).train.n_warmup for given in (0.25, 2, 0)]
    assert shares == [2, 2, 0]
    with pytest.raises(ValueError, match=r"warmup_steps=1.5 must be a whole number of steps, or a share below 1"):
        resolve({"warmup": 1.5, "steps": 8}, method="lora", n_rows=1)
    with pytest.raises(ValueError, match="warmup_steps is given twice, once by its short name"):
        resolve({"warmup": 2, "warmup_steps": 2}, method="lora", n_rows=1)
