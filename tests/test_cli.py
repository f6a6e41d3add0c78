"""The command line: order and examples of the help, the whole pipeline on a tiny text, and one line for bad input."""

import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import typer

from graft import __version__ as version
from graft import cli
from graft.base.runlog import read_metrics

TINY = ["n_layers=1", "d_model=32", "n_heads=2", "max_seq_len=48", "batch_size=4", "eval_batches=1"]
SETTINGS = [word for setting in TINY for word in ("--set", setting)]


def settings_but(setting: str) -> list[str]:
    """SETTINGS with one more key, or another value of one: a key given twice is refused."""
    key = setting.partition("=")[0]
    kept = [known for known in TINY if known.partition("=")[0] != key]
    return [word for each in (*kept, setting) for word in ("--set", each)]


@dataclass
class Done:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`graft ARGUMENTS` in this process: what the entry point does, without a second import of torch."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        found = capsys.readouterr()
        return Done(code, found.out, found.err)

    return call


@pytest.fixture
def refused(run: Callable[..., Done]) -> Callable[..., str]:
    """A command that must fail with exit code 1 and one line on standard error, which is returned without `graft: `."""

    def call(*arguments: object) -> str:
        done = run(*arguments)
        lines = [line for line in done.err.splitlines() if line and not line.startswith(("predicted peak", "device: "))]
        assert done.code == 1, done
        assert len(lines) == 1, done.err
        assert lines[0].startswith("graft: ")
        return lines[0].removeprefix("graft: ")

    return call


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    animals = ("cat", "bird", "tree", "river")
    return write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"the {a} is", "completion": f" a {a}."} for a in animals for _ in "ab"]
    )


# --- help ----------------------------------------------------------------------------------------------------------


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group with the words that call it."""
    for name in group.list_commands(click.Context(group)):
        command = group.commands[name]
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))  # pyright: ignore
        else:
            yield (*path, name), command


COMMANDS = dict(commands(typer.main.get_command(cli.app)))  # pyright: ignore


def test_commands_are_in_the_pipelines_order(run: Callable[..., Done]) -> None:
    """Law: --help lists text to tokens, training, use, looks, in panels of that order; every command has its panel."""
    expected = [
        "demo",
        "tokenizer",
        "data",
        "plan",
        "config",
        "pretrain",
        "sft",
        "quantize",
        "launch",
        "dpo",
        "reward",
        "grpo",
        "ppo",
        "generate",
        "chat",
        "serve",
        "adapter",
        "eval",
        "arena",
        "vram",
        "plot",
        "doctor",
    ]
    assert list(dict.fromkeys(words[0] for words in COMMANDS)) == expected
    shown = run("--help").out
    places = [shown.index(panel) for panel in cli.ORDER]
    assert places == sorted(places)
    listed = [line.split()[1] for line in shown.splitlines() if line.startswith("│ ") and line[2].isalpha()]
    assert [word for word in listed if word in expected] == expected
    assert set(cli.PANEL) == set(expected)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_one_example_that_parses(words: tuple[str, ...], run: Callable[..., Done]) -> None:
    """Law: one `Example: graft ...` a command, of this command, whose options exist and take these values."""
    done = run(*words, "--help")
    assert done.code == 0
    assert done.out.count("Example:") == 1
    text = COMMANDS[words].help or ""
    [example] = [line for line in text.splitlines() if line.strip().startswith("Example:")]
    graft, *arguments = shlex.split(example.split("Example:")[1])
    assert graft == "graft"
    assert tuple(arguments[: len(words)]) == words
    COMMANDS[words].make_context("graft", arguments[len(words) :])


def test_help_shows_defaults_that_the_code_chooses(run: Callable[..., Done]) -> None:
    """Rich reads brackets as markup: unescaped ones vanish."""
    for words, default in ((["sft"], "16"), (["vram", "estimate"], "512, or"), (["tokenizer", "compare"], "5000,")):
        assert f"[default: {default}" in " ".join(run(*words, "--help").out.split())


# --- the pipeline --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_pipeline(run: Callable[..., Done], text_file: Path, rows: Path, tmp_path: Path) -> None:
    """Law: each command reads what the one before wrote, and says what it did."""

    def ok(*arguments: object, stdin: str = "") -> str:
        done = run(*arguments, stdin=stdin)
        assert done.code == 0, done.err
        assert "Traceback" not in done.err
        return done.out

    tok, tokens, base, lora = (tmp_path / name for name in ("tok", "tokens", "base", "adapters/one"))
    assert "300 tokens" in ok("tokenizer", "train", text_file, "--vocab-size", 300, "--out", tok)
    ids = ok("tokenizer", "encode", "--tokenizer", tok, "the cat sat").strip()
    assert ok("tokenizer", "decode", "--tokenizer", tok, *ids.split()).strip() == "the cat sat"
    assert "bytes a token" in ok("tokenizer", "show", "--tokenizer", tok, "the cat")
    assert "train" in ok("data", "prepare", text_file, "--tokenizer", tok, "--out", tokens, "--val-fraction", 0.1)
    pretrain = ("pretrain", "--data", tokens, "--tokenizer", tok, "--out", base, *SETTINGS, "--device", "cpu")
    said = ok(*pretrain, "--steps", 3)
    assert "val_bits_per_byte" in said
    assert f"written to {base}" in said
    assert len(read_metrics(base / "metrics.jsonl")) == 3
    assert ok("plot", base).strip() == str(base / "loss.png")
    assert (base / "loss.png").read_bytes().startswith(b"\x89PNG")

    small = ("--steps", 2, "--set", "batch_size=4", "--device", "cpu")
    assert "method: lora" in ok("sft", "--base", base, "--data", rows, "--out", lora, "--lora", "--rank", 4, *small)
    ok("sft", "--base", base, "--data", rows, "--out", tmp_path / "qlora", "--qlora", "--rank", 4, *small)
    full = ok("sft", "--base", base, "--data", rows, "--out", tmp_path / "full", "--eval-data", rows, *small)
    assert "val_loss" in full
    more = ("--max-new-tokens", 5, "--device", "cpu")
    alone = ok("generate", "--base", base, "--prompt", "the cat", *more)
    adapted = ok("generate", "--base", base, "--adapter", lora, "--prompt", "the cat", *more)
    assert alone.endswith("\n")
    assert adapted.endswith("\n")
    ok("generate", "--base", tmp_path / "full", "--prompt", "the cat", "--chat", *more)

    text_scores = json.loads(ok("eval", "--base", base, "--data", text_file, "--json", "--device", "cpu"))
    assert text_scores["bits_per_byte"] > 0
    scores = json.loads(
        ok("eval", "--base", base, "--adapter", lora, "--data", rows, "--json", "--limit", 5, "--device", "cpu")
    )
    assert scores["n_records"] == 5
    assert {"loss", "accuracy", "f1_macro"} <= set(scores)

    assert "one" in ok("adapter", "list", tmp_path / "adapters")
    assert "q_proj" in ok("adapter", "show", lora)
    merged, nf4 = tmp_path / "merged", tmp_path / "nf4"
    assert "merged 7 layers" in ok("adapter", "merge", "--base", base, "--adapter", lora, "--out", merged)
    assert ok("generate", "--base", merged, "--prompt", "the cat", *more) == adapted  # 2 steps: no logit is a tie
    assert "bits_per_weight: 4." in ok("quantize", "--base", base, "--out", nf4)
    ok("generate", "--base", nf4, "--adapter", tmp_path / "qlora", "--prompt", "the cat", *more)

    talk = "/adapters\n/adapter one\nthe cat\n/adapter three\n/base\n/new\n/what\n\n/quit\nnever read\n"
    said = ok("chat", "--base", base, "--adapter", f"one={lora}", *more, stdin=talk)
    assert "ranks [4]" in said
    assert "base>" in said
    assert "one>" in said
    assert "no adapter 'three' is loaded; loaded are: one" in said
    assert "/quit ends" in said
    assert "never read" not in said
    assert "none loaded" in ok("chat", "--base", base, *more, stdin="/adapters")  # and the input's end ends it

    estimate = json.loads(ok("vram", "estimate", "--model", base, "--method", "lora", "--seq", 16, "--json"))
    assert estimate["peak_bytes"] > 0
    assert "attention" in ok("doctor")


@pytest.mark.slow
def test_the_module_is_the_entry_point(graft: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """Law: `python -m graft` does what main() does: one line on standard error and exit code 1."""
    done = graft("adapter", "show", tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"graft: adapter folder {tmp_path}/nowhere does not exist\n"


# --- bad input -----------------------------------------------------------------------------------------------------


def test_text_that_cannot_be_read(refused: Callable[..., str], tmp_path: Path, tokenizer_dir: Path) -> None:
    """Missing, empty, a folder without text, not UTF-8: for training a tokenizer and for preparing data alike."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 cr\u00e8me".encode("latin-1"))
    for path, message in (
        ("none.txt", "none.txt does not exist"),
        ("empty.txt", "empty.txt is empty; give files with text"),
        ("folder", "folder holds no text"),
        ("latin.txt", "latin.txt"),
    ):
        train = refused("tokenizer", "train", tmp_path / path, "--vocab-size", 270, "--out", tmp_path / "t")
        tokens = ("--tokenizer", tokenizer_dir, "--out", tmp_path / "d")
        prepare = refused("data", "prepare", tmp_path / path, *tokens)
        for said in (train, prepare):
            assert message in said
            if path == "latin.txt":
                assert "UTF-8" in said
                assert "byte" in said
                assert "3" in said.split("UTF-8")[1]  # the offset of the first bad byte
    assert not (tmp_path / "t").exists()
    assert not (tmp_path / "d/meta.json").exists()


def test_a_vocabulary_that_is_too_small(refused: Callable[..., str], text_file: Path, tmp_path: Path) -> None:
    said = refused("tokenizer", "train", text_file, "--vocab-size", 258, "--out", tmp_path / "t")
    assert said == "vocab_size=258 is too small; 256 bytes and 3 special tokens need 259"


RECORDS = {
    "missing": (None, "does not exist"),
    "empty": (b"", "is empty"),
    "latin": ('{"text": "caf\u00e9"}'.encode("latin-1"), "not UTF-8 at byte offset 13"),
    "cut": (b'{"text": "a"}\n{"text": "b\n', "rows.jsonl line 2: not JSON (Unterminated string"),
    "fields": (
        b'{"text": "a"}\n{"question": "b", "answer": 3}\n',
        "rows.jsonl line 2: the fields found are answer, question",
    ),
    "type": (b'{"prompt": "a", "completion": 3}\n', "rows.jsonl line 1: completion must be a string, got a number"),
    "long": (
        b'{"prompt": "a", "completion": "b"}\n' + json.dumps({"prompt": "cat " * 200, "completion": "b"}).encode(),
        "rows.jsonl line 2: no label is left after truncation to max_seq_len=97",
    ),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_records_that_cannot_be_read(
    kind: str, refused: Callable[..., str], base_dir: Path, tmp_path: Path, rows: Path
) -> None:
    """Each names file and line; the output folder is left as it was, so that the same command works once it is mended."""
    content, message = RECORDS[kind]
    mended = rows.read_bytes()
    rows.unlink()
    if content is not None:
        rows.write_bytes(content)
    command = ("sft", "--base", base_dir, "--data", rows, "--out", tmp_path / "out", "--lora", "--device", "cpu")
    assert message in refused(*command)
    assert not (tmp_path / "out/run.json").exists()
    rows.write_bytes(mended)
    assert "unknown config key 'nonsense'" in refused(*command, "--set", "nonsense=1")
    assert not (tmp_path / "out/run.json").exists()


def test_a_folder_where_a_file_is_due(refused: Callable[..., str], base_dir: Path, tmp_path: Path, rows: Path) -> None:
    out = ("--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(
        "sft", "--base", base_dir, "--data", tmp_path / "empty", *out
    )  # a folder of records is fine
    assert "is a file; expected a model folder" in refused("sft", "--base", rows, "--data", rows, *out)
    assert "is a folder" in refused("pretrain", tmp_path, "--data", tmp_path, "--tokenizer", tmp_path, *out)
    assert "holds no meta.json" in refused("pretrain", "--data", tmp_path, "--tokenizer", base_dir, *out)
    assert "is a file; expected a folder for the output" in refused(
        "sft", "--base", base_dir, "--data", rows, "--out", rows
    )
    assert "does not exist" in refused("generate", "--base", tmp_path / "none", "--prompt", "x")
    assert "has no config.json" in refused("generate", "--base", tmp_path, "--prompt", "x")
    assert "has no adapter_config.json" in refused(
        "generate", "--base", base_dir, "--adapter", tmp_path, "--prompt", "x"
    )
    assert "holds no metrics.jsonl" in refused("plot", tmp_path)
    assert "no adapter (adapter_config.json) lies below" in refused("adapter", "list", tmp_path)
    assert "folder" in refused("adapter", "list", tmp_path / "none")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learningrate=1", "unknown config key 'learningrate'; did you mean learning_rate?"),
        ("steps=many", "config key steps = 'many' is str; expected int"),
        ("learning_rate=true", "config key learning_rate = True is bool; expected float"),
        ("d_model", "setting 'd_model' is not key=value"),
        ("d_model=33", "d_model=33 is not divisible by n_heads=2; use d_model 32 or 34"),
        ("dtype=int8", "unknown dtype 'int8'; choose float32, bfloat16 or float16"),
        ("optimizer=adamw8bit", "unknown optimizer 'adamw8bit'; choose adamw, muon"),
        ("max_seq_len=9999999", "one window of max_seq_len=9999999 needs 10000000"),
    ],
)
def test_settings_that_cannot_be(
    setting: str, message: str, refused: Callable[..., str], shards: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Each is one line, and leaves no run behind."""
    command = ("pretrain", "--data", shards, "--tokenizer", tokenizer_dir, "--out", tmp_path / "out")
    assert message in refused(*command, *settings_but(setting))
    assert not (tmp_path / "out/run.json").exists()


@pytest.fixture(scope="module")
def shards(text_file: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from graft.base.data.shards import prepare
    from graft.base.tokenizer.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("shards") / "tokens"
    prepare([text_file], Tokenizer.load(tokenizer_dir), folder, val_fraction=0.1)
    return folder


def test_a_finished_run_is_not_overwritten(
    run: Callable[..., Done], refused: Callable[..., str], shards: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Refused without --force or --resume; a --force that fails on its settings, and a --resume with nothing left to
    do, lose nothing either."""
    out = tmp_path / "out"
    bare = ("pretrain", "--data", shards, "--tokenizer", tokenizer_dir, "--out", out, "--device", "cpu")
    command = (*bare, *SETTINGS)
    assert run(*command, "--steps", 3).code == 0

    def snapshot() -> dict[str, bytes]:
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    before = snapshot()
    assert "holds a finished run; use --resume to go on, or --force" in refused(*command)
    for typo in ("stepps=4", "d_model=31", "max_seq_len=9999999"):
        refused(*bare, "--force", *settings_but(typo))
        assert snapshot() == before, typo
    assert "--resume goes on with d_model=32, got 64" in refused(*bare, "--resume", *settings_but("d_model=64"))
    assert snapshot() == before
    assert run(*command, "--resume", "--steps", 3).code == 0
    after = snapshot()
    for name in ("metrics.jsonl", "model.safetensors", "config.json", "tokenizer.json"):
        assert after[name] == before[name], name
    summary, earlier = json.loads(after["summary.json"]), json.loads(before["summary.json"])
    for key in ("steps", "train_loss", "val_loss", "val_bits_per_byte"):
        assert summary[key] == earlier[key]
    assert run(*command, "--force", "--steps", 2).code == 0
    assert len(read_metrics(out / "metrics.jsonl")) == 2


def test_a_truncated_model(refused: Callable[..., str], base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Every command that loads it names the file."""
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (len(whole) - 1000, 100, 3, 0):
        weights.write_bytes(whole[:cut])
        assert f"{weights} is truncated or no safetensors file" in refused("generate", "--base", base, "--prompt", "x")
    assert "is truncated" in refused("sft", "--base", base, "--data", rows, "--out", tmp_path / "o", "--lora")
    assert "is truncated" in refused("eval", "--base", base, "--data", rows)
    assert "is truncated" in refused("quantize", "--base", base, "--out", tmp_path / "q")
    assert not (tmp_path / "o/run.json").exists()
    assert not (tmp_path / "q").exists()
    weights.unlink()
    assert "has no model.safetensors" in refused("generate", "--base", base, "--prompt", "x")
    (base / "config.json").write_text('{"architectures": ["PhiForCausalLM"]}')
    assert "architecture 'PhiForCausalLM' is not known" in refused("generate", "--base", base, "--prompt", "x")
    (base / "config.json").write_text('{"architectures"')
    assert "config.json line 1: not JSON" in refused("generate", "--base", base, "--prompt", "x")


def test_an_adapter_for_another_base(
    run: Callable[..., Done], refused: Callable[..., str], base_dir: Path, rows: Path, tmp_path: Path
) -> None:
    """By shape and, where the shapes agree, by fingerprint: generate, eval, chat and merge all refuse it."""
    from dataclasses import replace

    from graft.base.model.huggingface import load_config, save_model
    from graft.base.model.transformer import Transformer, initialize_

    small = ("--steps", 1, "--set", "batch_size=2", "--device", "cpu", "--rank", 2)
    adapter = tmp_path / "adapter"
    assert run("sft", "--base", base_dir, "--data", rows, "--out", adapter, "--lora", *small).code == 0
    config = load_config(base_dir)
    for name, changed, message in (
        ("narrow", replace(config, d_ff=64), "is for another base: model.layers.0.mlp."),
        ("twin", config, "was trained on another base of the same shape (fingerprint "),
    ):
        other = tmp_path / name
        shutil.copytree(base_dir, other)
        model = Transformer(changed)
        initialize_(model, seed=9)
        save_model(model, other)
        use = ("--base", other, "--adapter", adapter)
        assert message in refused("generate", *use, "--prompt", "x")
        assert message in refused("eval", *use, "--data", rows)
        assert message in refused("adapter", "merge", *use, "--out", tmp_path / "m")
        assert message in refused("chat", "--base", other, "--adapter", f"a={adapter}")
    assert not (tmp_path / "m").exists()
    assert "is not NAME=DIR" in refused("chat", "--base", base_dir, "--adapter", adapter)


def test_flags_that_contradict(refused: Callable[..., str], base_dir: Path, rows: Path, tmp_path: Path) -> None:
    sft = ("sft", "--base", base_dir, "--data", rows, "--out", tmp_path / "o")
    assert "--lora and --qlora exclude each other" in refused(*sft, "--lora", "--qlora")
    assert "unknown device 'tpux'" in refused(*sft, "--device", "tpux")
    assert "--rank is about an adapter; add --lora or --qlora" in refused(*sft, "--rank", 4)
    assert "lora targets {'q_proj2'} match no linear" in refused(*sft, "--lora", "--targets", "q_proj2")
    assert "rank=0 must be >= 1" in refused(*sft, "--lora", "--rank", 0)
    assert "max_seq_len=98 must lie in [2, 97]" in refused(*sft, "--set", "max_seq_len=98")
    assert not (tmp_path / "o/run.json").exists()
    assert "holds no run to resume" in refused(*sft[:5], "--out", tmp_path / "none", "--resume")
    generate = ("generate", "--base", base_dir, "--prompt", "x")
    assert "unknown dtype 'int8'" in refused(*generate, "--dtype", "int8")
    assert "temperature=-1" in refused(*generate, "--temperature", -1)
    assert "limit=0" in refused("eval", "--base", base_dir, "--data", rows, "--limit", 0)
    assert "is not empty" in refused("quantize", "--base", base_dir, "--out", base_dir)


def test_a_wrong_option_is_a_usage_error(run: Callable[..., Done]) -> None:
    done = run("sft", "--bas", "x")
    assert done.code == 2
    assert "No such option" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_an_option_given_twice_is_refused(words: tuple[str, ...], refused: Callable[..., str]) -> None:
    """Law: every single-valued option of every command, under any two of its names; Click alone keeps the last value."""
    for option in COMMANDS[words].params:
        if option.param_type_name != "option" or getattr(option, "multiple", False) or "--help" in option.opts:
            continue
        names = [*option.opts, *option.secondary_opts]
        value = [] if getattr(option, "is_flag", False) else ["1"]
        for name in names:
            assert refused(*words, names[0], *value, name, *value) == (
                f"{'/'.join(names)} is given 2 times and takes one value; keep one"
            )


def test_a_list_option_given_twice_is_a_list(refused: Callable[..., str], base_dir: Path) -> None:
    assert "does not exist" in refused(
        "sft", "--base", base_dir, "--data", "none", "--out", "o", "--set", "steps=1", "--set", "batch_size=2"
    )
    assert "adapter 'b' is not NAME=DIR" in refused("chat", "--base", base_dir, "--adapter", "a=x", "--adapter", "b")


@pytest.fixture
def broken_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[BaseException], None]:
    """Makes `graft doctor` raise something; tracebacks go to tmp_path."""
    from graft.kernels import doctor

    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))

    def broken(error: BaseException) -> None:
        def raise_it() -> None:
            raise error

        monkeypatch.setattr(doctor, "report", raise_it)

    return broken


def test_an_unexpected_exception_is_a_line_and_a_file(
    run: Callable[..., Done], broken_doctor: Callable[[BaseException], None], tmp_path: Path
) -> None:
    """Law: exit code 70, one line that names the command and the file, the traceback in the file."""
    for error in (KeyError("k\n[/x]"), TypeError("t\x1b[31m"), RecursionError("deep"), ZeroDivisionError("0")):
        broken_doctor(error)
        done = run("doctor")
        [line] = done.err.splitlines()
        assert done.code == 70
        assert line.startswith("graft: graft doctor failed: " + type(error).__name__)
        assert "This is a bug in graft" in line
        assert "\x1b" not in line
        file = Path(line.rpartition(" in ")[2])
        assert file.parent == tmp_path
        written = file.read_text()
        assert "Traceback" in written
        assert "in raise_it" in written
        assert "arguments ['doctor']" in written


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted by Ctrl-C"),
        (MemoryError("no room"), 1, "out of memory: no room; see graft vram estimate --fit"),
        (RuntimeError("can't allocate memory: you tried"), 1, "out of memory: can't allocate memory: you tried; see"),
        (EOFError("cut"), 1, "a file ends too early: cut"),
        (ValueError("a\nb \x1b[31m \x9b [/x]"), 1, r"a b \x1b[31m \x9b [/x]"),
        (OSError(), 1, "OSError"),
    ],
)
def test_each_end_is_one_line(
    error: BaseException, code: int, message: str, run: Callable[..., Done], broken_doctor: Callable[..., None]
) -> None:
    broken_doctor(error)
    done = run("doctor")
    assert done.code == code
    assert done.err.startswith(f"graft: {message}")
    assert len(done.err.splitlines()) == 1


def test_ctrl_c_that_foreign_code_turns_into_another_error(
    run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: exit code 130 also when a library answers the interrupt with an exception of its own."""
    from graft.kernels import doctor

    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ValueError("the file is truncated") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(doctor, "report", interrupted)
    assert run("doctor") == Done(130, "", "graft: interrupted by Ctrl-C\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_version_and_completion(run: Callable[..., Done]) -> None:
    assert run("--version") == Done(0, f"graft {version}\n", "")
    assert "--install-completion" in run("--help").out


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Within the block no file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_full_disk(
    run: Callable[..., Done],
    graft: Callable[..., subprocess.CompletedProcess[str]],
    shards: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
) -> None:
    """Law: when a checkpoint or the log can't be written (a limit on file size stands in for a full disk), training
    ends with one line and exit code 1; with room again, --resume goes on from the last checkpoint to the very weights
    of a run that was never disturbed."""
    command = ("pretrain", "--data", shards, "--tokenizer", tokenizer_dir, *SETTINGS, "--device", "cpu")
    whole, weights, log = (tmp_path / name for name in ("whole", "weights", "log"))
    assert run(*command, "--out", whole, "--steps", 3).code == 0
    shutil.copytree(whole, weights)
    shutil.copytree(whole, log)
    more = ("--resume", "--steps", 6)
    assert run(*command, "--out", whole, *more).code == 0

    limit = (whole / "checkpoints/step-00000006/weights.safetensors").stat().st_size - 1
    full = graft(
        *command, "--out", weights, *more, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    [line] = [line for line in full.stderr.splitlines() if line.startswith("graft: ")]
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert "weights.safetensors" in line
    assert "--resume" in line

    metrics = log / "metrics.jsonl"
    first = read_metrics(metrics)[0] | {"note": "x" * 200_000}  # the log is now larger than any other file
    metrics.write_text("\n".join([json.dumps(first), *metrics.read_text().splitlines()[1:]]) + "\n")
    with files_up_to(metrics.stat().st_size + 90):  # in the middle of a line
        full = run(*command, "--out", log, *more)
    assert full.code == 1
    assert "graft: [Errno 27] File too large: can't write: '" in full.err
    assert not metrics.read_text().endswith("}\n")

    for folder in (weights, log):
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
        done = run(*command, "--out", folder, *more)
        assert done.code == 0, done.err
        assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


# --- configs -------------------------------------------------------------------------------------------------------


def test_config_lists_every_key(run: Callable[..., Done], refused: Callable[..., str]) -> None:
    """Law: type, default and meaning of each key of the training commands, as text and as JSON; defaults are the command's own."""
    found = json.loads(run("config", "--json").out)
    assert set(found) == {"pretrain", "sft", "dpo", "reward", "grpo", "ppo"}
    assert set(found["sft"]) == {"data", "records", "train", "lora", "quant"}
    keys = {key["name"]: key for part in found["sft"].values() for key in part}
    assert keys["rank"] == {"name": "rank", "type": "int", "default": "16", "meaning": "of the update's two factors"}
    assert keys["weight_decay"]["default"] == "0.0"
    assert {key["name"]: key for key in found["pretrain"]["train"]}["weight_decay"]["default"] == "0.1"
    shown = run("config", "pretrain").out
    assert "[model]" in shown
    assert "learning_rate" in shown
    assert "rank_stabilized" not in shown
    assert "unknown stage 'dpoo'; choose pretrain, sft, dpo, reward, grpo or ppo" in refused("config", "dpoo")


def test_sft_takes_a_file_of_every_key(
    run: Callable[..., Done], refused: Callable[..., str], base_dir: Path, rows: Path, tmp_path: Path
) -> None:
    """Law: `graft sft CONFIG.toml` reads the method and all parts' keys; --set and flags override, and may not differ."""
    path = tmp_path / "c.toml"
    path.write_text(
        'method = "lora"\n[train]\nsteps = 1\nbatch_size = 2\nschedule = "wsd"\n[data]\npacking = true\n'
        '[lora]\nrank = 2\nalpha = 4\ndropout = 0.1\ntargets = ["q_proj", "v_proj"]\nrank_stabilized = true\n'
    )
    command = ("sft", path, "--base", base_dir, "--data", rows, "--device", "cpu")
    assert run(*command, "--out", tmp_path / "a", "--set", "alpha=8", "--steps", 2, "--lr", 1e-3).code == 0
    config = json.loads((tmp_path / "a/run.json").read_text())["config"]
    assert config["lora"] == {
        **config["lora"], "rank": 2, "alpha": 8.0, "dropout": 0.1, "targets": ["q_proj", "v_proj"],
        "rank_stabilized": True,
    }  # fmt: skip
    train = config["train"]
    assert (train["steps"], train["batch_size"], train["learning_rate"], train["schedule"]) == (2, 2, 1e-3, "wsd")
    assert config["data"]["packing"] is True
    out = ("--out", tmp_path / "b")
    assert "--rank 4 and --set rank=8 contradict each other" in refused(*command, *out, "--rank", 4, "--set", "rank=8")
    assert "--qlora and method='lora' contradict each other" in refused(*command, *out, "--qlora")
    assert "rank=2 is about an adapter" in refused(*command, *out, "--set", "method=full")
    path.write_text("[train]\nrank = 2\n[lora]\nrank = 2\n")
    assert "rank stands in [train] and in [lora]; keep one" in refused(*command, *out, "--lora")
    assert "unknown config key 'max_lr'; did you mean learning_rate?" in refused(
        *command[:1], *command[2:], *out, "--set", "max_lr=1"
    )
    assert not (tmp_path / "b").exists()
