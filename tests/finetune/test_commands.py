"""graft sft, eval, generate from the command line: every --data counts, options reach the run by flag, --set and TOML."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, standard output, standard error) of `graft ARGUMENTS`."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_sft_by_flag_set_and_toml(run: Run, base_dir: Path, tmp_path: Path) -> None:
    """Law: `--data A --data B` trains on both; the record options mean the same by flag, by --set and in a TOML file; an
    adapter is evaluated and gone on from by its folder."""
    a = write(tmp_path / "a.jsonl", {"ask": "the cat", "say": " sat"}, {"ask": "a", "say": None})
    b = write(tmp_path / "b.jsonl", {"ask": "a bird", "say": " sang"})
    toml = tmp_path / "c.toml"
    toml.write_text('[records]\non_empty = "drop"\n[data]\nfields = {prompt = "ask", completion = "say"}\n')
    common = [
        "sft",
        "--base",
        base_dir,
        "--data",
        a,
        "--data",
        b,
        "--lora",
        "--rank",
        2,
        "--steps",
        2,
        "--device",
        "cpu",
    ]
    by = {
        "flag": ["--on-empty", "drop", "--field", "prompt=ask", "--field", "completion=say"],
        "set": ["--set", "on_empty=drop", "--set", 'fields={prompt="ask", completion="say"}'],
        "toml": [toml],
    }
    for name, options in by.items():
        code, out, err = run(*common, "--out", tmp_path / name, *options)
        assert code == 0, err
        assert "n_records: 3" in out
        assert "1 of 3 records are null or empty and were dropped" in err
    weights = {(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in by}
    assert len(weights) == 1
    saved = json.loads((tmp_path / "toml/run.json").read_text())["config"]
    assert saved["data"]["fields"] == {"prompt": "ask", "completion": "say"}
    assert saved["records"]["on_empty"] == "drop"
    code, out, err = run(*common, "--out", tmp_path / "more", *by["flag"], "--adapter", tmp_path / "flag")
    assert code == 0, err
    for wrong, message in (
        (["--on-empty", "skip"], "graft: --on-empty 'skip' is unknown; choose drop, error"),
        (["--field", "prompt"], "graft: --field 'prompt' is not FIELD=NAME"),
        (["--data", tmp_path / "none*.jsonl"], "none*.jsonl matches no file"),
        (["--chat-template", "nobody"], "graft: chat template 'nobody' is no file and none of the known names"),
        (["--adapter", tmp_path], "has no adapter_config.json"),
    ):
        code, _, err = run(*common, "--out", tmp_path / "x", *wrong)
        assert code == 1
        assert message in err.splitlines()[-1]
        assert not (tmp_path / "x").exists()


def test_eval_of_several_adapters(run: Run, base_dir: Path, tmp_path: Path) -> None:
    """Law: several adapters are a table, or one JSON object by name, with the base; one adapter is its own figures."""
    rows = write(tmp_path / "rows.jsonl", *({"q": f"the {w}", "completion": f" {w}"} for w in ("cat", "bird", "sea")))
    code, _, err = run(
        "sft", "--base", base_dir, "--data", rows, "--field", "prompt=q", "--out", tmp_path / "one", "--lora", "--rank", 2,
        "--steps", 1, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    common = [
        "eval",
        "--base",
        base_dir,
        "--data",
        rows,
        "--field",
        "prompt=q",
        "--device",
        "cpu",
        "--score",
        "likelihood",
    ]
    both = [*common, "--adapter", tmp_path / "one", "--adapter", f"two={tmp_path / 'one'}"]
    code, out, err = run(*both, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert list(found) == ["base", "one", "two"]
    assert found["one"] == found["two"]
    assert {"n_correct", "accuracy_low", "accuracy_high", "perplexity", "bits_per_byte", "f1_macro"} <= found[
        "base"
    ].keys()
    code, out, _ = run(*both)
    assert "95% interval" in out
    assert [word for word in ("base", "one", "two") if word in out] == ["base", "one", "two"]
    code, out, _ = run(*common, "--adapter", tmp_path / "one", "--json")
    assert json.loads(out) == found["one"]
    code, _, err = run(*common, "--adapter", tmp_path / "one", "--adapter", f"one={tmp_path / 'one'}")
    assert (code, "the name 'one' is empty or given twice; write NAME=DIR" in err) == (1, True)


def test_generate_takes_many_prompts(run: Run, base_dir: Path, tmp_path: Path) -> None:
    """Law: --prompt, --prompt-file and stdin give the same answer to the same prompt, in their order; --json says how each
    ended; --stop cuts."""
    common = ["generate", "--base", base_dir, "--max-new-tokens", 5, "--device", "cpu"]
    code, alone, err = run(*common, "--prompt", "the cat")
    assert code == 0, err
    text = alone.removesuffix("\n")
    lines, objects = tmp_path / "prompts.txt", write(tmp_path / "prompts.jsonl", "the cat", {"prompt": "a\nbird"})
    lines.write_text("the cat\n\n")
    options = ["--prompt", "-", "--prompt", "the cat", "--prompt-file", objects, "--json"]
    code, out, err = run(*common, *options, stdin="the cat")
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["the cat", "the cat", "the cat", "a\nbird"]
    assert {answer["text"] for answer in answers[:3]} == {text}
    assert answers[0]["finished"] == "length"
    assert len(answers[0]["log_probabilities"]) == answers[0]["n_tokens"] == 5
    assert run(*common, "--prompt-file", lines)[1] == alone
    assert run(*common, "--prompt-file", "-", stdin="the cat\n")[1] == alone
    code, out, _ = run(*common, "--prompt", "the cat", "--stop", text[2:4])
    assert out == text[: text.find(text[2:4])] + "\n"
    for wrong, message in (
        ([], "no prompt given; use --prompt TEXT"),
        (["--prompt-file", tmp_path / "none"], "none does not exist"),
        (["--prompt", "a", "--stop", ""], "a stop string is empty"),
        (["--prompt", "a", "--repetition-penalty", 0], "repetition_penalty=0.0 must be > 0"),
        (["--prompt", "the cat " * 90, "--prompt", "the cat " * 91], "prompt 1, 2 has"),
    ):
        code, _, err = run(*common, *wrong)
        assert (code, message in err) == (1, True), err
    write(objects, 3)
    assert "prompts.jsonl line 1: expected a JSON string" in run(*common, "--prompt-file", objects)[2]


def test_every_knob_reaches_the_run(run: Run, base_dir: Path, tmp_path: Path) -> None:
    """Law: each flag of graft sft stands in run.json under its key, and a TOML file may use the flags' names."""
    rows = write(tmp_path / "a.jsonl", {"prompt": "the cat", "completion": " sat"})
    common = ("sft", "--base", base_dir, "--data", rows, "--eval-data", rows, "--lora", "--rank", 2, "--device", "cpu")
    flags: dict[str, tuple[object, str, object]] = {
        "--steps": (4, "steps", 4), "--lr": (1e-3, "learning_rate", 1e-3), "--warmup": (0.5, "warmup_steps", 0.5),
        "--schedule": ("wsd", "schedule", "wsd"), "--weight-decay": (0.1, "weight_decay", 0.1),
        "--eval-every": (2, "eval_every", 2), "--save-every": (2, "checkpoint_every", 2),
        "--keep": ("best,last", "keep", "best,last"),
        "--best-by": ("val_loss", "best_by", "val_loss"), "--patience": (3, "patience", 3), "--batch-size": (2, "batch_size", 2),
        "--max-seq-len": (40, "max_seq_len", 40), "--epochs": (2, "epochs", 2.0),
    }  # fmt: skip
    given = [word for flag, (value, _, _) in flags.items() for word in (flag, value)]
    code, _, err = run(*common, *given, "--packing", "--streaming", "--log", "tensorboard", "--out", tmp_path / "a")
    assert code == 0, err
    assert "distinct records are among the training records as well" in err
    config = json.loads((tmp_path / "a/run.json").read_text())["config"]
    for _, key, value in flags.values():
        assert {**config["train"], **config["data"]}[key] == value, key
    assert config["data"]["packing"] is config["data"]["streaming"] is True
    assert list((tmp_path / "a/tensorboard").iterdir())
    toml = tmp_path / "c.toml"
    toml.write_text("[train]\nlr = 1e-3\nwarmup = 2\nsave_every = 3\nsteps = 1\n")
    assert run(*common, toml, "--warmup", 4, "--out", tmp_path / "b")[0] == 0
    train = json.loads((tmp_path / "b/run.json").read_text())["config"]["train"]
    assert (train["learning_rate"], train["warmup_steps"], train["checkpoint_every"]) == (1e-3, 4, 3)


@pytest.mark.parametrize("many", [("--jobs", "jobs.toml"), ("--sweep", "rank=2,4")])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--adapter", "runs/a"), "--adapter runs/a"),
        (("--log", "wandb"), "--log wandb"),
        (("--set", 'log="wandb"'), "--log wandb"),
        (("--streaming",), "streaming=true"),
    ],
)
def test_what_only_a_single_run_does(many: tuple, given: tuple, said: str, run: Run) -> None:
    """Many at once take none of these: each would be ignored."""
    code, _, err = run("sft", *many, *given)
    assert (code, err) == (1, f"graft: {said} is about a single run; leave it out with --jobs or --sweep\n")


def test_a_recipe_is_where_the_settings_start(run: Run, base_dir: Path, tmp_path: Path) -> None:
    """Law: flags win over the recipe; its method and base count unless others are given; the list shows its memory."""
    rows = write(tmp_path / "a.jsonl", {"prompt": "the cat", "completion": " sat"})
    recipe = ("sft", "--recipe", "smollm2-135m-lora-8gb", "--data", rows, "--device", "cpu", "--steps", 1)
    code, _, err = run(*recipe, "--base", base_dir, "--max-seq-len", 40, "--rank", 2, "--out", tmp_path / "a")
    assert code == 0, err
    saved = json.loads((tmp_path / "a/run.json").read_text())
    assert saved["stage"] == "sft lora"
    assert (saved["config"]["lora"]["rank"], saved["config"]["train"]["dtype"]) == (2, "bfloat16")
    assert run(*recipe, "--base", base_dir, "--qlora", "--out", tmp_path / "b")[2].startswith(
        "graft: --qlora and --recipe smollm2-135m-lora-8gb, whose method is lora, contradict each other"
    )
    listed = run("config", "recipes")[1]
    assert "llama-3.1-8b-qlora-8gb" in listed
    assert "6.08 GiB" in listed


def test_generate_with_beams(run: Run, base_dir: Path) -> None:
    """Law: one beam is the greedy text; several are graft.generate's beams, alone, in JSON and up to a stop string; what
    contradicts beams is refused."""
    import graft

    model, tokenizer = graft.load_model(base_dir), graft.Tokenizer.load(base_dir)
    [best] = graft.generate(model, tokenizer, ["the cat"], max_new_tokens=6, n_beams=3, length_penalty=0.5)
    common = ["generate", "--base", base_dir, "--max-new-tokens", 6, "--device", "cpu", "--prompt", "the cat"]
    beams = [*common, "--beams", 3, "--length-penalty", 0.5]
    code, out, err = run(*beams)
    assert (code, out) == (0, f"{best}\n"), err
    answer = json.loads(run(*beams, "--json")[1])
    assert answer["text"] == best
    assert len(answer["log_probabilities"]) == answer["n_tokens"] == 6
    assert run(*common, "--beams", 1)[1] == run(*common)[1]
    [cut] = graft.generate(model, tokenizer, ["the cat"], max_new_tokens=6, n_beams=3, stop=[best[1:3]])
    assert best[1:3] not in cut
    for wrong, message in (
        (["--beams", 0], "--beams 0 must be >= 1"),
        (["--length-penalty", 2], "--length-penalty is about beams; add --beams N"),
        (["--beams", 2, "--temperature", 0.5], "beam search takes the most probable text"),
        (["--beams", 2, "--stop", ""], "a stop string is empty"),
    ):
        code, _, err = run(*common, *wrong)
        assert (code, message in err) == (1, True), err
