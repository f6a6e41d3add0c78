"""Many adapters at once: each equals its own run, whatever its rank, rate, length and fate, and whatever happens to the others."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.base.runlog import read_metrics
from graft.finetune.adapters.stacked import Segment, segments_of
from graft.finetune.many.batch import together
from graft.finetune.many.jobs import read_jobs
from graft.finetune.many.sweep import parse_grid, run_sweep
from graft.finetune.many.trainer import Trainer
from graft.finetune.quantize import run_quantize

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "looked",
    "at",
    "bird",
    "in",
    "tree",
    "while",
    "river",
    "runs",
    "to",
    "sea",
]


def write_rows(path: Path, n: int, longest: int, seed: int) -> Path:
    """Prompts and completions of random words."""
    rng = random.Random(seed)
    rows = [
        {
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, longest))),
            "completion": " " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest))),
        }
        for _ in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("data")
    return [write_rows(folder / f"{i}.jsonl", 9 + 4 * i, 3 + 4 * i, i) for i in range(3)]


@pytest.fixture(scope="module")
def nf4_base(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4") / "base"
    run_quantize(base=base_dir, out=folder)
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def job(data: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return {"data": data, "out": out, "steps": 4, "batch_size": 2, "rank": 4, "warmup_steps": 0} | settings


def different_jobs(data: list[Path], out: Path) -> list[dict[str, Any]]:
    """Nothing alike: data, lengths, ranks, rates, seeds, batches, schedules, targets, steps."""
    return [
        job(data[0], out / "a", steps=32, rank=4, learning_rate=3e-3, seed=1, batch_size=4),
        job(data[1], out / "b", steps=35, rank=8, alpha=16.0, learning_rate=1e-3, seed=2, batch_size=3, micro_batch=1,
            weight_decay=0.1, schedule="linear", eval_data=data[0], eval_every=10),
        job(data[2], out / "c", steps=38, rank=2, learning_rate=5e-3, seed=3, batch_size=1, grad_clip=0.1,
            targets=["q_proj", "down_proj"], rank_stabilized=True, schedule="constant", max_seq_len=20,
            on_too_long="drop", warmup_steps=5),
        job(data[0], out / "d", steps=30, rank=3, learning_rate=2e-3, seed=4, batch_size=5, packing=True),
    ]  # fmt: skip


def solo(base: Path, one: dict[str, Any], out: Path, method: str) -> dict[str, Any]:
    return graft.sft(base=base, method=method, **(one | {"out": out}))


# --- equal to solo runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "qlora", "stored in 4 bits"])
def test_each_job_is_its_solo_run(
    method: str, base_dir: Path, nf4_base: Path, data: list[Path], tmp_path: Path
) -> None:
    """Law: losses of every step equal those of `graft.sft` alone to 1e-4, the weights follow, the files are the same."""
    base = nf4_base if method == "stored in 4 bits" else base_dir
    method = "lora" if method == "stored in 4 bits" else method
    jobs = different_jobs(data, tmp_path / "many")
    summaries = graft.sft_many(base=base, jobs=jobs, method=method)
    for one, summary in zip(jobs, summaries, strict=True):
        alone = tmp_path / "alone" / one["out"].name
        expected = solo(base, one, alone, method)
        assert len(losses(alone)) == one["steps"]
        assert losses(one["out"]) == pytest.approx(losses(alone), abs=1e-4)
        theirs = weights(alone)
        ours = weights(one["out"])
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            # float32 sums in another order, through 30 AdamW steps whose size is the sign's where gradients are tiny
            assert (tensor - theirs[name]).norm() <= 2e-3 * theirs[name].norm() + 1e-6, name
        figures = ("steps", "n_trained_params", "weight_bytes", "method", "n_skipped_steps")
        assert {key: summary[key] for key in figures} == {key: expected[key] for key in figures}
        names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*")) for f in (one["out"], alone)]
        assert names[0] == names[1]
        for name in ("adapter_config.json", "graft.json"):
            assert json.loads((one["out"] / name).read_text()) == json.loads((alone / name).read_text())
        configs = [json.loads((folder / "run.json").read_text()) for folder in (one["out"], alone)]
        assert configs[0]["config"] == configs[1]["config"]
        assert configs[0]["status"] == "finished"
        keys = [[set(line) for line in read_metrics(folder / "metrics.jsonl")] for folder in (one["out"], alone)]
        assert keys[0] == keys[1]
    vals = [[line["val_loss"] for line in read_metrics(f / "metrics.jsonl") if "val_loss" in line]
            for f in (tmp_path / "many/b", tmp_path / "alone/b")]  # fmt: skip
    assert len(vals[0]) == 4
    assert vals[0] == pytest.approx(vals[1], abs=1e-4)


def test_dropout_is_drawn_as_in_a_solo_run(base_dir: Path, data: list[Path], tmp_path: Path) -> None:
    """Law: each job draws from a generator of its own, so that masks are those of its solo run where rows have one length."""
    alike = tmp_path / "alike.jsonl"  # rows of one length: only then are the batches laid out as in a solo run
    rows = [{"prompt": f"the cat {i} sat", "completion": " mat"} for i in range(8)]
    alike.write_text("\n".join(map(json.dumps, rows)))
    jobs = [
        job(alike, tmp_path / "a", dropout=0.3, seed=1, steps=6),
        job(alike, tmp_path / "b", dropout=0.1, seed=2, steps=6, rank=2, batch_size=3),
        job(alike, tmp_path / "c", steps=6),
    ]
    graft.sft_many(base=base_dir, jobs=jobs)
    for one in jobs:
        solo(base_dir, one, tmp_path / "alone" / one["out"].name, "lora")
        assert losses(one["out"]) == pytest.approx(losses(tmp_path / "alone" / one["out"].name), abs=1e-4)
    plain = graft.sft(base=base_dir, method="lora", **(jobs[0] | {"out": tmp_path / "plain", "dropout": 0.0}))
    assert abs(plain["train_loss"] - losses(tmp_path / "a")[-1]) > 1e-3  # dropout does something


@pytest.mark.parametrize(
    "settings", [{"checkpointing": True}, {"dtype": "bfloat16"}, {"targets": ["q_proj", "lm_head"]}]
)
def test_shared_settings_and_an_adapted_head(
    settings: dict[str, Any], base_dir: Path, data: list[Path], tmp_path: Path
) -> None:
    """Law: recomputed activations, bfloat16 arithmetic and an adapted head give a solo run's losses."""
    jobs = [job(data[i], tmp_path / str(i), rank=2 + i, seed=i, **settings) for i in range(2)]
    graft.sft_many(base=base_dir, jobs=jobs)
    for one in jobs:
        solo(base_dir, one, tmp_path / "alone" / one["out"].name, "lora")
        # bfloat16 rounds to 3 digits, and sums are in another order
        tolerance = 2e-2 if "dtype" in settings else 1e-4
        assert losses(one["out"]) == pytest.approx(losses(tmp_path / "alone" / one["out"].name), abs=tolerance)


# --- coming and going ----------------------------------------------------------------------------------------------


def test_jobs_that_wait_join_when_others_end(base_dir: Path, data: list[Path], tmp_path: Path) -> None:
    """Law: two at a time give each job what all at once give it."""
    for at_once, name in ((None, "all"), (2, "two")):
        graft.sft_many(base=base_dir, jobs=different_jobs(data, tmp_path / name), at_once=at_once)
    for one in "abcd":
        assert losses(tmp_path / "two" / one) == pytest.approx(losses(tmp_path / "all" / one), abs=1e-4)


def test_a_job_that_diverges_leaves_and_the_others_go_on(base_dir: Path, data: list[Path], tmp_path: Path) -> None:
    """Law: a NaN in one job's rows, and a batch without a label, touch nobody else. The folder says why it ended."""
    jobs = [
        job(data[0], tmp_path / "a", steps=8),
        job(data[0], tmp_path / "bad", steps=8, learning_rate=1e38, alpha=8.0),
        job(data[1], tmp_path / "c", steps=8),
        job(tmp_path / "missing.jsonl", tmp_path / "d"),
    ]
    summaries = graft.sft_many(base=base_dir, jobs=jobs)
    assert "loss nan" in summaries[1]["error"]
    assert "missing.jsonl" in summaries[3]["error"]
    state = json.loads((tmp_path / "bad/run.json").read_text())
    assert state["status"] == "stopped"
    assert "loss nan" in state["reason"]
    assert not (tmp_path / "d").exists()
    for one in (jobs[0], jobs[2]):
        solo(base_dir, one, tmp_path / "alone" / one["out"].name, "lora")
        assert losses(one["out"]) == pytest.approx(losses(tmp_path / "alone" / one["out"].name), abs=1e-4)
    with pytest.raises(ValueError, match=r"every job failed; the first: .*missing\.jsonl"):
        graft.sft_many(base=base_dir, jobs=[jobs[3]])


def test_resume_is_exact_for_all(
    base_dir: Path, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: stopped after some steps and resumed, together or alone, each job's losses and weights are bit-identical."""

    def short(one: dict[str, Any], out: Path) -> dict[str, Any]:
        return one | {"out": out / one["out"].name, "dropout": 0.2, "checkpoint_every": 7}

    jobs = [short(one, tmp_path / "whole") for one in different_jobs(data, tmp_path)]
    graft.sft_many(base=base_dir, jobs=jobs)
    stopped = [one | {"out": tmp_path / "stopped" / one["out"].name} for one in jobs]
    step, n = Trainer.step, 0

    def stopping(self: Trainer, *args: Any) -> None:
        nonlocal n
        n += 1
        if n == 17:
            raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        graft.sft_many(base=base_dir, jobs=stopped)
    monkeypatch.undo()
    assert [len(losses(one["out"])) for one in stopped] == [16] * 4
    graft.sft_many(base=base_dir, jobs=stopped, resume=True)
    for one, other in zip(jobs, stopped, strict=True):
        assert losses(one["out"]) == losses(other["out"])
        theirs = weights(other["out"])
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(one["out"]).items())


def test_a_solo_run_goes_on_from_a_job(base_dir: Path, data: list[Path], tmp_path: Path) -> None:
    """Law: what a job leaves is a solo run's: `graft.sft` resumes it to more steps, as its own run would go on."""
    jobs = [job(data[i], tmp_path / str(i), seed=i, schedule="constant", learning_rate=1e-3) for i in range(2)]
    graft.sft_many(base=base_dir, jobs=jobs)
    alone = jobs[1] | {"out": tmp_path / "alone", "steps": 8}
    graft.sft(base=base_dir, method="lora", **alone)
    graft.sft(base=base_dir, method="lora", **(alone | {"out": jobs[1]["out"]}), resume=True)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)


# --- the batch -----------------------------------------------------------------------------------------------------


def test_segments() -> None:
    """Worked by hand: neighbors with equally many tokens are one segment; a job without tokens is in none."""
    assert segments_of([4, 4, 2]) == [Segment(slice(0, 2), slice(0, 8)), Segment(slice(2, 3), slice(8, 10))]
    assert segments_of([0, 3, 0, 3]) == [Segment(slice(1, 2), slice(0, 3)), Segment(slice(3, 4), slice(3, 6))]


def test_rows_of_different_lengths_are_packed() -> None:
    """Worked by hand: 2 rows of 3 and 1 and a row of 2 are 6 positions end to end, not 3 rows of 3."""
    none = -100
    first = {"ids": torch.tensor([[1, 2, 3], [4, 0, 0]]), "targets": torch.tensor([[2, 3, 9], [5, none, none]])}
    second = {"ids": torch.tensor([[6, 7]]), "targets": torch.tensor([[7, 8]])}
    batch, counts = together([first, second], packed=True)
    assert batch["ids"].tolist() == [[1, 2, 3, 4, 6, 7]]
    assert batch["targets"].tolist() == [[2, 3, 9, 5, 7, 8]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 6]
    assert counts == [4, 2]
    batch, counts = together([first, None, second], packed=False)
    assert batch["ids"].tolist() == [[1, 2, 3], [4, 0, 0], [6, 7, 0]]
    assert batch["targets"].tolist()[2] == [7, 8, none]
    assert counts == [6, 0, 3]


# --- bad input -----------------------------------------------------------------------------------------------------


def test_bad_jobs_are_named(base_dir: Path, data: list[Path], tmp_path: Path) -> None:
    """What is wrong with the jobs as a whole is said before anything is read or written."""
    a, b = job(data[0], tmp_path / "a"), job(data[1], tmp_path / "b")
    cases = [
        ([], r"no job to train"),
        ([a, b | {"out": tmp_path / "x/../a"}], r"jobs 1 and 2 have one output, .*a; give each its own"),
        ([a, {"out": "b"}], r"job 2 \(b\) has no data"),
        ([a, b | {"base": tmp_path}], r"job 2 \(.*b\) is for base .*; jobs that train together share one base"),
        ([a, b | {"method": "qlora"}], r"job 2 .* has method='qlora', the run's is 'lora'"),
        ([a, b | {"dtype": "bfloat16"}], r"dtype differs between jobs .*a \(None\) and .*b \(bfloat16\)"),
        ([a, b | {"max_lr": 1}], r"job 2 \(.*b\): unknown config key 'max_lr'; did you mean learning_rate\?"),
        (
            [a, b | {"targets": ["q_proj2"]}],
            r"job .*b: lora targets \{'q_proj2'\} match no linear; this model has q_proj",
        ),
        ([a | {"optimizer": "adamw8bit"}], r"job .*a: optimizer=adamw8bit does not train many adapters at once"),
        ([a | {"ema_decay": 0.9}], r"job .*a: ema_decay=0\.9 is not covered for jobs that train together"),
        ([a | {"decayed_roles": ["hidden"]}], r"job .*a: decayed_roles without adapter is not covered"),
        ([a | {"dropout": 0.1, "checkpointing": True}], r"job .*a: dropout=0\.1 with checkpointing=true"),
        ([a | {"streaming": True}], r"job .*a: streaming=true is not covered for jobs that train together"),
        ([a | {"out": base_dir}], r"out is the base itself"),
    ]
    for jobs, message in cases:
        with pytest.raises(ValueError, match=message):
            graft.sft_many(base=base_dir, jobs=jobs)
        assert not any((tmp_path / name).exists() for name in "ab")
    with pytest.raises(ValueError, match="at_once=0"):
        graft.sft_many(base=base_dir, jobs=[a], at_once=0)
    with pytest.raises(ValueError, match="method='full'"):
        graft.sft_many(base=base_dir, jobs=[a], method="full")
    with pytest.raises(ValueError, match=r"job .*a: rank=10000 is more than a layer's smaller side 32"):
        graft.sft_many(base=base_dir, jobs=[a | {"rank": 10_000}, b])
    graft.sft_many(base=base_dir, jobs=[b])
    with pytest.raises(FileExistsError, match=r"job .*b: .* holds a finished run"):
        graft.sft_many(base=base_dir, jobs=[a, b])


def test_a_jobs_file(tmp_path: Path) -> None:
    path = tmp_path / "jobs.toml"
    path.write_text(
        '[defaults]\nrank = 8\nsteps = 3\n[[jobs]]\ndata = "a"\nout = "x"\n[[jobs]]\ndata = "b"\nout = "y"\nrank = 2\n'
    )
    assert read_jobs(path) == [
        {"rank": 8, "steps": 3, "data": "a", "out": "x"},
        {"rank": 2, "steps": 3, "data": "b", "out": "y"},
    ]
    for text, message in (
        ("rank = 1", "unknown key 'rank'; a jobs file has"),
        ("[defaults]\nrank = 1", "has no \\[\\[jobs\\]\\]"),
        ("jobs = 3", "has no \\[\\[jobs\\]\\]"),
        ("defaults = 3", "defaults is 3; expected a table"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_jobs(path)


# --- sweeps --------------------------------------------------------------------------------------------------------


def test_a_sweep_exports_its_best(base_dir: Path, data: list[Path], tmp_path: Path) -> None:
    """Law: each trial is a run of its own; the folder's adapter is that of the lowest validation loss."""
    out = tmp_path / "sweep"
    grid = parse_grid(["learning_rate=1e-5,1e-2", "rank=2,4"])
    report = run_sweep(
        base=base_dir, data=data[0], eval_data=data[1], out=out, grid=grid, settings={"steps": 6, "batch_size": 4}
    )
    assert [line["trial"] for line in report["trials"]] == [
        f"learning_rate={rate},rank={rank}" for rate in ("1e-05", "0.01") for rank in (2, 4)
    ]
    lowest = min(report["trials"], key=lambda line: line["val_loss"])
    assert report["best"] == lowest["trial"]
    best = weights(out / "trials" / lowest["trial"])
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(out).items())
    assert json.loads((out / "sweep.json").read_text()) == report
    assert (out / "sweep.png").stat().st_size > 1000
    alone = graft.sft(
        base=base_dir, data=data[0], eval_data=data[1], out=tmp_path / "alone", method="lora",
        **{key: lowest[key] for key in grid}, steps=6, batch_size=4,
    )  # fmt: skip
    assert alone["val_loss"] == pytest.approx(lowest["val_loss"], abs=1e-4)


def test_halving_drops_the_worse_half(base_dir: Path, data: list[Path], tmp_path: Path) -> None:
    """Worked by hand: of 8 trials of 16 steps 4 are left after 4 steps and 2 after 8: 4 x 4 + 2 x 8 + 2 x 16 = 64 of 128."""
    grid = parse_grid(["learning_rate=1e-6,1e-5,1e-4,1e-3", "rank=2,4"])
    report = run_sweep(
        base=base_dir, data=data[0], eval_data=data[1], out=tmp_path, grid=grid, halving=True, force=True,
        settings={"steps": 16, "batch_size": 2, "warmup_steps": 0},
    )  # fmt: skip
    steps = sorted(line["steps"] for line in report["trials"])
    assert steps == [4, 4, 4, 4, 8, 8, 16, 16]
    assert all(line["learning_rate"] == 1e-3 for line in report["trials"] if line["steps"] == 16)
    assert sum(steps) == 64


def test_bad_sweeps() -> None:
    for words, message in (
        (["dtype=float32,bfloat16"], "--sweep dtype: the adapters of a sweep train on one base"),
        (["rank"], "'rank' is not key=value,value"),
        (["rank=4,4"], "--sweep rank has 4 twice"),
        (["rank=4", "rank=8"], "--sweep rank is given twice"),
        (["max_lr=1"], "unknown config key 'max_lr'"),
        (["rank=x"], "config key rank = 'x' is str; expected int"),
        ([], "a sweep needs at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_grid(words)


def test_the_command_line(base_dir: Path, data: list[Path], tmp_path: Path) -> None:
    """`graft sft --jobs` and `--sweep` end to end, and flags that don't go together."""

    def run_graft(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "graft", *words], capture_output=True, text=True, timeout=240)

    jobs = tmp_path / "jobs.toml"
    jobs.write_text(
        f'[defaults]\nbase = "{base_dir}"\nsteps = 2\nrank = 2\nbatch_size = 2\n'
        + "".join(f'[[jobs]]\ndata = "{data[i]}"\nout = "{tmp_path / str(i)}"\n' for i in range(2))
    )
    done = run_graft("sft", "--jobs", str(jobs))
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "1")) == 2
    flags = ["--base", base_dir, "--data", data[0], "--eval-data", data[1], "--out", tmp_path / "s", "--set", "steps=2"]
    done = run_graft("sft", *map(str, flags), "--sweep", "rank=2,4")
    assert done.returncode == 0, done.stderr
    assert "the best is rank=" in done.stderr
    done = run_graft("sft", "--jobs", str(jobs), "--fit")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("predicted peak memory of tensors: ")
    assert "2 of 2 jobs fit into " in done.stdout
    assert len(losses(tmp_path / "1")) == 2  # as it was
    for words, message in (
        (
            ["--jobs", str(jobs), "--fit", "--at-once", "2"],
            "--fit finds out how many fit at once; leave --at-once 2 out",
        ),
        (["--jobs", str(jobs), "--sweep", "rank=2"], "--jobs and --sweep exclude each other"),
        (["--jobs", str(jobs), "--halving"], "--halving chooses among the trials of a sweep"),
        (["--halving"], "--halving, --at-once and --fit are about many adapters"),
        (["--base", "x"], "--data is missing"),
        (["--sweep", "rank=2", *map(str, flags[:4]), "--out", "x"], "a sweep chooses by validation loss"),
    ):
        done = run_graft("sft", *words)
        assert done.returncode == 1
        assert message in done.stderr
