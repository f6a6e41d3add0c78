"""The loop: accumulation is one large batch, resume is bit-identical, signals and kill -9 lose nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from graft.base.data.shards import prepare
from graft.base.loss import next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer, initialize_
from graft.base.optim.adamw import AdamW
from graft.base.precision import LossScaler
from graft.base.pretrain import run_pretrain
from graft.base.runlog import RunFolder, read_metrics
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.base.train import TrainConfig, train

TINY = ModelConfig(61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=64, max_seq_len=16)


def batch_of(rows: int, *, seed: int) -> dict[str, torch.Tensor]:
    """Random ids whose labels are unevenly masked, so that micro-batches have different label counts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (rows, 17), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(rows):
        targets[row, : 3 * row % 14] = -100
    return {"ids": ids[:, :-1], "targets": targets}


def split(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    n = len(batch["ids"])
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, n, size)]


def train_tiny(folder: Path, micro: int, *, steps: int = 4, resume: bool = False, **changes: object) -> Transformer:
    model = Transformer(TINY)
    initialize_(model, seed=0)
    config = TrainConfig(steps=6, warmup_steps=1, checkpoint_every=2, **changes)  # pyright: ignore
    run = RunFolder(folder, stage="test", resume=resume)
    run.start({}, seed=0)

    def batches(step: int) -> list[dict[str, torch.Tensor]]:
        if step == steps:
            raise KeyboardInterrupt  # the process dies here
        return split(batch_of(6, seed=step), micro)

    try:
        train(model, AdamW(model.named_parameters()), batches, config, run)
    except KeyboardInterrupt:
        run.close()
    return model


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Law: micro-batches with different label counts give the large batch's weights, up to float32 addition order."""
    whole, parts = train_tiny(tmp_path / "a", 6), train_tiny(tmp_path / "b", 1)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in "ab")
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)
    assert first["n_labels"] == second["n_labels"]


def test_loss_is_the_mean_over_labels(tmp_path: Path) -> None:
    """Parity: the logged loss is torch's cross entropy over all labels of the batch."""
    train_tiny(tmp_path / "a", 2)
    model = Transformer(TINY)
    initialize_(model, seed=0)
    batch = batch_of(6, seed=0)
    expected = nn.functional.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["targets"].flatten())
    assert read_metrics(tmp_path / "a/metrics.jsonl")[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    """Law: dying in step 5 and resuming from step 4 gives the uninterrupted run's very weights and log."""
    whole = train_tiny(tmp_path / "whole", 3, steps=99)
    train_tiny(tmp_path / "cut", 3, steps=5)
    assert [p.name for p in (tmp_path / "cut/checkpoints").iterdir()] == ["step-00000004"]
    resumed = train_tiny(tmp_path / "cut", 3, steps=99, resume=True)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    lines = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 6


def test_overfits_one_batch() -> None:
    """Learning: 60 steps on one batch bring the loss from ln 61 = 4.1 to almost none."""
    model = Transformer(TINY)
    initialize_(model, seed=0)
    optimizer = AdamW(model.named_parameters(), learning_rate=1e-2, weight_decay=0.0)
    batch = batch_of(2, seed=0)
    first = None
    for _ in range(60):
        loss = next_token_loss(model, batch) / (batch["targets"] != -100).sum()
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert first == pytest.approx(4.1, abs=0.2)
    assert loss.item() < 0.1


def test_bfloat16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    """Law: mixed precision keeps the weights in float32 and the first loss within bfloat16's precision."""
    model = train_tiny(tmp_path / "a", 6, dtype="bfloat16")
    train_tiny(tmp_path / "b", 6)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in "ab")
    assert first == pytest.approx(second, rel=2**-7)
    assert first != second


def test_loss_scaler_by_hand() -> None:
    """Worked by hand: 65536 halves on an overflow, doubles after two good steps in a row; other dtypes stay at 1."""
    scaler = LossScaler("float16", growth_interval=2)
    scaler.update(finite=False)
    assert scaler.scale == 32768
    scaler.update(finite=True)
    scaler.update(finite=True)
    assert scaler.scale == 65536
    other = LossScaler("bfloat16")
    other.update(finite=False)
    assert other.scale == 1


def test_what_stops_training(tmp_path: Path) -> None:
    model = Transformer(TINY)
    initialize_(model, seed=0)
    run = RunFolder(tmp_path / "a", stage="test")
    run.start({}, seed=0)
    unlabelled = {"ids": torch.zeros(1, 4, dtype=torch.int64), "targets": torch.full((1, 4), -100)}
    with pytest.raises(ValueError, match="step 1: no token of the batch carries loss"):
        train(model, AdamW(model.named_parameters()), lambda step: [unlabelled], TrainConfig(steps=1), run)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"step 1: loss nan .*lower learning_rate"):
        train(model, AdamW(model.named_parameters()), lambda step: [batch_of(2, seed=0)], TrainConfig(steps=1), run)


def test_run_folder_refuses(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a", stage="pretrain")
    run.start({"x": 1}, seed=0)
    with pytest.raises(FileExistsError, match="another thread of this process is writing to"):
        RunFolder(tmp_path / "a", stage="pretrain")
    run.close()
    with pytest.raises(FileExistsError, match="an unfinished run; use --resume to go on, or --force"):
        RunFolder(tmp_path / "a", stage="pretrain")
    run.start({"x": 1}, seed=0)
    run.finish({})
    with pytest.raises(FileExistsError, match="a finished run"):
        RunFolder(tmp_path / "a", stage="pretrain")
    with pytest.raises(FileExistsError, match="holds a pretrain run, this is sft lora"):
        RunFolder(tmp_path / "a", stage="sft lora", resume=True)
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        RunFolder(tmp_path / "b", stage="pretrain", resume=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="is not empty and holds no graft run"):
        RunFolder(tmp_path / "c", stage="pretrain")
    (tmp_path / "d").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        RunFolder(tmp_path / "d", stage="pretrain")
    again = RunFolder(tmp_path / "a", stage="pretrain", force=True)
    assert (tmp_path / "a/summary.json").exists(), "what comes before start() may still be refused"
    again.start({"x": 2}, seed=0)
    assert not (tmp_path / "a/summary.json").exists()
    assert (tmp_path / "a/replaced/summary.json").exists(), "the old summary stays until there is a new one"
    again.finish({})
    assert not (tmp_path / "a/replaced").exists()


# --- with real processes -------------------------------------------------------------------------------------------

SETTINGS = ["n_layers=1", "d_model=32", "n_heads=2", "max_seq_len=16", "batch_size=4", "checkpoint_every=3"]


@pytest.fixture(scope="module")
def prepared(text_file: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    prepare([text_file], Tokenizer.load(tokenizer_dir), tokens, val_fraction=0.1)
    return tokens, tokenizer_dir


def pretrain_command(prepared: tuple[Path, Path], out: Path, *more: str, steps: int = 40) -> list[str]:
    tokens, tokenizer = prepared
    command = [sys.executable, "-m", "graft", "pretrain", "--data", str(tokens), "--tokenizer", str(tokenizer)]
    command += ["--out", str(out), "--steps", str(steps), *more]
    for setting in SETTINGS:
        command += ["--set", setting]
    return command


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def ends_well(process: subprocess.Popen[str]) -> bool:
    """Wait for its end, and close its pipe: pytest reports one that is left open."""
    process.communicate(timeout=240)
    return process.returncode == 0


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = out / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") >= steps:
            return
        if process.poll() is not None:
            raise AssertionError(process.stderr.read() if process.stderr else "")
        time.sleep(0.005)
    raise AssertionError("the run never got there")


@pytest.mark.slow
def test_kill_9_then_resume_ends_with_the_same_weights(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """Law: a run killed twice without warning, at whatever moment, ends bit-identical to one that was never killed."""
    assert ends_well(start(pretrain_command(prepared, tmp_path / "whole")))
    for steps, more in ((5, ()), (20, ("--resume",))):
        process = start(pretrain_command(prepared, tmp_path / "killed", *more))
        wait_for_steps(tmp_path / "killed", steps, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "killed/model.safetensors").exists(), "killed too late for this test to mean anything"
    assert ends_well(start(pretrain_command(prepared, tmp_path / "killed", "--resume")))
    whole, killed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_write_a_checkpoint(prepared: tuple[Path, Path], tmp_path: Path, number: int, code: int) -> None:
    """Law: Ctrl-C and SIGTERM end the step, write a checkpoint, say how to go on, and exit 130 or 143."""
    process = start(pretrain_command(prepared, tmp_path / "run", steps=100_000))
    wait_for_steps(tmp_path / "run", 2, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "--resume" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    [checkpoint] = (tmp_path / "run/checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] >= 2


def test_pretrain_leaves_a_base_folder(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """Law: config, log, summary and base are there; resume refuses to become another run; the same seed, the same loss."""
    tokens, tokenizer = prepared
    tiny = {"n_layers": 1, "d_model": 32, "n_heads": 2, "max_seq_len": 16, "batch_size": 4, "steps": 5, "eval_every": 2}
    arguments = {"data": tokens, "tokenizer": tokenizer, "device": "cpu", "progress": False}
    summaries = [run_pretrain(**arguments, out=tmp_path / name, settings=tiny) for name in ("a", "b")]
    assert summaries[0]["val_loss"] == summaries[1]["val_loss"]
    assert summaries[0]["val_bits_per_byte"] > 0
    run = json.loads((tmp_path / "a/run.json").read_text())
    assert (run["status"], run["config"]["train"]["steps"], run["config"]["model"]["d_model"]) == ("finished", 5, 32)
    assert run["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    lines = read_metrics(tmp_path / "a/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert {"loss", "lr", "grad_norm", "tokens_per_s"} <= set(lines[0])
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4, 5]
    with pytest.raises(FileExistsError, match="finished run"):
        run_pretrain(**arguments, out=tmp_path / "a", settings=tiny)
    with pytest.raises(ValueError, match="--resume goes on with d_model=32, got 64"):
        run_pretrain(**arguments, out=tmp_path / "a", settings={"d_model": 64}, resume=True)
    with pytest.raises(ValueError, match="got preset medium"):
        run_pretrain(**arguments, out=tmp_path / "a", preset_name="medium", resume=True)
    longer = run_pretrain(**arguments, out=tmp_path / "a", settings={"steps": 7}, resume=True)
    assert longer["steps"] == 7


def test_pretrain_refuses(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    tokens, tokenizer = prepared
    arguments = {"data": tokens, "tokenizer": tokenizer, "out": tmp_path / "x", "device": "cpu", "progress": False}
    with pytest.raises(ValueError, match="vocab_size=9 differs from the tokenizer's 300"):
        run_pretrain(**arguments, settings={"vocab_size": 9})
    with pytest.raises(ValueError, match=r"one window of max_seq_len=100000 needs 100001"):
        run_pretrain(**arguments | {"out": tmp_path / "y"}, settings={"max_seq_len": 100_000, "n_layers": 1})
    with pytest.raises(ValueError, match="no known architecture has qk_norm=True, attention_bias=True"):
        run_pretrain(**arguments | {"out": tmp_path / "z"}, settings={"attention_bias": True})
    with pytest.raises(ValueError, match="unknown device 'tpux'"):
        run_pretrain(**arguments | {"device": "tpux"})
    (tmp_path / "other.txt").write_text("another text with other words, other words and more words " * 20)
    other = Tokenizer.train([tmp_path / "other.txt"], vocab_size=270, pattern="gpt2", special_tokens=["<|endoftext|>"])
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="was prepared with another tokenizer"):
        run_pretrain(**arguments | {"tokenizer": tmp_path / "other"})
